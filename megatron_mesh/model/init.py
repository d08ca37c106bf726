"""Draw initial weights that depend only on the seed and on each parameter's name.

Every tensor has its own random generator and is drawn in full, in float32 on the CPU. A tensor-parallel rank
then takes its shard. So construction order, device and rank layout don't matter.
"""

import hashlib
from collections.abc import Sequence

import torch
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from megatron_mesh.model.gpt import MeshGPTModel
from megatron_mesh.model.naming import whole_model_parameters

# Matrices whose output is added to the residual stream.
_OUTPUT_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def init_weights(model: MeshGPTModel, seed: int, depth_scaled: bool = True) -> None:
    """Set weights to N(0, std), biases to 0 and norm weights to 1. The recurrence scheme sets its own values.

    Args:
        depth_scaled: divide the std of output projections by sqrt(2 x unrolled depth), as the paper does.
    """
    std = model.config.init_method_std
    output_std = std / (2 * model.config.num_layers) ** 0.5 if depth_scaled else std
    prefix = "decoder.recurrence."
    for name, parameter in whole_model_parameters(model):
        if name.startswith(prefix):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name or "layer_norm" in name:
            parameter.fill_(1.0)
        else:
            this_std = output_std if name.endswith(_OUTPUT_PROJECTIONS) else std
            _draw(parameter, f"{seed}/{name}", this_std, model.tp_group)
    scheme = getattr(model.decoder, "recurrence", None)
    if scheme is not None:
        scheme.init_parameters(
            lambda name, weight, std: _draw(weight, f"{seed}/{prefix}{name}", std, model.tp_group)
        )


@torch.no_grad()
def zero_weights(model: MeshGPTModel) -> None:
    """Set every parameter to zero before loading a checkpoint, which may lack the padded vocabulary rows."""
    for parameter in model.parameters():
        parameter.zero_()


def drawn(shape: Sequence[int], key: str, std: float) -> Tensor:
    """Draw the whole tensor named ``key`` from N(0, std)."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)


def _draw(weight: Tensor, key: str, std: float, tp_group: torch.distributed.ProcessGroup) -> None:
    """Fill ``weight`` with this rank's shard of the tensor named ``key``."""
    shape = list(weight.shape)
    sharded = getattr(weight, "tensor_model_parallel", False)
    if sharded:
        shape[weight.partition_dim] *= get_pg_size(tp_group)  # type: ignore[attr-defined]
    whole = drawn(shape, key, std)
    if sharded:
        whole = whole.chunk(get_pg_size(tp_group), weight.partition_dim)[get_pg_rank(tp_group)]  # type: ignore[attr-defined]
    weight.copy_(whole)
    # A weight stored in FP8 also holds the unrounded values, from which the optimizer's main parameters
    # start.
    precise = getattr(weight, "get_high_precision_init_val", None)
    if precise is not None:
        precise().copy_(whole)
