"""Estimate a rank's memory: weights, gradients, optimizer state, and activations in schedule order.

Estimate what saving a checkpoint costs: bytes written by each rank, host memory, and time.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mesh.checkpoint.index import MAX_ELEMENTS
from megatron_mesh.config import sizes
from megatron_mesh.config.layout import layout
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import (
    holds_tied_copy,
    rank_parameters,
    recomputed_layers,
    replicated_parameters,
    scatters_memory,
)
from megatron_mesh.planner.schedule import Step
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.recurrence import SCHEMES


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank. CUDA, NCCL, the framework and fragmentation add to them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum of the four."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class InFlight:
    """The most that a rank stores between forwards and their backwards during a step."""

    activations: int
    """Bytes, including what full recomputation recreates at that moment."""
    micro_batches: int
    """Micro-batches with stored activations."""
    chunks: int
    """Chunks with stored activations, over all micro-batches."""


def rank_memory(
    config: Config, pipeline: Pipeline, rank: int, order: Sequence[Step], replicas: int
) -> tuple[MemoryEstimate, InFlight]:
    """Estimate the memory of pipeline rank ``rank`` (of each of its tensor-parallel ranks).

    Args:
        order: the rank's steps in one training step.
        replicas: ranks with the same weights, over which the distributed optimizer shards its state.
    """
    parameters = rank_parameters(config, pipeline, rank)
    shards = replicas if config.parallel.use_distributed_optimizer else 1
    held = in_flight(config, pipeline, rank, order)
    memory = MemoryEstimate(
        weights=parameters * sizes.weight_bytes(config) + cached_cast_bytes(config, pipeline, rank),
        gradients=parameters * sizes.GRADIENT_BYTES,
        optimizer=-(-parameters * sizes.optimizer_bytes(config) // shards),
        activations=held.activations,
    )
    return memory, held


def in_flight(config: Config, pipeline: Pipeline, rank: int, order: Sequence[Step]) -> InFlight:
    """Follow the order: a forward stores its chunk's activations, and its backward frees them at its end."""
    chunks = pipeline.chunks[rank]
    stored = [activation_bytes(config, chunk, pipelined=pipeline.ranks > 1) for chunk in chunks]
    recomputed = [_recomputed_bytes(config, chunk) for chunk in chunks]
    held = most = stored_chunks = most_chunks = most_micro_batches = 0
    open_chunks: dict[int, int] = {}  # by micro-batch
    for backward, chunk, micro_batch in order:
        if backward:
            most = max(most, held + recomputed[chunk])
            held -= stored[chunk]
            stored_chunks -= 1
            open_chunks[micro_batch] -= 1
            if not open_chunks[micro_batch]:
                del open_chunks[micro_batch]
        else:
            held += stored[chunk]
            stored_chunks += 1
            open_chunks[micro_batch] = open_chunks.get(micro_batch, 0) + 1
            most, most_chunks = max(most, held), max(most_chunks, stored_chunks)
            most_micro_batches = max(most_micro_batches, len(open_chunks))
    return InFlight(most, most_micro_batches, most_chunks)


