"""Translate our settings into Megatron-core's ``TransformerConfig``, which all modules of the model read."""

from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mesh.config.derived import layout
from megatron_mesh.config.layout import LayerLayout
from megatron_mesh.config.placement import virtual_stages
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.model.implementation import LOCAL, Implementation
from megatron_mesh.model.precision import precision_settings
from megatron_mesh.recurrence import SCHEMES, RecurrenceOptions


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
    """Layers that run in FP8, if any: ``core`` or ``all`` (see ``precision.py``)."""
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
        # A looped model's values are set below, because Megatron would check that the unrolled depth divides.
        pipeline_model_parallel_size=1 if looped else parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=None if looped else virtual,
        # With two pipeline ranks, the next is also the previous one, and batched messages would be swapped.
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
    """Collect the settings of the memory, with the defaults for unset ones."""
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
    """Initialize nothing. Megatron calls this when it builds a layer; ``init.py`` sets the values afterwards.

    ``perform_initialization=False`` is no alternative. On a GPU it also leaves embedding and head without
    their tensor-parallel attributes, so all ranks would draw the same shard and the gradient norm would be
    wrong.
    """
    return weight
