"""Megatron-core's GPT model with our decoder."""

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
from megatron_mesh.model.config import MeshTransformerConfig
from megatron_mesh.model.layers import final_norm
from megatron_mesh.recurrence import SCHEMES


class MeshGPTModel(CustomGPTModel):
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
        unpadded_vocab_size: int | None = None,
        **kwargs: Any,
    ):
        """See ``GPTModel``.

        Args:
            vocab_size: the padded one.
            part: what to hold of a looped model.
            unpadded_vocab_size: the vocabulary without its padding (default: ``vocab_size``).
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
        self.register_load_state_dict_post_hook(_without_extra_states)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Parameter]]:
        """As in ``torch.nn.Module``, but with the recurrence's first.

        Megatron lays gradients out in the reverse of this order without gaps (unless the optimizer is
        distributed). Routers and coefficients have odd numbers of elements, and a gradient after them would
        not begin at a multiple of 16 bytes, without which cuBLAS cannot accumulate into it.
        """
        parameters = super().named_parameters(*args, **kwargs)
        return iter(sorted(parameters, key=lambda named: "recurrence." not in named[0]))

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """As in ``GPTModel``, but scaled."""
        return super().embed(input_ids, position_ids) * self.config.embedding_scale

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """As in ``GPTModel``, but the padded rows of the vocabulary get no probability.

        So the loss doesn't depend on the padding: a model that was imported, and padded for that, has its
        source's loss, and an export without the padded rows has the loss of the run.

        Args:
            labels: [B, S].
            logits: [S, B, rows of this tensor-parallel rank], overwritten.
        """
        shard = logits.shape[-1]
        first_padded = min(max(self.unpadded_vocab_size - self.pg_collection.tp.rank() * shard, 0), shard)
        with torch.no_grad():  # the gradient of the loss is 0 there already
            logits[..., first_padded:] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)


def _without_extra_states(model: MeshGPTModel, incompatible: Any) -> None:
    """No module misses its extra state: checkpoints have none (see ``checkpoint/content.py``)."""
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not name.endswith("._extra_state")]
