"""Parameters of a rank, by formula: what is sharded over tensor-parallel ranks, and what is not."""

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.planner.stages import Pipeline
from megatron_mesh.recurrence import SCHEMES


def rank_parameters(config: Config, pipeline: Pipeline, rank: int) -> int:
    """Parameters on one tensor-parallel rank of pipeline rank ``rank``."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    chunks = pipeline.chunks[rank]
    first, last = any(chunk.embedding for chunk in chunks), any(chunk.head for chunk in chunks)
    # A tied embedding is there once on a rank that has both ends, and on both ends of a pipeline.
    tables = first + last if model.untie_embeddings_and_output_weights else int(first or last)
    return (
        pipeline.layers[rank] * layer_parameters(model, tp)
        + tables * embedding_parameters(config)
        + last * 2 * model.hidden_size
        + own_parameters(config, pipeline, rank)
    )


def layer_parameters(model: ModelConfig, tp: int) -> int:
    """One layer on one tensor-parallel rank; 12 H^2 + 13 H at ``tp`` = 1 and an MLP of width 4H."""
    h, ffn = model.hidden_size, model.ffn_hidden_size or 4 * model.hidden_size
    sharded = 4 * h * h + 3 * h + 2 * h * ffn + ffn
    return sharded // tp + replicated_in_layer(model)


def replicated_in_layer(model: ModelConfig) -> int:
    """Two norms, and the biases of the two row-parallel maps: whole on every tensor-parallel rank."""
    return 6 * model.hidden_size


def replicated_parameters(config: Config, pipeline: Pipeline, rank: int) -> int:
    """Parameters of pipeline rank ``rank`` that each of its tensor-parallel ranks holds whole."""
    model = config.model
    final_norm = 2 * model.hidden_size * any(chunk.head for chunk in pipeline.chunks[rank])
    layers = pipeline.layers[rank] * replicated_in_layer(model)
    return layers + final_norm + own_parameters(config, pipeline, rank)


def embedding_parameters(config: Config) -> int:
    """Embedding, or output projection, on one tensor-parallel rank."""
    rows = padded_vocab_size(config.model) // config.parallel.tensor_model_parallel_size
    return rows * config.model.hidden_size


def own_parameters(config: Config, pipeline: Pipeline, rank: int) -> int:
    """What the scheme adds, on the rank where the recurrence is; not sharded."""
    if not any(chunk.enters for chunk in pipeline.chunks[rank]):
        return 0
    model = config.model
    loops = layout(model).loops
    return SCHEMES[model.recurrence].num_parameters(model.hidden_size, loops, model.mesh_slots or 0)


def tied_over_pipeline(config: Config, pipeline: Pipeline, rank: int) -> bool:
    """Whether the rank has one of two copies of a tied embedding."""
    ends = pipeline.ranks > 1 and rank in (0, pipeline.ranks - 1)
    return ends and not config.model.untie_embeddings_and_output_weights
