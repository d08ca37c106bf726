"""Internals of Megatron-core's layers, blocks, models and optimizers."""

import os
from abc import abstractmethod
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

ATTENTION_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""The environment variables by which Transformer Engine chooses its attention."""


class CustomTransformerBlock(TransformerBlock):
    """A ``TransformerBlock`` whose layers a subclass builds; the original builds one plain stack."""

    @abstractmethod
    def build_layers(self) -> None:
        """Build the block's modules. ``TransformerBlock.__init__`` calls this."""

    def _build_layers(self) -> None:
        self.build_layers()


class CustomGPTModel(GPTModel):
    """A ``GPTModel`` whose embedding of the tokens a subclass may change."""

    def embed(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The input of the decoder [S, B, H], from the first stage's embedding."""
        return self.embedding(input_ids=input_ids, position_ids=position_ids)

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> tuple:
        if decoder_input is None and self.pre_process:
            decoder_input = self.embed(input_ids, position_ids)
        return super()._preprocess(input_ids, position_ids, decoder_input, **kwargs)


def layer_attention(layer: TransformerLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Norm, attention and residual of a layer. Arguments as in ``TransformerLayer.forward``."""
    return layer._forward_attention(*args, **kwargs)


def layer_pre_mlp_norm(layer: TransformerLayer, hidden_states: Tensor) -> Tensor:
    """The norm before a layer's MLP, recomputed or offloaded as the layer's settings say."""
    return layer._forward_pre_mlp_layernorm(hidden_states)


def layer_post_mlp(
    layer: TransformerLayer, mlp_output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor
) -> Tensor:
    """Add the MLP's output and bias to the residual, with dropout."""
    return layer._forward_post_mlp(mlp_output_with_bias, residual)


def copy_main_to_model_weights(optimizer: MegatronOptimizer) -> None:
    """Write an optimizer's float32 weights into the model's, unless the model's are float32 themselves."""
    if hasattr(optimizer, "_copy_main_params_to_model_params"):
        optimizer._copy_main_params_to_model_params()


def optimizer_shard(optimizer: DistributedOptimizer, parameter: Tensor) -> tuple[int, int]:
    """The elements of a parameter, from one up to another, that this rank's optimizer updates."""
    shard = optimizer._get_model_param_range_map(parameter)["param"]
    return shard.start, shard.end


def clear_attention_switches() -> None:
    """Let the next model set ``ATTENTION_SWITCHES``: Megatron-core asserts that none has another value."""
    for name in ATTENTION_SWITCHES:
        os.environ.pop(name, None)
