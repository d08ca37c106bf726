"""Reconcile ``--attention-backend`` with the environment variables that Transformer Engine reads.

Megatron-core turns the setting into three variables (``language_module.py: _set_attention_backend``) and
asserts that none of them has another value. So we read what the user has set, unset the variables, and
derive the setting from them if it is ``auto``.

Find out whether Transformer Engine can be used in this process.

Choose the implementation of the layers, Transformer Engine's or local modules, and log the choice.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Literal

from megatron.core.fusions import fused_layer_norm
from megatron.core.transformer.enums import AttnBackend
from megatron.core.utils import is_te_min_version

from megatron_mesh import kernels
from megatron_mesh.compat.imports import BROKEN
from megatron_mesh.compat.megatron_model import ATTENTION_SWITCHES, clear_attention_switches
from megatron_mesh.config.schema import ParallelConfig, PrecisionConfig
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import device
from megatron_mesh.runtime.distributed import is_rank_zero

logger = logging.getLogger(__name__)

_BACKENDS = {
    ("1", "1", "1"): "auto",
    ("1", "1", "0"): "auto",  # auto uses unfused attention only if there is nothing else
    ("1", "0", "1"): "flash",
    ("0", "1", "1"): "fused",
    ("1", "0", "0"): "flash",
    ("0", "1", "0"): "fused",
    ("0", "0", "1"): "unfused",
    ("0", "0", "0"): "local",
}
# Read at import, because every model that is built sets them anew.
_SET_BY_USER = {name: os.environ[name] for name in ATTENTION_SWITCHES if name in os.environ}


def attention_backend(
    setting: str, *, te_layers: bool, variables: Mapping[str, str] = _SET_BY_USER
) -> AttnBackend:
    """Return the next model's attention backend, and unset the variables for Megatron-core to set.

    Args:
        setting: ``attention_backend`` from the settings.
        te_layers: whether the layers are Transformer Engine's. The variables don't affect others.
        variables: Transformer Engine's variables as set by the user; missing ones count as 1.

    Raises:
        UserError: a variable that takes effect is neither 0 nor 1.
    """
    clear_attention_switches()
    if not variables:
        return AttnBackend[setting]
    found = ", ".join(f"{name}={value}" for name, value in variables.items())
    if not te_layers:
        _warn_once(f"ignoring {found} from the environment, because the layers are not Transformer Engine's")
        return AttnBackend[setting]
    implied = _BACKENDS.get(tuple(variables.get(name, "1") for name in ATTENTION_SWITCHES))  # type: ignore[arg-type]
    if setting != "auto":
        if implied != setting:
            _warn_once(f"ignoring {found} from the environment, because --attention-backend is {setting}")
        return AttnBackend[setting]
    if implied is None:
        raise UserError(f"{found} in the environment: each must be 0 or 1; correct or unset it")
    _warn_once(f"{found} in the environment: using --attention-backend {implied}")
    return AttnBackend[implied]


@functools.cache
def _warn_once(text: str) -> None:
    if is_rank_zero():
        logger.warning(text)


NO_GPU = "there is no GPU"
_OLDEST = "2.9"  # the lower bound in megatron-core 0.16.1's own extra


@functools.cache
def why_no_transformer_engine() -> str | None:
    """Return why Transformer Engine cannot be used, or None if it can be imported."""
    if not is_installed():
        return "Transformer Engine is not installed"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except BROKEN as error:  # typically CUDA's libraries are missing
        if not device.has_gpu():
            return NO_GPU
        return f"Transformer Engine is installed but cannot be imported ({error})"
    if not is_te_min_version(_OLDEST):
        return f"Transformer Engine is older than {_OLDEST}"
    return None


def is_installed() -> bool:
    """Whether the package is there, working or not."""
    return importlib.util.find_spec("transformer_engine") is not None


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


def describe_implementation(chosen: Implementation, reason: str = "") -> dict[str, str]:
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
        logger.info(
            "; ".join(f"{part}: {text}" for part, text in describe_implementation(chosen, reason).items())
        )
