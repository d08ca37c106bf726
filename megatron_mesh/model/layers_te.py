"""GPT-NeoX layers from Transformer Engine's modules. Importing this module needs Transformer Engine.

Their linear modules need care in a loop. With fused gradient accumulation, the backward of a forward with
``is_first_microbatch=True`` *overwrites* ``main_grad``; all others add to it. Megatron's wrappers pass True
in the first forward (with FP8: of every step). A core runs K times, and the backward of its first pass comes
last, so it would overwrite what the other passes have added. On a ring the prelude suffers too, because each
chunk of a rank marks all of the rank's modules again.

Therefore no forward that has a backward ever passes True:

- Without FP8, with weights stored in FP8, or with a cast in every pass, the flag is None, which means add
  (Megatron's ``disable_parameter_transpose_cache``, set in ``precision.py``).
- With a cached cast, the flag is False. A separate forward with True, on a few zeros, refreshes the cast, and
  its output is discarded. This happens before the very first forward, and whenever Megatron's schedule marks
  the module (``set_is_first_microbatch``, in the first micro-batch of a step or of an evaluation).

Always adding is correct because every step starts with zero gradients (``zero_grad_buffer``).
"""

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_mesh.model.layers import ParallelResidualLayer
from megatron_mesh.model.transformer_config import MeshTransformerConfig

# FP8 matrix products need multiples of 16 rows, and a row-parallel layer may scatter them.
_ROWS = 16


class _RefreshesCast:
    """Handles the flag as described above; mixed in before one of Megatron's wrappers."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``TELinear.forward``."""
        if self.is_first_microbatch and not self.disable_parameter_transpose_cache:
            # The cast includes the transpose that backward needs only if gradients are enabled, and they are
            # off in the first forward of a recomputed layer. So switch them on.
            with torch.set_grad_enabled(self.training):
                zeros = x.new_zeros(_ROWS * self.tp_size, 1, x.shape[-1], requires_grad=self.training)
                super().forward(zeros)  # type: ignore[misc]  # sets is_first_microbatch to False
        return super().forward(x)  # type: ignore[misc]


class LayerNormColumnParallelLinear(_RefreshesCast, TELayerNormColumnParallelLinear):
    """Fused norm and linear layer whose gradients are correct in a loop."""


class RowParallelLinear(_RefreshesCast, TERowParallelLinear):
    """Linear layer whose gradients are correct in a loop."""


class TELayer(ParallelResidualLayer):
    """GPT-NeoX's layer; its linear modules fuse gradient accumulation without apex."""

    def __init__(self, config: MeshTransformerConfig, *args: Any, **kwargs: Any):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = config.fuse_layer_gradients
        super().__init__(config, *args, **kwargs)


def te_layer_spec() -> ModuleSpec:
    """Return the layer spec: attention and MLP read the same input, each with its own fused norm.

    Checkpoint keys are those of the local spec.
    """
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.module = TELayer
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.linear_qkv = mlp.linear_fc1 = LayerNormColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = RowParallelLinear
    assert attention.core_attention is TEDotProductAttention, attention.core_attention
    return spec
