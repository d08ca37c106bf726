"""Memory of a rank: parameters and what follows from them, and activations in the schedule's real order."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mesh.config.derived import layout, padded_vocab_size, tokens_of_rank
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import redone_layers
from megatron_mesh.planner.fp8_memory import kept_casts_bytes, pass_casts_bytes
from megatron_mesh.planner.layer_memory import MemoryEstimate, layer_bytes
from megatron_mesh.planner.order import Step
from megatron_mesh.planner.parameters import rank_parameters
from megatron_mesh.planner.stages import Chunk, Pipeline
from megatron_mesh.planner.traffic import own_exchange
from megatron_mesh.recurrence import SCHEMES


@dataclass(frozen=True)
class InFlight:
    """The most that a rank holds between forwards and their backwards, over a step."""

    activations: int
    """Bytes, with what full recomputation makes again at that moment."""
    micro_batches: int
    """Different micro-batches of which something is held."""
    passes: int
    """Chunks whose activations are held, over all micro-batches."""


def rank_memory(
    config: Config, pipeline: Pipeline, rank: int, order: Sequence[Step], replicas: int
) -> tuple[MemoryEstimate, InFlight]:
    """Bytes of pipeline rank ``rank`` (of each of its tensor-parallel ranks).

    Gradients are summed in float32. Adam keeps two float32 moments, and for bfloat16 weights a float32 copy
    of each. FP8 layers have casts of their weights beside them (``fp8_memory.py``).

    Args:
        order: the rank's steps in a training step.
        replicas: ranks with the same weights, over which the distributed optimizer shards its state.
    """
    parameters, bf16 = rank_parameters(config, pipeline, rank), config.training.bf16
    shards = replicas if config.parallel.use_distributed_optimizer else 1
    held = in_flight(config, pipeline, rank, order)
    memory = MemoryEstimate(
        weights=parameters * (2 if bf16 else 4) + kept_casts_bytes(config, pipeline, rank),
        gradients=parameters * 4,
        optimizer=-(-parameters * (12 if bf16 else 8) // shards),
        activations=held.activations,
    )
    return memory, held


def in_flight(config: Config, pipeline: Pipeline, rank: int, order: Sequence[Step]) -> InFlight:
    """Follow the order: a forward adds what its chunk keeps, a backward removes it when it is done."""
    chunks = pipeline.chunks[rank]
    kept = [kept_bytes(config, chunk, pipelined=pipeline.ranks > 1) for chunk in chunks]
    redone = [_redone_bytes(config, chunk) for chunk in chunks]
    held = most = passes = most_passes = most_micro_batches = 0
    open_chunks: dict[int, int] = {}  # by micro-batch
    for backward, chunk, micro_batch in order:
        if backward:
            most = max(most, held + redone[chunk])
            held -= kept[chunk]
            passes -= 1
            open_chunks[micro_batch] -= 1
            if not open_chunks[micro_batch]:
                del open_chunks[micro_batch]
        else:
            held += kept[chunk]
            passes += 1
            open_chunks[micro_batch] = open_chunks.get(micro_batch, 0) + 1
            most, most_passes = max(most, held), max(most_passes, passes)
            most_micro_batches = max(most_micro_batches, len(open_chunks))
    return InFlight(most, most_micro_batches, most_passes)


def kept_bytes(config: Config, chunk: Chunk, *, pipelined: bool) -> int:
    """What a chunk keeps of one micro-batch from its forward to its backward, on one tensor-parallel rank."""
    model, training = config.model, config.training
    state = _state_bytes(config)
    redone = redone_layers(training, chunk)
    kept = (chunk.layers - redone) * layer_bytes(config)
    kept += pass_casts_bytes(config, chunk, chunk.layers - redone)
    if training.recompute_method == "block":
        kept += redone * state
    elif redone:
        group = training.recompute_num_layers or 1
        kept += sum(-(-section // group) for section in chunk.sections) * state
    if pipelined and not chunk.layers:
        kept += state  # the input, which a layer would hold otherwise
    if pipelined and not chunk.head:
        kept += state  # the output, which the schedule holds until its gradient has come
    scheme = SCHEMES[model.recurrence]
    if pipelined:
        # The schedule holds the state that arrived, and the layers hold what the recurrence made of it.
        kept += sum(scheme.makes_new_state(v) for v in chunk.enters) * state
    elif chunk.enters:
        kept += scheme.saved_states(layout(model).loops) * state
    if 0 in chunk.enters and scheme.keeps_embedding and own_exchange(config):
        kept += state  # the embedding, of which the memory has a shard and the first layer a gathered copy
    return kept + (_head_bytes(config) if chunk.head else 0)


def _redone_bytes(config: Config, chunk: Chunk) -> int:
    """What full recomputation makes again, a group of layers at a time, in a chunk's backward."""
    if not redone_layers(config.training, chunk):
        return 0
    group = config.training.recompute_num_layers or 1
    if config.training.recompute_method == "block":
        group = 1  # recomputed layers are groups of their own then
    again = min(group, max(chunk.sections))
    return again * layer_bytes(config) + pass_casts_bytes(config, chunk, again)


def _state_bytes(config: Config) -> int:
    """One hidden state [S, B, H], or the shard of it that sequence parallelism leaves."""
    parallel, training = config.parallel, config.training
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return tokens_of_rank(config) * config.model.hidden_size * (2 if training.bf16 else 4) // shards


def _head_bytes(config: Config) -> int:
    """The final norm's input and output, and the softmax over the vocabulary in float32."""
    tp = config.parallel.tensor_model_parallel_size
    return 2 * _state_bytes(config) + tokens_of_rank(config) * padded_vocab_size(config.model) // tp * 4
