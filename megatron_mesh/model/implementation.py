"""Choose the implementation of the layers, Transformer Engine's or local modules, and log the choice."""

import functools
import importlib.util
import logging
from typing import Literal

from megatron.core.fusions import fused_layer_norm
from megatron.core.transformer.enums import AttnBackend

from megatron_mesh import kernels
from megatron_mesh.config.schema import ParallelConfig, PrecisionConfig
from megatron_mesh.errors import UserError
from megatron_mesh.model.attention import attention_backend
from megatron_mesh.runtime import device
from megatron_mesh.runtime.distributed import is_rank_zero
from megatron_mesh.runtime.transformer_engine import NO_GPU, is_installed, why_no_transformer_engine

logger = logging.getLogger(__name__)

Implementation = Literal["local", "transformer_engine"]
LOCAL: Implementation = "local"
TRANSFORMER_ENGINE: Implementation = "transformer_engine"

_INSTALL = "on a machine with CUDA run pip install --no-build-isolation -e '.[te]'"
_REINSTALL = "reinstall it for this torch and its CUDA, or run pip uninstall transformer-engine"


def choose(precision: PrecisionConfig, parallel: ParallelConfig) -> Implementation:
    """Choose the implementation of the layers on this machine, and log it once.

    ``auto`` doesn't fall back to local layers if Transformer Engine is installed but broken on a machine with
    a
    GPU: whoever installed it didn't mean to train more slowly.

    Raises:
        UserError: the settings need something that this machine lacks.
    """
    setting = precision.transformer_impl
    missing = why_no_transformer_engine()
    reason = missing or (f"--transformer-impl is {setting}" if device.has_gpu() else NO_GPU)
    remedy = _with_remedy(missing) if missing else reason
    wanted = setting == TRANSFORMER_ENGINE or (setting == "auto" and device.has_gpu())
    chosen = TRANSFORMER_ENGINE if wanted and not missing else LOCAL
    if missing and wanted and (setting == TRANSFORMER_ENGINE or is_installed()):
        raise UserError(
            f"--transformer-impl {setting}: {remedy}; use --transformer-impl local to run without it"
        )
    if precision.fp8_format and chosen == LOCAL:
        raise UserError(
            f"--fp8-format needs Transformer Engine, but {remedy}; remove it to train in bfloat16"
        )
    recipe = precision.fp8_recipe
    if precision.fp8_format and device.has_gpu() and (why := device.why_no_fp8(recipe)):
        raise UserError(f"--fp8-format with --fp8-recipe {recipe}: {why}; remove --fp8-format")
    _check_attention(precision, parallel, chosen, remedy)
    if precision.gradient_accumulation_fusion and chosen == LOCAL and not has_fused_gradients():
        raise UserError(
            "--gradient-accumulation-fusion needs Transformer Engine or apex with its CUDA extensions, but "
            f"{remedy}, and apex's fused_weight_gradient_mlp_cuda is not available; remove the flag"
        )
    _log_once(chosen, "" if setting == chosen else reason)
    return chosen


def _check_attention(
    precision: PrecisionConfig, parallel: ParallelConfig, chosen: Implementation, remedy: str
) -> None:
    attention = attention_backend(precision.attention_backend, te_layers=chosen == TRANSFORMER_ENGINE)
    uses_torch = chosen == LOCAL or attention is AttnBackend.local
    if (ranks := parallel.context_parallel_size) > 1 and uses_torch:
        why = "--attention-backend is local" if chosen == TRANSFORMER_ENGINE else remedy
        raise UserError(
            f"--context-parallel-size {ranks} needs Transformer Engine's attention, but {why}; for long "
            "sequences without it use --tensor-model-parallel-size with --sequence-parallel"
        )
    if chosen == LOCAL and attention not in (AttnBackend.auto, AttnBackend.local):
        raise UserError(
            f"--attention-backend {attention.name} needs Transformer Engine's layers, but {remedy}; remove "
            "the flag to let torch choose the fastest attention"
        )


def _with_remedy(missing: str) -> str:
    if not is_installed():
        return f"{missing} ({_INSTALL})"
    return f"{missing} ({_REINSTALL})" if device.has_gpu() else missing


def has_fused_gradients() -> bool:
    """Whether Megatron's linear layers can fuse gradient accumulation, which takes a GPU and apex."""
    return device.has_gpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_fused_norms() -> bool:
    """Whether local layers use apex's norms, which takes a GPU and apex's kernels."""
    return device.has_gpu() and fused_layer_norm.HAVE_FUSED_LAYER_NORM


def describe(chosen: Implementation, reason: str = "") -> dict[str, str]:
    """Describe what computes the layers, the memory and the optimizer step in this process.

    Args:
        reason: why the layers are local.
    """
    from megatron.core.optimizer import Adam  # Transformer Engine's, apex's or torch's

    local = "torch's attention, apex's norms" if has_fused_norms() else "torch's attention and norms"
    why = f" ({reason})" if chosen == LOCAL and reason else ""
    no_kernels = kernels.why_unavailable()
    return {
        "layers": "Transformer Engine's" if chosen == TRANSFORMER_ENGINE else local + why,
        "memory": f"torch's operations ({no_kernels})" if no_kernels else "Triton kernels",
        "optimizer": f"{Adam.__name__} from {Adam.__module__.split('.')[0]}",
    }


@functools.cache
def _log_once(chosen: Implementation, reason: str) -> None:
    if is_rank_zero():
        logger.info("; ".join(f"{part}: {text}" for part, text in describe(chosen, reason).items()))
