"""A section: consecutive layers of the prelude, the core or the coda."""

import copy

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import Tensor

from megatron_mesh.model.transformer_config import MeshTransformerConfig


class Section(TransformerBlock):
    """A ``TransformerBlock`` that holds this rank's layers of the prelude, the core or the coda.

    Recomputation and precision contexts are Megatron's. Only the layer numbers are ours, because Megatron
    assumes that every pipeline rank holds an equal share of one plain stack.

    Args:
        layer_spec: the spec of every layer.
        held: the layers that this rank holds, numbered from 0 within the section.
        total: the number of layers in the whole section, on all ranks.
    """

    def __init__(
        self,
        config: MeshTransformerConfig,
        layer_spec: ModuleSpec,
        held: range,
        total: int,
        pg_collection: ProcessGroupCollection,
    ):
        config = copy.copy(config)
        config.num_layers = len(held)
        config.pipeline_model_parallel_size = 1
        config.virtual_pipeline_model_parallel_size = None
        super().__init__(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[layer_spec] * len(held), layer_norm=None),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.total_layers = total
        for layer, number in zip(self.layers, held, strict=True):
            layer.layer_number = number + 1

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        """[S, B, H] -> [S, B, H]; see ``TransformerBlock.forward``."""
        if not self.layers:
            # The pipeline schedule needs input and output to be different nodes of the graph.
            return hidden_states.clone()
        return super().forward(hidden_states, attention_mask, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Stack the layers of all ranks into one tensor per parameter, along a new first dimension."""
        assert not sharded_offsets, "a section is not sharded along another dimension"
        state: ShardedStateDict = {}
        for index, layer in enumerate(self.layers):
            here = f"{prefix}layers.{index}."
            place = [(0, layer.layer_number - 1, self.total_layers)]
            part = layer.sharded_state_dict(here, place, metadata)
            replace_prefix_for_sharding(part, here, f"{prefix}layers.")
            state.update(part)
        return state
