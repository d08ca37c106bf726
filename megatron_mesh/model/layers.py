"""GPT-NeoX layers from local modules: parallel residual, torch's attention, and norms.

``te_layers.py`` builds the same layer from Transformer Engine's modules; ``layer_spec.py`` chooses.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_mesh.compat.megatron_model import layer_attention, layer_post_mlp, layer_pre_mlp_norm
from megatron_mesh.model.implementation import has_fused_norms


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with support for sequence parallelism.

    Megatron-core's wrapper (``transformer/torch_norm.py``) rejects sequence parallelism. All it takes is the
    ``sequence_parallel`` attribute, which makes ``finalize_model_grads`` sum the gradients over the
    tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ApexLayerNorm(FusedLayerNorm):
    """apex's LayerNorm in the precision of the other parameters, instead of float32 until a later cast."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__(config, hidden_size, eps=eps)
        self.to(config.params_dtype)


def local_norm() -> type:
    """Return the norm class of local layers."""
    return ApexLayerNorm if has_fused_norms() else LayerNorm


class SDPAttention(MegatronModule):
    """torch's ``scaled_dot_product_attention`` behind Megatron-core's core-attention interface.

    It replaces the local spec's ``DotProductAttention``, which materializes the [S, S] scores.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Compute causal attention: three times [S, B, heads/TP, head size] -> [S, B, H/TP].

        Args:
            attention_mask: None for causal, or Megatron's boolean mask (True means masked out).
        """
        assert attention_bias is None and packed_seq_params is None, "not supported by torch's attention"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = None if attention_mask is None else ~attention_mask
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class ParallelResidualLayer(TransformerLayer):
    """GPT-NeoX's layer, ``x + attn(ln1(x)) + mlp(ln2(x))``, from ``TransformerLayer``'s submodules."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> ([S, B, H], None); further arguments as in ``TransformerLayer.forward``."""
        kwargs.pop("dynamic_inference_decode_only", None)
        attended, context = layer_attention(self, hidden_states, *args, **kwargs)
        normed = layer_pre_mlp_norm(self, hidden_states)
        if self.recompute_mlp and self.training:
            mlp_output_with_bias = self._recomputed_mlp(normed), None
        else:
            mlp_output_with_bias = self.mlp(normed)
        return layer_post_mlp(self, mlp_output_with_bias, attended), context

    def _recomputed_mlp(self, normed: Tensor) -> Tensor:
        if not self.config.fp8:
            return tensor_parallel.checkpoint(self._mlp_plus_bias, False, normed)
        # Like Megatron's layer: only Transformer Engine's own recomputation restores the FP8 state.
        from megatron.core.extensions.transformer_engine import te_checkpoint

        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return te_checkpoint(self._mlp_plus_bias, False, tracker, self.pg_collection.tp, normed)

    def _mlp_plus_bias(self, normed: Tensor) -> Tensor:
        # Megatron's layer returns the bias as a second output. As a node of the checkpoint's graph, it would
        # make the backward recompute forever.
        output, bias = self.mlp(normed)
        return output if bias is None else output + bias


def local_layer_spec() -> ModuleSpec:
    """Return Megatron-core's local GPT layer with our layer, norm and attention in place of its own."""
    spec = get_gpt_layer_local_spec(normalization="LayerNorm")
    spec.module = ParallelResidualLayer
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = local_norm()
    spec.submodules.self_attention.submodules.core_attention = SDPAttention
    return spec
