"""Decide which layers compute in FP8, and how their weights are cast.

A layer that computes in FP8 with bfloat16 weights needs them in FP8 in every pass. There are three ways:

- Tensorwise: weights are cast once at the start of a step. The cast is cached and reused by every pass and
  micro-batch (``te_layers.py``).
- ``fp8_param_gather``: weights are stored in FP8, so there is nothing to cast.
- Blockwise and delayed: weights are cast in every pass. A blockwise cast that was cached in an evaluation
  lacks what training needs, and Transformer Engine 2.11 doesn't notice (its issue 2852 also reports different
  losses with cached casts). With delayed scaling, each pass's cast adds to the amax history.

Routers and memory are torch modules outside of all sections, so they never run in an FP8 context.
"""

import copy
from typing import Any, Literal

from megatron_mesh.config.derived import layout
from megatron_mesh.config.schema import Config, PrecisionConfig
from megatron_mesh.model.attention import attention_backend
from megatron_mesh.model.implementation import LOCAL, Implementation, has_fused_gradients
from megatron_mesh.recurrence import SCHEMES

Name = Literal["prelude", "core", "coda"]


def precision_settings(config: Config, implementation: Implementation) -> dict[str, Any]:
    """Return the ``TransformerConfig`` settings that depend on the implementation or on precision."""
    precision = config.precision
    fuse = precision.gradient_accumulation_fusion
    settings: dict[str, Any] = {
        "transformer_impl": implementation,
        "attention_backend": attention_backend(
            precision.attention_backend, te_layers=implementation != LOCAL
        ),
        # True would leave Transformer Engine's modules on the CPU. Local ones are built in a device context.
        "use_cpu_initialization": implementation == LOCAL,
        "gradient_accumulation_fusion": fuse and has_fused_gradients(),
        "fuse_layer_gradients": fuse,
    }
    if implementation == LOCAL:
        return settings
    settings["disable_parameter_transpose_cache"] = not _caches_casts(precision)
    if precision.fp8_format is None:
        return settings
    settings |= {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_scope": precision.fp8_scope,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": precision.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": precision.num_layers_at_start_in_bf16 or 0,
        "num_layers_at_end_in_bf16": precision.num_layers_at_end_in_bf16 or 0,
    }
    if precision.fp8_recipe == "delayed":
        assert precision.fp8_amax_history_len is not None, "resolve() fills it in"
        settings["fp8_amax_history_len"] = precision.fp8_amax_history_len * _fp8_contexts(config)
        settings["fp8_amax_compute_algo"] = precision.fp8_amax_compute_algo
    return settings


def section_config(config: Any, name: Name, held: range, total: int) -> Any:
    """Return the copy of the model's configuration that a section uses.

    Args:
        held: the layers that this rank holds, numbered from 0 within the section.
        total: the number of layers in the whole section.
    """
    config = copy.copy(config)
    if config.fp8_scope == "core" and name != "core":
        config.fp8, config.fp8_param = None, False
    if not config.fp8:
        config.disable_parameter_transpose_cache = True
    # Megatron (fp8_utils.is_first_last_bf16_layer) counts the last layers backwards from num_layers. In a
    # Section that is the number of layers held here, but layer numbers refer to the whole section.
    if config.first_last_layers_bf16:
        at_end = config.num_layers_at_end_in_bf16 if name == "coda" else 0
        if name != "prelude":
            config.num_layers_at_start_in_bf16 = 0
        config.num_layers_at_end_in_bf16 = len(held) - total + at_end
    return config


def _caches_casts(precision: PrecisionConfig) -> bool:
    return (
        bool(precision.fp8_format) and precision.fp8_recipe == "tensorwise" and not precision.fp8_param_gather
    )


def _fp8_contexts(config: Config) -> int:
    """Return the number of FP8 contexts that a micro-batch goes through.

    At the end of each context, Transformer Engine shifts the amax histories of *all* modules by one row
    (``FP8GlobalStateManager.autocast_exit``), including modules that didn't run. With this many rows per
    micro-batch, the maximum over the history covers every pass.
    """
    loops = layout(config.model).loops
    if not SCHEMES[config.model.recurrence].has_loop:
        return 1
    return loops if config.precision.fp8_scope == "core" else loops + 2