def activation_bytes(config: Config, chunk: Chunk, *, pipelined: bool) -> int:
    """Bytes that a chunk stores for one micro-batch from its forward to its backward, on one rank."""
    model, training = config.model, config.training
    state = sizes.state_shard_bytes(config)
    recomputed = recomputed_layers(training, chunk)
    stored = (chunk.layers - recomputed) * sizes.layer_activation_bytes(config)
    stored += per_pass_cast_bytes(config, chunk, chunk.layers - recomputed)
    if training.recompute_method == "block":
        stored += recomputed * state
    elif recomputed:
        group = training.recompute_num_layers or 1
        stored += sum(-(-section // group) for section in chunk.sections) * state
    if pipelined and not chunk.layers:
        stored += state  # the input, which a layer would store otherwise
    if pipelined and not chunk.head:
        stored += state  # the output, which the schedule holds until its gradient arrives
    scheme = SCHEMES[model.recurrence]
    if pipelined:
        # The schedule holds the state that arrived, the layers the one that the recurrence made from it.
        stored += sum(scheme.makes_new_state(v) for v in chunk.enters) * state
    elif chunk.enters:
        stored += scheme.saved_states(layout(model).loops) * state
    if 0 in chunk.enters and scheme.keeps_embedding and scatters_memory(config):
        stored += state  # the embedding: the memory holds a shard, the first layer a gathered copy
    return stored + (sizes.head_activation_bytes(config) if chunk.head else 0)


def _recomputed_bytes(config: Config, chunk: Chunk) -> int:
    """Bytes that full recomputation recreates at a time (one group of layers) in a chunk's backward."""
    if not recomputed_layers(config.training, chunk):
        return 0
    group = config.training.recompute_num_layers or 1
    if config.training.recompute_method == "block":
        group = 1  # with this method each recomputed layer is a group
    layers = min(group, max(chunk.sections))
    return layers * sizes.layer_activation_bytes(config) + per_pass_cast_bytes(config, chunk, layers)


def cached_cast_bytes(config: Config, pipeline: Pipeline, rank: int) -> int:
    """FP8 casts that live as long as the weights: tensorwise, shared by all passes (``model/transformer_config.py``).

    Weights stored in FP8 (``fp8_param_gather``) add nothing: with their transpose they take as much as in
    bfloat16. The layers that ``first_last_layers_bf16`` excludes are counted too.
    """
    precision = config.precision
    if not precision.fp8_format or precision.fp8_recipe != "tensorwise" or precision.fp8_param_gather:
        return 0
    layers = pipeline.layers[rank] if precision.fp8_scope == "all" else pipeline.core_layers(rank)
    return layers * _layer_cast_bytes(config)


def per_pass_cast_bytes(config: Config, chunk: Chunk, layers: int) -> int:
    """FP8 casts that autograd stores for one pass over ``layers`` of a chunk: blockwise and delayed."""
    precision = config.precision
    if not precision.fp8_format or precision.fp8_recipe == "tensorwise" or precision.fp8_param_gather:
        return 0
    in_fp8 = chunk.layers if precision.fp8_scope == "all" else chunk.core
    return min(layers, in_fp8) * _layer_cast_bytes(config)


def _layer_cast_bytes(config: Config) -> int:
    tp = config.parallel.tensor_model_parallel_size
    return sizes.FP8_CAST_BYTES * sizes.layer_matrix_parameters(config.model, tp)


BUFFER = 4 * MAX_ELEMENTS
"""Bytes of host memory that a foreground save needs: it copies one box of a tensor from the GPU at a time."""


@dataclass(frozen=True)
class Disk:
    """How fast checkpoints are written. Cautious defaults; ``tools.bench.checkpoints`` measures it."""

    gb_per_s: float = 5.0
    """GB/s that the shared file system accepts from all ranks together."""
    rank_gb_per_s: float = 0.4
    """GB/s of one rank, where a single thread copies, computes checksums and writes."""


@dataclass(frozen=True)
class Saving:
    """Bytes that a pipeline rank writes to a checkpoint."""

    largest: int
    """By one process: tensor-parallel rank 0 writes most, because it also writes the replicated weights."""
    total: int
    """By all tensor- and data-parallel ranks of this pipeline rank."""

    def host_memory(self, *, background: bool) -> int:
        """Host memory for saving. A background save also copies everything that the process writes."""
        return BUFFER + self.largest * background


def rank_saving(config: Config, pipeline: Pipeline, rank: int, replicas: int) -> Saving:
    """Bytes that pipeline rank ``rank`` writes.

    A bfloat16 weight is saved with its float32 main parameter and two moments, a float32 weight with the two
    moments. In a pipeline with a tied embedding, the first rank saves its weight and the last its moments.

    Args:
        replicas: ranks that hold the same parameters and write equal shares of them.
    """
    tp = config.parallel.tensor_model_parallel_size
    parameters = rank_parameters(config, pipeline, rank)
    replicated = replicated_parameters(config, pipeline, rank)
    per_parameter = sizes.weight_bytes(config) + sizes.optimizer_bytes(config)
    by_other = 0
    if holds_tied_copy(config, pipeline, rank):
        skipped = per_parameter - sizes.MOMENTS_BYTES if rank else sizes.MOMENTS_BYTES
        by_other = sizes.embedding_parameters(config.model, tp) * skipped
    total = (tp * (parameters - replicated) + replicated) * per_parameter - tp * by_other
    return Saving(-(-(parameters * per_parameter - by_other) // replicas), total)


def save_seconds(savings: Sequence[Saving], disk: Disk) -> float:
    """Time to write a checkpoint, limited by the file system or by the process that writes most."""
    total = sum(saving.total for saving in savings) / disk.gb_per_s
    largest = max(saving.largest for saving in savings) / disk.rank_gb_per_s
    return max(total, largest) / 1e9
