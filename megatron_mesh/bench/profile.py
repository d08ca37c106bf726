"""Traces of single steps."""

from collections.abc import Sequence
from pathlib import Path

from torch.profiler import profile

from megatron_mesh.bench.variants import Variant
from megatron_mesh.data import Batch
from megatron_mesh.runtime import ranges


def write_traces(variants: Sequence[Variant], batches: Sequence[Batch], directory: Path) -> list[Path]:
    """Write ``directory/VARIANT.json`` with one step of each variant, its passes and cycles named.

    The files are Chrome traces, for ui.perfetto.dev or chrome://tracing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for variant in variants:
        with profile() as profiler, ranges.marking():
            variant.step(batches)
        path = directory / f"{variant.name}.json"
        profiler.export_chrome_trace(str(path))
        written.append(path)
    return written
