"""What saving a checkpoint takes: bytes written by each rank, memory of its host, and time."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mesh.checkpoint.boxes import MAX_ELEMENTS
from megatron_mesh.config.schema import Config
from megatron_mesh.planner.parameters import (
    embedding_parameters,
    rank_parameters,
    replicated_parameters,
    tied_over_pipeline,
)
from megatron_mesh.planner.stages import Pipeline

BUFFER = 4 * MAX_ELEMENTS
"""Bytes of host memory that a save takes besides its copies: one box from a GPU at a time."""

MOMENTS = 8
"""Bytes of the optimizer's two moments of a parameter."""


@dataclass(frozen=True)
class Disk:
    """How fast checkpoints are written. The defaults are cautious; measure with tools/bench_checkpoint.py."""

    gb_per_s: float = 5.0
    """GB/s that the shared file system takes from all ranks together."""
    rank_gb_per_s: float = 0.4
    """GB/s that one rank writes: a single thread copies, computes checksums and writes."""


@dataclass(frozen=True)
class Saving:
    """What a pipeline rank writes of a checkpoint, in bytes."""

    largest: int
    """By one of its ranks: of those with tensor-parallel rank 0, which write what all of them hold alike."""
    together: int
    """By all of its tensor- and data-parallel ranks."""

    def host_memory(self, *, background: bool) -> int:
        """Bytes on top of what the rank holds: in the background it writes a copy of its part."""
        return BUFFER + self.largest * background


def rank_saving(config: Config, pipeline: Pipeline, rank: int, replicas: int) -> Saving:
    """What pipeline rank ``rank`` writes; ``replicas`` ranks hold the same parameters and divide them evenly.

    A bfloat16 weight is saved with its float32 main parameter and two moments, a float32 weight with the
    moments. Of a tied embedding in a pipeline, the first rank saves the weight and the last one the moments.
    """
    tp = config.parallel.tensor_model_parallel_size
    parameters = rank_parameters(config, pipeline, rank)
    alike = replicated_parameters(config, pipeline, rank)
    weight = 6 if config.training.bf16 else 4
    by_other = 0
    if tied_over_pipeline(config, pipeline, rank):
        by_other = embedding_parameters(config) * (weight if rank else MOMENTS)
    size = weight + MOMENTS
    together = (tp * (parameters - alike) + alike) * size - tp * by_other
    return Saving(-(-(parameters * size - by_other) // replicas), together)


def seconds(savings: Sequence[Saving], disk: Disk) -> float:
    """Time to write a checkpoint: that of the file system, or of the rank that writes most."""
    together = sum(saving.together for saving in savings) / disk.gb_per_s
    largest = max(saving.largest for saving in savings) / disk.rank_gb_per_s
    return max(together, largest) / 1e9
