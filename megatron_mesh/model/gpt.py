"""Megatron-core's GPT model with a looped decoder."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch import Tensor
from torch.nn import Parameter

from megatron_mesh.compat.megatron_model import CustomGPTModel
from megatron_mesh.config.placement import Part
from megatron_mesh.model.block import MeshTransformerBlock
from megatron_mesh.model.layer_spec import final_norm
from megatron_mesh.model.transformer_config import MeshTransformerConfig
from megatron_mesh.recurrence import SCHEMES


class MeshGPTModel(CustomGPTModel):
    """A ``GPTModel`` whose decoder loops. Without a loop (vanilla) it has Megatron's own decoder.

    ``GPTModel`` always constructs a ``TransformerBlock`` as its decoder. A looped model therefore lets it
    construct one without layers, and then replaces it with a ``MeshTransformerBlock``.
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
        unpadded_vocab_size: int | None = None,
        **kwargs: Any,
    ):
        """See ``GPTModel``.

        Args:
            vocab_size: the padded vocabulary size.
            part: the part of a looped model that this pipeline rank holds (default: all).
            unpadded_vocab_size: the vocabulary size without padding (default: ``vocab_size``).
        """
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
        self.unpadded_vocab_size = vocab_size if unpadded_vocab_size is None else unpadded_vocab_size
        self.register_load_state_dict_post_hook(_ignore_missing_extra_states)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        """Yield the parameters as ``torch.nn.Module`` does, but with the recurrence's first.

        Megatron's gradient buffer holds them in reverse order, without gaps unless the optimizer is
        distributed. Routers and coefficients have odd sizes. Any gradient placed after them would not be
        aligned to 16 bytes, and cuBLAS could not accumulate into it.
        """
        parameters = super().named_parameters(*args, **kwargs)
        return iter(sorted(parameters, key=lambda named: "recurrence." not in named[0]))

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Embed as ``GPTModel`` does, and scale the result."""
        return super().embed(input_ids, position_ids) * self.config.embedding_scale

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Compute the loss as ``GPTModel`` does, but give padded vocabulary entries zero probability.

        The loss then doesn't depend on padding. An imported model has the same loss as its source, and an
        export without the padded entries has the same loss as the run.

        Args:
            labels: [B, S].
            logits: [S, B, vocabulary entries of this tensor-parallel rank]; overwritten.
        """
        shard = logits.shape[-1]
        first_padded = min(max(self.unpadded_vocab_size - self.pg_collection.tp.rank() * shard, 0), shard)
        with torch.no_grad():  # the loss's gradient is zero for these entries anyway
            logits[..., first_padded:] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)


def _ignore_missing_extra_states(model: MeshGPTModel, incompatible: Any) -> None:
    """Don't report missing extra states, which checkpoints never contain (see ``checkpoint/content.py``)."""
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.endswith("._extra_state")]
