"""Translate our settings into Megatron-core's ``TransformerConfig``, which all modules of the model read.

``precision_settings`` and ``section_config`` decide which layers compute in FP8, and ``_caches_casts`` says
how their weights are cast. Routers and memory are torch modules outside of all sections, so they never run in
an FP8 context.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mesh.config.layout import LayerLayout, layout
from megatron_mesh.config.placement import virtual_stages
from megatron_mesh.config.schema import Config, ModelConfig, PrecisionConfig
from megatron_mesh.errors import UserError
from megatron_mesh.model.implementation import LOCAL, Implementation, attention_backend, has_fused_gradients
from megatron_mesh.recurrence import SCHEMES, RecurrenceOptions

Name = Literal["prelude", "core", "coda"]


@dataclass
class MeshTransformerConfig(TransformerConfig):
    """Megatron-core's configuration plus the settings of the loop. ``num_layers`` is the unrolled depth."""

    recurrence: str = "base"
    """Name of the recurrence scheme in ``megatron_mesh.recurrence.SCHEMES``."""
    layout: LayerLayout = field(default_factory=lambda: LayerLayout(0, 1, 1, 0))
    """Number of layers in prelude, core and coda, and number of loops."""
    recurrence_options: RecurrenceOptions = field(default_factory=RecurrenceOptions)
    """Settings of the memory."""
    embedding_scale: float = 1.0
    """Factor applied to the token embedding before the first layer."""
    fp8_scope: str = "core"
    """Layers that run in FP8 if FP8 is on: ``core`` or ``all``."""
    fuse_layer_gradients: bool = False
    """``gradient_accumulation_fusion`` for Transformer Engine's layers, which don't need apex for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.num_layers == self.layout.depth, (self.num_layers, self.layout)
        if self.cpu_offloading or self.fine_grained_activation_offloading:
            raise UserError(
                "activation offloading requires that each layer runs once per micro-batch, but the core runs "
                "several times; use --recompute-granularity instead"
            )


def transformer_config(config: Config, implementation: Implementation = LOCAL) -> MeshTransformerConfig:
    """Build the model configuration of a resolved run.

    Fused bias + GELU is off because it is the tanh approximation, while GPT-NeoX uses the exact GELU. The
    other fusions are off because they need apex's kernels or take seconds to compile on a CPU.

    Args:
        implementation: of the layers, from ``implementation.choose``. Local layers ignore the FP8 settings,
            so that an FP8 model can be counted on any machine.
    """
    model, training, parallel = config.model, config.training, config.parallel
    layers = layout(model)
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    virtual = virtual_stages(model, parallel)
    looped = SCHEMES[model.recurrence].has_loop
    built = MeshTransformerConfig(
        recurrence=model.recurrence,
        layout=layers,
        recurrence_options=recurrence_options(model),
        embedding_scale=model.hidden_size**0.5 if model.scale_embeddings else 1.0,
        num_layers=layers.depth,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_method_std,
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=training.bf16,
        calculate_per_token_loss=True,
        recompute_granularity=training.recompute_granularity,
        recompute_method=training.recompute_method,
        recompute_num_layers=training.recompute_num_layers,
        recompute_modules=training.recompute_modules,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        # Set below for a looped model, because Megatron would check that its unrolled depth divides evenly.
        pipeline_model_parallel_size=1 if looped else parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=None if looped else virtual,
        # With two pipeline ranks, the next rank is also the previous one, and batching would swap the
        # messages.
        batch_p2p_comm=False,
        overlap_p2p_comm=parallel.overlap_p2p_communication and virtual is not None,
        deterministic_mode=training.deterministic_mode,
        **precision_settings(config, implementation),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
    )
    built.pipeline_model_parallel_size = parallel.pipeline_model_parallel_size
    built.virtual_pipeline_model_parallel_size = virtual
    return built


def recurrence_options(model: ModelConfig) -> RecurrenceOptions:
    """Collect the settings of the memory; unset ones get their defaults."""
    options = RecurrenceOptions(
        transition_query=model.mesh_transition_query,
        memory=model.mesh_memory,
        router_bias_init=model.router_bias_init,
        router_init_std=model.init_method_std if model.router_init_std is None else model.router_init_std,
    )
    if model.mesh_slots is None:
        return options
    return RecurrenceOptions(**{**vars(options), "slots": model.mesh_slots})


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    """Leave ``weight`` as it is. Megatron calls this as a layer's initialization; ``build.py`` draws later.

    ``perform_initialization=False`` is no alternative. On a GPU it also leaves embedding and head without
    their tensor-parallel attributes. All ranks would then draw the same shard, and the gradient norm would be
    wrong.
    """
    return weight


def precision_settings(config: Config, implementation: Implementation) -> dict[str, Any]:
    """Return the ``TransformerConfig`` settings that depend on the implementation or on precision."""
    precision = config.precision
    fuse = precision.gradient_accumulation_fusion
    settings: dict[str, Any] = {
        "transformer_impl": implementation,
        "attention_backend": attention_backend(
            precision.attention_backend, te_layers=implementation != LOCAL
        ),
        # True would leave Transformer Engine's modules on the CPU. build_model puts local ones on the device.
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


def _caches_casts(precision: PrecisionConfig) -> bool:
    """Whether weights are cast to FP8 once per step, for all passes and micro-batches.

    A layer that computes in FP8 needs its weights in FP8 in every pass. There are three ways:

    - Tensorwise: weights are cast at the start of a step, and the cast is cached (``layers_te.py``).
    - ``fp8_param_gather``: weights are stored in FP8, so there is nothing to cast.
    - Blockwise and delayed: weights are cast in every pass. A blockwise cast that was cached in an evaluation
      lacks what training needs, and Transformer Engine 2.11 doesn't notice (its issue 2852 also reports
      different losses with cached casts). With delayed scaling, each pass's cast adds to the amax history.
    """
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
    # Megatron (fp8_utils.is_first_last_bf16_layer) counts the last layers backwards from num_layers. A
    # Section sets num_layers to the layers held here, but numbers them as in the whole section. Correct for
    # that.
    if config.first_last_layers_bf16:
        at_end = config.num_layers_at_end_in_bf16 if name == "coda" else 0
        if name != "prelude":
            config.num_layers_at_start_in_bf16 = 0
        config.num_layers_at_end_in_bf16 = len(held) - total + at_end
    return config
