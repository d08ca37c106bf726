"""What a chunk costs: FLOPs of its forward and backward on one tensor-parallel rank."""

from typing import NamedTuple

from megatron_mesh.config.derived import layout, padded_vocab_size, tokens_of_rank
from megatron_mesh.config.schema import Config, ModelConfig, TrainingConfig
from megatron_mesh.model.flops import forward_flops_per_token
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.recurrence import SCHEMES


class Cost(NamedTuple):
    """Forward and backward of a chunk for one micro-batch."""

    forward: float
    backward: float


def chunk_costs(config: Config, pipeline: Pipeline) -> list[list[Cost]]:
    """FLOPs [rank][chunk] of one tensor-parallel rank for one micro-batch.

    The backward is twice the forward, and what is recomputed comes on top. Counted are layers, output
    projection (with the loss) and the recurrence, each as in ``model.flops``.
    """
    return [[_cost(config, chunk) for chunk in chunks] for chunks in pipeline.chunks]


def _cost(config: Config, chunk: Chunk) -> Cost:
    model, training = config.model, config.training
    tokens = tokens_of_rank(config) / config.parallel.tensor_model_parallel_size
    forward = chunk.layers * layer_flops(model) + sum(enter_flops(model, v) for v in chunk.enters)
    if chunk.head:
        forward += head_flops(model)
    again = redone_layers(training, chunk) * layer_flops(model)
    again += chunk.layers * _selective_flops(config)
    return Cost(tokens * forward, tokens * (2 * forward + again))


def head_flops(model: ModelConfig) -> float:
    """Output projection, per token."""
    return 2.0 * model.hidden_size * padded_vocab_size(model)


def enter_flops(model: ModelConfig, index: int) -> float:
    """What the recurrence computes at the start of pass ``index`` = 0..K+1, per token."""
    return SCHEMES[model.recurrence].enter_flops(index, model.hidden_size, model.mesh_slots or 0)


def layer_flops(model: ModelConfig) -> float:
    """One layer, per token."""
    layers, scheme = layout(model), SCHEMES[model.recurrence]
    own = scheme.forward_flops(model.hidden_size, layers.loops, model.mesh_slots or 0)
    return (forward_flops_per_token(model) - head_flops(model) - own) / layers.depth


def redone_layers(training: TrainingConfig, chunk: Chunk) -> int:
    """Layers of a chunk that full recomputation runs again."""
    if training.recompute_granularity != "full":
        return 0
    if training.recompute_method == "block":
        return sum(min(training.recompute_num_layers or 1, section) for section in chunk.sections)
    return chunk.layers


def _selective_flops(config: Config) -> float:
    """What selective recomputation runs again in a layer, per token."""
    model, modules = config.model, config.training.recompute_modules or []
    attention = 2.0 * model.seq_length * model.hidden_size  # scores and weighted values, causal
    mlp = 4.0 * model.hidden_size * (model.ffn_hidden_size or 4 * model.hidden_size)
    return ("core_attn" in modules) * attention + ("mlp" in modules) * mlp
