"""Whether the layers are Transformer Engine's modules or local ones."""

import functools
import importlib
import importlib.util
import logging
from typing import Literal

from megatron.core.fusions import fused_layer_norm
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import is_te_min_version

from megatron_mesh import kernels
from megatron_mesh.compat.imports import BROKEN
from megatron_mesh.config.schema import ParallelConfig, PrecisionConfig
from megatron_mesh.errors import UserError
from megatron_mesh.model.attention import attention_backend
from megatron_mesh.runtime import device
from megatron_mesh.runtime.distributed import is_rank_zero

logger = logging.getLogger(__name__)

Implementation = Literal["local", "transformer_engine"]
LOCAL: Implementation = "local"
TRANSFORMER_ENGINE: Implementation = "transformer_engine"

_NO_GPU = "there is no GPU"
_INSTALL = "on a machine with CUDA: pip install --no-build-isolation -e '.[te]'"
_REINSTALL = "install it again, for this torch and its CUDA, or pip uninstall transformer-engine"
_OLDEST = "2.9"  # what megatron-core 0.16.1 asks for in its own extra


def choose(precision: PrecisionConfig, parallel: ParallelConfig) -> Implementation:
    """The layers' implementation on this machine, said once in the log.

    Raises:
        UserError: the settings ask for something that this machine has not.
    """
    asked = precision.transformer_impl
    missing = why_no_transformer_engine()
    reason = missing or (f"--transformer-impl {asked} rules it out" if device.has_gpu() else _NO_GPU)
    remedy = _with_remedy(missing) if missing else reason
    wanted = asked == TRANSFORMER_ENGINE or (asked == "auto" and device.has_gpu())
    chosen = TRANSFORMER_ENGINE if wanted and not missing else LOCAL
    # One that is installed was meant to be used: no slower run instead, unless asked for.
    if missing and wanted and (asked == TRANSFORMER_ENGINE or _is_installed()):
        raise UserError(f"--transformer-impl {asked}: {remedy}; or use --transformer-impl local")
    if precision.fp8_format and chosen == LOCAL:
        raise UserError(f"--fp8-format needs Transformer Engine: {remedy}; or leave --fp8-format out")
    recipe = precision.fp8_recipe
    if precision.fp8_format and device.has_gpu() and (why := device.why_no_fp8(recipe)):
        raise UserError(f"--fp8-format with --fp8-recipe {recipe}: {why}; leave --fp8-format out")
    _check_attention(precision, parallel, chosen, remedy)
    if precision.gradient_accumulation_fusion and chosen == LOCAL and not has_fused_gradients():
        raise UserError(
            "--gradient-accumulation-fusion needs Transformer Engine, or apex with its CUDA extensions: "
            f"{remedy}, and apex's fused_weight_gradient_mlp_cuda cannot be used; leave it out"
        )
    _say_once(chosen, "" if asked == chosen else reason)
    return chosen


def _check_attention(
    precision: PrecisionConfig, parallel: ParallelConfig, chosen: Implementation, remedy: str
) -> None:
    attention = attention_backend(precision.attention_backend, te_layers=chosen == TRANSFORMER_ENGINE)
    torchs = chosen == LOCAL or attention is AttnBackend.local
    if (ranks := parallel.context_parallel_size) > 1 and torchs:
        why = "not --attention-backend local" if chosen == TRANSFORMER_ENGINE else remedy
        raise UserError(
            f"--context-parallel-size {ranks} needs Transformer Engine's attention: {why}; for long "
            "sequences without it use --tensor-model-parallel-size with --sequence-parallel"
        )
    if chosen == LOCAL and attention not in (AttnBackend.auto, AttnBackend.local):
        raise UserError(
            f"--attention-backend {attention.name} needs Transformer Engine's layers: {remedy}; leave it "
            "out, and torch chooses its fastest attention"
        )


@functools.cache
def why_no_transformer_engine() -> str | None:
    """What is in the way of Transformer Engine, in words; None where it can be imported."""
    if not _is_installed():
        return "Transformer Engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except BROKEN as error:  # wants CUDA's libraries; without a GPU it is not even tried
        if not device.has_gpu():
            return _NO_GPU
        return f"Transformer Engine is installed and cannot be imported ({error})"
    if not is_te_min_version(_OLDEST):
        return f"Transformer Engine is older than {_OLDEST}"
    return None


def _with_remedy(missing: str) -> str:
    if not _is_installed():
        return f"{missing} ({_INSTALL})"
    return f"{missing} ({_REINSTALL})" if device.has_gpu() else missing


def _is_installed() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def has_fused_gradients() -> bool:
    """Whether Megatron's own linear layers can fuse their gradients: with apex's extension, on a GPU."""
    return device.has_gpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def has_fused_norms() -> bool:
    """Whether local layers take apex's norms: its kernels are there, and a GPU to run them."""
    return device.has_gpu() and fused_layer_norm.HAVE_FUSED_LAYER_NORM


def parts(chosen: Implementation, reason: str = "") -> dict[str, str]:
    """What computes layers, memory and the optimizer's step in this process, in words.

    Args:
        reason: why the layers are not others.
    """
    from megatron.core.optimizer import Adam  # Transformer Engine's, apex's or torch's

    local = "torch's attention, apex's norms" if has_fused_norms() else "torch's attention and norms"
    why = f" ({reason})" if chosen == LOCAL and reason else ""
    no_kernels = kernels.why_unavailable()
    return {
        "layers": "Transformer Engine's" if chosen == TRANSFORMER_ENGINE else local + why,
        "memory": f"torch's operations ({no_kernels})" if no_kernels else "Triton kernels",
        "optimizer": f"{Adam.__name__} of {Adam.__module__.split('.')[0]}",
    }


@functools.cache
def _say_once(chosen: Implementation, reason: str) -> None:
    if is_rank_zero():
        logger.info("; ".join(f"{part}: {words}" for part, words in parts(chosen, reason).items()))
