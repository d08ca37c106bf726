"""Bytes that a rank sends in a step, by kind.

Collectives count as ring algorithms: of a tensor of n bytes over a group of g, an all-gather (n: the whole)
or a reduce-scatter sends n (g-1)/g from every rank, and an all-reduce twice that.
"""

from dataclasses import dataclass

from megatron_mesh.config.derived import tokens_of_rank
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import redone_layers
from megatron_mesh.planner.parameters import (
    embedding_parameters,
    own_parameters,
    rank_parameters,
    replicated_parameters,
    tied_over_pipeline,
)
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.recurrence import SCHEMES

_GRADIENT = 4  # bytes: gradients are summed in float32


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one rank in one step."""

    p2p_forward: int
    """States to the next pipeline rank: S*B*H elements (S/TP with sequence parallelism) a pass."""
    p2p_backward: int
    """Their gradients to the previous pipeline rank."""
    tensor: int
    """In the tensor-parallel group: around layers, embedding, loss and memory, and gradients of norms."""
    context: int
    """In the context-parallel group: keys and values, and their gradients."""
    gradients: int
    """In the data-parallel group: all-reduce, or reduce-scatter with the distributed optimizer."""
    parameters: int
    """In the data-parallel group: all-gather of what the distributed optimizer updated."""
    ties: int
    """Gradients summed over copies of a weight on several pipeline ranks: a tied embedding."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def rank_traffic(config: Config, pipeline: Pipeline, rank: int, replicas: int) -> Traffic:
    """What each tensor-parallel rank of pipeline rank ``rank`` sends; ``replicas`` ranks have its weights."""
    chunks, last = pipeline.chunks[rank], pipeline.ranks - 1
    message = message_bytes(config) if last else 0
    forwards = len(chunks) - (rank == last)  # the last chunk of all has nobody to send to,
    backwards = len(chunks) - (rank == 0)  # and neither has the first, backward
    per_micro_batch = sum(sum(tensor_parallel_bytes(config, chunk)) for chunk in chunks)
    gradients, parameters = data_parallel_bytes(config, pipeline, rank, replicas)
    tied = embedding_parameters(config) * _GRADIENT if tied_over_pipeline(config, pipeline, rank) else 0
    return Traffic(
        p2p_forward=pipeline.micro_batches * forwards * message,
        p2p_backward=pipeline.micro_batches * backwards * message,
        tensor=round(pipeline.micro_batches * per_micro_batch + _summed_gradients(config, pipeline, rank)),
        context=pipeline.micro_batches * sum(context_parallel_bytes(config, chunk) for chunk in chunks),
        gradients=round(gradients),
        parameters=round(parameters),
        ties=tied,  # an all-reduce over two
    )


def message_bytes(config: Config) -> int:
    """What crosses from a pipeline rank to the next for one micro-batch."""
    parallel = config.parallel
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return _whole_state(config) // shards


def tensor_parallel_bytes(config: Config, chunk: Chunk) -> tuple[float, float]:
    """Bytes sent in a chunk's forward and backward for one micro-batch.

    In units of an all-gather of a state, per layer: without sequence parallelism two all-reduces (2 units
    each) forward and two backward; with it two all-gathers and two reduce-scatters forward, the same
    backward, and two more all-gathers of inputs whose shard alone was kept (Megatron-core's
    ``tensor_parallel/layers.py``).
    """
    parallel, training = config.parallel, config.training
    tp, sharded = parallel.tensor_model_parallel_size, parallel.sequence_parallel
    redone = redone_layers(training, chunk)
    mlp_again = chunk.layers if "mlp" in (training.recompute_modules or []) else 0
    forward, backward = 4.0 * chunk.layers, (6.0 if sharded else 4.0) * chunk.layers
    backward += 4 * redone + 2 * mlp_again
    if chunk.embedding:
        forward += 1 if sharded else 2
        backward += 1 if sharded else 0
    if chunk.head:
        forward += 1 if sharded else 0
        backward += 2
    if own_exchange(config):
        forward += len(chunk.enters)  # the state that was made is gathered,
        backward += len(chunk.enters)  # and so is the gradient of the state that came
    unit = _whole_state(config) * (tp - 1) / tp
    losses = 3 * 2 * tokens_of_rank(config) * 4 * (tp - 1) / tp
    return forward * unit + chunk.head * losses, backward * unit


def context_parallel_bytes(config: Config, chunk: Chunk) -> int:
    """Bytes sent in a chunk for one micro-batch, in attention over a ring of ranks.

    Keys and values go round in forward, in backward, and where a layer is run again; gradients once.
    """
    parallel = config.parallel
    rounds = 3 * chunk.layers + redone_layers(config.training, chunk)
    keys_and_values = 2 * _whole_state(config) // parallel.tensor_model_parallel_size
    return rounds * (parallel.context_parallel_size - 1) * keys_and_values


def own_exchange(config: Config) -> bool:
    """Whether the recurrence scatters and gathers states itself: it shards them, and the layers don't."""
    parallel = config.parallel
    several = parallel.tensor_model_parallel_size > 1 and not parallel.sequence_parallel
    return several and SCHEMES[config.model.recurrence].shards_states


def data_parallel_bytes(config: Config, pipeline: Pipeline, rank: int, replicas: int) -> tuple[float, float]:
    """Bytes sent for gradients and for parameters."""
    share = rank_parameters(config, pipeline, rank) * (replicas - 1) / replicas
    if not config.parallel.use_distributed_optimizer:
        return 2 * share * _GRADIENT, 0.0
    return share * _GRADIENT, share * (2 if config.training.bf16 else 4)


def _summed_gradients(config: Config, pipeline: Pipeline, rank: int) -> float:
    """All-reduce, once a step, of gradients that each tensor-parallel rank has for its tokens alone."""
    tp = config.parallel.tensor_model_parallel_size
    summed = own_parameters(config, pipeline, rank) if own_exchange(config) else 0
    if config.parallel.sequence_parallel:
        summed = replicated_parameters(config, pipeline, rank)
    return 2 * summed * _GRADIENT * (tp - 1) / tp


def _whole_state(config: Config) -> int:
    return tokens_of_rank(config) * config.model.hidden_size * (2 if config.training.bf16 else 4)
