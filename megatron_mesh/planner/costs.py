"""Apply the formulas of ``config/sizes.py`` to a pipeline: parameters of its ranks and FLOPs of its chunks.

Where a rank is named, the numbers are those of each of its tensor-parallel ranks.

Bytes that a rank sends in a step, by kind.

Collectives are counted as ring algorithms. For a tensor of n bytes in a group of g ranks, an all-gather (of n
bytes in all) or a reduce-scatter makes every rank send n (g-1)/g bytes, and an all-reduce twice that.
"""

from dataclasses import dataclass
from typing import NamedTuple

from megatron_mesh.config import sizes
from megatron_mesh.config.layout import tokens_of_rank
from megatron_mesh.config.schema import Config, TrainingConfig
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.recurrence import SCHEMES


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


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank in one step."""

    p2p_forward: int
    """States to the next pipeline rank: S*B*H elements (S/TP with sequence parallelism) per pass."""
    p2p_backward: int
    """Their gradients to the previous pipeline rank."""
    tensor: int
    """In the tensor-parallel group: around layers, embedding, loss and memory, and gradients of norms."""
    context: int
    """In the context-parallel group: keys and values, and their gradients."""
    gradients: int
    """In the data-parallel group: all-reduce, or reduce-scatter with the distributed optimizer."""
    parameters: int
    """In the data-parallel group: all-gather of the parameters that the distributed optimizer updated."""
    ties: int
    """Gradients summed over copies of a weight on several pipeline ranks, such as a tied embedding."""

    @property
    def total(self) -> int:
        """The sum of all kinds."""
        return sum(vars(self).values())


def rank_traffic(config: Config, pipeline: Pipeline, rank: int, replicas: int) -> Traffic:
    """Bytes that each tensor-parallel rank of pipeline rank ``rank`` sends.

    Args:
        replicas: ranks with the same weights.
    """
    chunks, last = pipeline.chunks[rank], pipeline.ranks - 1
    message = message_bytes(config) if last else 0
    forwards = len(chunks) - (rank == last)  # the network's last chunk sends nothing forward,
    backwards = len(chunks) - (rank == 0)  # and its first chunk nothing backward
    per_micro_batch = sum(sum(tensor_parallel_bytes(config, chunk)) for chunk in chunks)
    gradients, parameters = data_parallel_bytes(config, pipeline, rank, replicas)
    tied = 0
    if holds_tied_copy(config, pipeline, rank):  # an all-reduce over two ranks sends the tensor once
        tp = config.parallel.tensor_model_parallel_size
        tied = sizes.embedding_parameters(config.model, tp) * sizes.GRADIENT_BYTES
    return Traffic(
        p2p_forward=pipeline.micro_batches * forwards * message,
        p2p_backward=pipeline.micro_batches * backwards * message,
        tensor=round(pipeline.micro_batches * per_micro_batch + _summed_gradients(config, pipeline, rank)),
        context=pipeline.micro_batches * sum(context_parallel_bytes(config, chunk) for chunk in chunks),
        gradients=round(gradients),
        parameters=round(parameters),
        ties=tied,
    )


def message_bytes(config: Config) -> int:
    """Bytes that one pipeline rank sends to the next for one micro-batch."""
    return sizes.state_shard_bytes(config)


def tensor_parallel_bytes(config: Config, chunk: Chunk) -> tuple[float, float]:
    """Bytes sent in a chunk's forward and backward for one micro-batch.

    The unit is the all-gather of a state. Without sequence parallelism a layer has two all-reduces (2 units
    each) in the forward and two in the backward. With it a layer has two all-gathers and two reduce-scatters
    in the forward and the same in the backward, plus two all-gathers of inputs that were stored as shards
    (Megatron-core's ``tensor_parallel/layers.py``).
    """
    parallel, training = config.parallel, config.training
    tp, sharded = parallel.tensor_model_parallel_size, parallel.sequence_parallel
    recomputed = recomputed_layers(training, chunk)
    recomputed_mlps = chunk.layers if "mlp" in (training.recompute_modules or []) else 0
    forward, backward = 4.0 * chunk.layers, (6.0 if sharded else 4.0) * chunk.layers
    backward += 4 * recomputed + 2 * recomputed_mlps
    if chunk.embedding:
        forward += 1 if sharded else 2
        backward += 1 if sharded else 0
    if chunk.head:
        forward += 1 if sharded else 0
        backward += 2
    if scatters_memory(config):
        forward += len(chunk.enters)  # gathers the state that the recurrence made,
        backward += len(chunk.enters)  # and the gradient of the state that it received
    unit = sizes.state_bytes(config) * (tp - 1) / tp
    losses = 3 * 2 * tokens_of_rank(config) * 4 * (tp - 1) / tp
    return forward * unit + chunk.head * losses, backward * unit


def context_parallel_bytes(config: Config, chunk: Chunk) -> int:
    """Bytes sent by a chunk's ring attention for one micro-batch.

    Keys and values circulate in the forward, in the backward and when a layer is recomputed; their gradients
    circulate once.
    """
    parallel = config.parallel
    rounds = 3 * chunk.layers + recomputed_layers(config.training, chunk)
    keys_and_values = 2 * sizes.state_bytes(config) // parallel.tensor_model_parallel_size
    return rounds * (parallel.context_parallel_size - 1) * keys_and_values


def scatters_memory(config: Config) -> bool:
    """Whether the block scatters the memory's inputs along the sequence itself (see ``model/block.py``).

    It does under tensor parallelism without sequence parallelism, if the scheme shards states.
    """
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size > 1
        and not parallel.sequence_parallel
        and SCHEMES[config.model.recurrence].shards_states
    )


def data_parallel_bytes(config: Config, pipeline: Pipeline, rank: int, replicas: int) -> tuple[float, float]:
    """Bytes sent for gradients and for parameters."""
    share = rank_parameters(config, pipeline, rank) * (replicas - 1) / replicas
    if not config.parallel.use_distributed_optimizer:
        return 2 * share * sizes.GRADIENT_BYTES, 0.0
    return share * sizes.GRADIENT_BYTES, share * sizes.weight_bytes(config)


def _summed_gradients(config: Config, pipeline: Pipeline, rank: int) -> float:
    """One all-reduce per step of gradients that cover only the tokens of a tensor-parallel rank's shard."""
    tp = config.parallel.tensor_model_parallel_size
    summed = rank_scheme_parameters(config, pipeline, rank) if scatters_memory(config) else 0
    if config.parallel.sequence_parallel:
        summed = replicated_parameters(config, pipeline, rank)
    return 2 * summed * sizes.GRADIENT_BYTES * (tp - 1) / tp
