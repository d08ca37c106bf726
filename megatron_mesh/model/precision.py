"""Which layers compute in FP8, and how their weights are cast.

A layer in FP8 whose weights are kept in bfloat16 needs them in FP8 in every pass. Three ways:

- tensorwise: cast at the start of a step, kept, and reused by every pass and micro-batch (``te_layers.py``);
- ``fp8_param_gather``: the weights are in FP8, and there is nothing to cast;
- blockwise and delayed: cast in every pass. Transformer Engine (2.11) does not notice that a kept blockwise
  cast from an evaluation lacks what training needs (its issue 2852 sees other losses with kept casts too),
  and with delayed the cast belongs to the history of every pass.

Routers and memory are torch's modules outside of all sections, so they never see an FP8 context.
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
    """What ``TransformerConfig`` takes of the implementation and the precision settings of a resolved run."""
    precision = config.precision
    fuse = precision.gradient_accumulation_fusion
    settings: dict[str, Any] = {
        "transformer_impl": implementation,
        "attention_backend": attention_backend(
            precision.attention_backend, te_layers=implementation != LOCAL
        ),
        # Transformer Engine's modules would stay on the CPU; local ones are built inside a device context.
        "use_cpu_initialization": implementation == LOCAL,
        "gradient_accumulation_fusion": fuse and has_fused_gradients(),
        "fuse_layer_gradients": fuse,
    }
    if implementation == LOCAL:
        return settings
    settings["disable_parameter_transpose_cache"] = not _casts_are_kept(precision)
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
        settings["fp8_amax_history_len"] = precision.fp8_amax_history_len * _regions(config)
        settings["fp8_amax_compute_algo"] = precision.fp8_amax_compute_algo
    return settings


def section_config(config: Any, name: Name, held: range, total: int) -> Any:
    """The copy of the model's configuration that a section reads.

    Args:
        held: numbers of the layers held here, from 0 within the ``total`` of the section.
    """
    config = copy.copy(config)
    if config.fp8_scope == "core" and name != "core":
        config.fp8, config.fp8_param = None, False
    if not config.fp8:
        config.disable_parameter_transpose_cache = True
    # Megatron (fp8_utils.is_first_last_bf16_layer) counts the last layers back from num_layers, which a
    # Section sets to what it holds, while it numbers its layers within the whole section.
    if config.first_last_layers_bf16:
        at_end = config.num_layers_at_end_in_bf16 if name == "coda" else 0
        if name != "prelude":
            config.num_layers_at_start_in_bf16 = 0
        config.num_layers_at_end_in_bf16 = len(held) - total + at_end
    return config


def _casts_are_kept(precision: PrecisionConfig) -> bool:
    return (
        bool(precision.fp8_format) and precision.fp8_recipe == "tensorwise" and not precision.fp8_param_gather
    )


def _regions(config: Config) -> int:
    """FP8 contexts that a micro-batch passes.

    At the end of each, Transformer Engine moves the histories of *all* modules on by a row
    (``FP8GlobalStateManager.autocast_exit``), whether they ran in it or not. So a history of a number of
    micro-batches has this many rows for each, and its largest value covers every pass.
    """
    loops = layout(config.model).loops
    if not SCHEMES[config.model.recurrence].has_loop:
        return 1
    return loops if config.precision.fp8_scope == "core" else loops + 2
