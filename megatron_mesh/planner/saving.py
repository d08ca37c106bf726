"""Estimate what saving a checkpoint costs: bytes written by each rank, host memory, and time."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mesh.checkpoint.boxes import MAX_ELEMENTS
from megatron_mesh.config import sizes
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.costs import holds_tied_copy, rank_parameters, replicated_parameters
from megatron_mesh.planner.stages import Pipeline

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
