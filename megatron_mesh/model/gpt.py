"""Megatron-core's GPT model with our decoder."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor

from megatron_mesh.config.placement import Part
from megatron_mesh.model.block import MeshTransformerBlock
from megatron_mesh.model.config import MeshTransformerConfig
from megatron_mesh.model.layers import final_norm
from megatron_mesh.recurrence import SCHEMES


class MeshGPTModel(GPTModel):
    """``GPTModel`` whose decoder loops; without a loop (vanilla) the decoder is the stock one.

    ``GPTModel`` constructs its ``TransformerBlock`` itself and offers no hook for another class. So a
    looped model builds it with no layers, which costs nothing, and then puts its own in the place.
    """

    config: MeshTransformerConfig

    def __init__(
        self,
        config: MeshTransformerConfig,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        pg_collection: ProcessGroupCollection,
        part: Part | None = None,
        **kwargs: Any,
    ):
        """See ``GPTModel``; ``vocab_size`` is the padded one, ``part`` what to hold of a looped model."""
        looped = SCHEMES[config.recurrence].has_loop
        if part is not None:
            kwargs.update(pre_process=part.first, post_process=part.last)
        layers = 0
        if not looped:
            layers = get_num_layers_to_build(config, kwargs.get("vp_stage"), pg_collection.pp.rank())
        super().__init__(
            config,
            transformer_layer_spec=TransformerBlockSubmodules(
                [transformer_layer_spec] * layers, final_norm(config)
            ),
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            position_embedding_type="rope",
            pg_collection=pg_collection,
            **kwargs,
        )
        if looped:
            self.decoder = MeshTransformerBlock(config, transformer_layer_spec, pg_collection, part)
        self.register_load_state_dict_post_hook(_without_extra_states)

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> tuple:
        """As in ``GPTModel``, with the token embedding scaled."""
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            decoder_input = decoder_input * self.config.embedding_scale
        return super()._preprocess(input_ids, position_ids, decoder_input, **kwargs)


def _without_extra_states(model: MeshGPTModel, incompatible: Any) -> None:
    """No module misses its extra state: checkpoints have none (see ``checkpoint/content.py``)."""
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.endswith("._extra_state")]
