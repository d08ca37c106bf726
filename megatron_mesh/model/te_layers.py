"""GPT-NeoX's layer from Transformer Engine's modules; import it only where that can be imported.

**Gradients of a layer that runs K times.** Where gradients are fused, Transformer Engine's linear modules
*overwrite* ``main_grad`` in the backward pass of a forward with ``is_first_microbatch=True``, and add to it
otherwise. Megatron's wrappers say True in the first forward (with FP8: of each step). In a core that is the
first of K passes, whose backward is the last: what the others had added is lost. On a ring of pipeline
ranks the prelude is hit too, since every chunk of a rank marks all of the rank's modules again. So here no
forward that has a backward ever says True:

- without FP8, with weights in FP8, or with a cast in every pass, the flag is None: always add
  (Megatron's ``disable_parameter_transpose_cache``, set in ``precision.py``);
- with a kept cast it is False, and the cast is refreshed by a forward of its own with True, on a few zeros,
  whose output is dropped. The refresh is due when Megatron's schedule marks the module
  (``set_is_first_microbatch``, the first micro-batch of a step or of an evaluation), and before the first
  forward of all.

Gradients start at zero in every step (``zero_grad_buffer``), so adding is all that is needed.
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

from megatron_mesh.model.config import MeshTransformerConfig
from megatron_mesh.model.layers import ParallelResidualLayer

# FP8 matrix products take sizes that divide by 16; a row-parallel layer may scatter the rows.
_ROWS = 16


class _RefreshesItsCast:
    """The handling of the flag described above, in front of one of Megatron's wrappers."""

    def forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See ``TELinear.forward``."""
        if self.is_first_microbatch and not self.disable_parameter_transpose_cache:
            # With gradients enabled, also inside a recomputed layer's first forward: then the cast has the
            # transpose that backward needs.
            with torch.set_grad_enabled(self.training):
                zeros = x.new_zeros(_ROWS * self.tp_size, 1, x.shape[-1], requires_grad=self.training)
                super().forward(zeros)  # type: ignore[misc]  # sets is_first_microbatch to False
        return super().forward(x)  # type: ignore[misc]


class LayerNormColumnParallelLinear(_RefreshesItsCast, TELayerNormColumnParallelLinear):
    """Norm and linear layer in one, gradients safe in a loop."""


class RowParallelLinear(_RefreshesItsCast, TERowParallelLinear):
    """Linear layer, gradients safe in a loop."""


class TELayer(ParallelResidualLayer):
    """The NeoX layer; its linear modules fuse their gradients without apex."""

    def __init__(self, config: MeshTransformerConfig, *args: Any, **kwargs: Any):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = config.fuse_layer_gradients
        super().__init__(config, *args, **kwargs)


def te_layer_spec() -> ModuleSpec:
    """Attention and MLP each with a fused norm of its own, on the same input; keys as of the local spec."""
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.module = TELayer
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.linear_qkv = mlp.linear_fc1 = LayerNormColumnParallelLinear
    attention.linear_proj = mlp.linear_fc2 = RowParallelLinear
    assert attention.core_attention is TEDotProductAttention, attention.core_attention
    return spec
