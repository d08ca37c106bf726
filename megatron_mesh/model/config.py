"""From our settings to Megatron-core's ``TransformerConfig``, which every module of the model reads."""

from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mesh.config.derived import layout
from megatron_mesh.config.layers import LayerLayout
from megatron_mesh.config.placement import virtual_stages
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.model.implementation import LOCAL, Implementation
from megatron_mesh.model.precision import precision_settings
from megatron_mesh.recurrence import SCHEMES, RecurrenceOptions


@dataclass
class MeshTransformerConfig(TransformerConfig):
    """Megatron-core's configuration plus the loop. ``num_layers`` is the unrolled depth."""

    recurrence: str = "base"
    """Name of the scheme in ``megatron_mesh.recurrence.SCHEMES``."""
    layout: LayerLayout = field(default_factory=lambda: LayerLayout(0, 1, 1, 0))
    """Layers of prelude, core and coda, and the number of loops."""
    recurrence_options: RecurrenceOptions = field(default_factory=RecurrenceOptions)
    """Settings of the memory."""
    embedding_scale: float = 1.0
    """Factor on the token embedding before the first layer."""
    fp8_scope: str = "core"
    """Layers in FP8, if any: ``core`` or ``all`` (see ``precision.py``)."""
    fuse_layer_gradients: bool = False
    """``gradient_accumulation_fusion`` of Transformer Engine's layers, which do not need apex for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.num_layers == self.layout.depth, (self.num_layers, self.layout)
        if self.cpu_offloading or self.fine_grained_activation_offloading:
            raise UserError(
                "offloading of activations counts on each layer running once per micro-batch, and the "
                "core runs several times; use --recompute-granularity instead"
            )


def transformer_config(config: Config, implementation: Implementation = LOCAL) -> MeshTransformerConfig:
    """The configuration of the model of a resolved run.

    Args:
        implementation: of the layers (``implementation.choose``); with local ones FP8 is left out, so
            that models can be counted anywhere.

    The options that are off have a reason: fused bias + GELU is the tanh approximation, and NeoX has
    the exact one; the other fusions need kernels of apex or compile for seconds on a CPU.
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
        # For a looped model below: Megatron's checks would have the unrolled depth in equal parts.
        pipeline_model_parallel_size=1 if looped else parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=None if looped else virtual,
        # Sends and receives that are batched pair up crosswise where the next rank is the previous one too.
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
    """Settings of the memory; the defaults where the scheme has none."""
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
    """Megatron's layers call this when they are built; ``init.py`` sets every value afterwards.

    ``perform_initialization=False`` would be no way to that end: on a GPU, embedding and head are then not
    marked as tensor-parallel either, so ranks would draw equal parts and the norm of gradients miss some.
    """
    return weight
