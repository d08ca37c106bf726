"""Apply the formulas of ``config/sizes.py`` to a pipeline: parameters of its ranks and FLOPs of its chunks.

Where a rank is named, the numbers are those of each of its tensor-parallel ranks.
"""

from typing import NamedTuple

from megatron_mesh.config import sizes
from megatron_mesh.config.derived import tokens_of_rank
from megatron_mesh.config.schema import Config, TrainingConfig
from megatron_mesh.planner.stages import Chunk, Pipeline


class Cost(NamedTuple):
    """Forward and backward of a chunk for one micro-batch, in FLOPs or in seconds."""

    forward: float
    backward: float


def rank_parameters(config: Config, pipeline: Pipeline, rank: int) -> int:
    """Parameters of pipeline rank ``rank``."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    chunks = pipeline.chunks[rank]
    first, last = any(chunk.embedding for chunk in chunks), any(chunk.head for chunk in chunks)
    # A rank with both ends holds a tied embedding once. In a pipeline each end holds a copy.
    tables = first + last if model.untie_embeddings_and_output_weights else int(first or last)
    return (
        pipeline.layers[rank] * sizes.layer_parameters(model, tp)
        + tables * sizes.embedding_parameters(model, tp)
        + last * sizes.final_norm_parameters(model)
        + rank_scheme_parameters(config, pipeline, rank)
    )


def replicated_parameters(config: Config, pipeline: Pipeline, rank: int) -> int:
    """Parameters of pipeline rank ``rank`` that every tensor-parallel rank holds in full."""
    model = config.model
    final_norm = sizes.final_norm_parameters(model) * any(chunk.head for chunk in pipeline.chunks[rank])
    layers = pipeline.layers[rank] * sizes.replicated_layer_parameters(model)
    return layers + final_norm + rank_scheme_parameters(config, pipeline, rank)


def rank_scheme_parameters(config: Config, pipeline: Pipeline, rank: int) -> int:
    """Parameters of the recurrence, if this pipeline rank runs it."""
    runs_it = any(chunk.enters for chunk in pipeline.chunks[rank])
    return sizes.scheme_parameters(config.model) if runs_it else 0


def holds_tied_copy(config: Config, pipeline: Pipeline, rank: int) -> bool:
    """Whether the rank holds one of the two copies of a tied embedding, which a pipeline has on its ends."""
    is_end = pipeline.ranks > 1 and rank in (0, pipeline.ranks - 1)
    return is_end and not config.model.untie_embeddings_and_output_weights


def chunk_costs(config: Config, pipeline: Pipeline) -> list[list[Cost]]:
    """FLOPs [rank][chunk] of one tensor-parallel rank for one micro-batch.

    Layers, output projection and recurrence count. The backward costs two forwards plus what is recomputed.
    """
    return [[_chunk_cost(config, chunk) for chunk in chunks] for chunks in pipeline.chunks]


def _chunk_cost(config: Config, chunk: Chunk) -> Cost:
    model, training = config.model, config.training
    tokens = tokens_of_rank(config) / config.parallel.tensor_model_parallel_size
    layer = sizes.layer_flops(model)
    forward = chunk.layers * layer + sum(sizes.enter_flops(model, v) for v in chunk.enters)
    if chunk.head:
        forward += sizes.head_flops(model)
    recomputed = recomputed_layers(training, chunk) * layer + chunk.layers * _selective_flops(config)
    return Cost(tokens * forward, tokens * (2 * forward + recomputed))


def recomputed_layers(training: TrainingConfig, chunk: Chunk) -> int:
    """Layers of a chunk that full recomputation runs a second time."""
    if training.recompute_granularity != "full":
        return 0
    if training.recompute_method == "block":
        return sum(min(training.recompute_num_layers or 1, section) for section in chunk.sections)
    return chunk.layers


def _selective_flops(config: Config) -> float:
    """FLOPs per token of one layer that selective recomputation repeats."""
    modules = config.training.recompute_modules or []
    attention, mlp = sizes.attention_flops(config.model), sizes.mlp_flops(config.model)
    return ("core_attn" in modules) * attention + ("mlp" in modules) * mlp
