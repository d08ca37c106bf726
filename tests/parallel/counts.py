"""Count what each rank writes, reads, stores and sends in a save and a load. Runs in workers."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_mesh.checkpoint.content import Content, generators
from megatron_mesh.checkpoint.index import Box
from megatron_mesh.config.schema import Config
from megatron_mesh.runtime.device import pack_generators
from megatron_mesh.runtime.distributed import model_parallel_groups
from tools.bench.checkpoint_ranks import UntrainedRun, build_untrained
from tools.bench.counting import Counts


@dataclass
class Save:
    """Counts of one rank."""

    path: Path
    counts: Counts
    written: int


@dataclass
class Load:
    """Counts of one rank."""

    counts: Counts
    read: int
    asked: int
    """Elements of main parameters and moments that the rank reads for itself and its replicas."""
    overlapping: int
    """Bytes of the stored pieces that contain any of these elements, each piece counted once."""
    generators: int
    """Bytes of the random generators' piece, which the rank reads if the layout is the same."""
    filled: int
    """Bytes read according to ``fill``."""


def save_and_load(config: Config, directory: Path) -> tuple[Save, Save, Load]:
    """Save in the foreground, save in the background, load the second checkpoint."""
    with model_parallel_groups(config):
        run, saves = build_untrained(config), []
        for background in (False, True):
            counts, saved = run.save(directory, background=background)
            saves.append(Save(saved.path, counts, counts.written(saved.path)))
        return saves[0], saves[1], _load(run, saves[1].path, same_layout=True)


def load_only(config: Config, checkpoint: Path) -> Load:
    """Load a checkpoint of another layout."""
    with model_parallel_groups(config):
        return _load(build_untrained(config), checkpoint, same_layout=False)


def _load(run: UntrainedRun, checkpoint: Path, *, same_layout: bool) -> Load:
    counts = run.load(checkpoint)
    boxes = list(Content(run.stage, run.optimizer).to_read(with_optimizer=True))
    state = generators(pack_generators())
    return Load(
        counts,
        counts.read(checkpoint),
        asked=sum(box.data.numel() for box in boxes),
        overlapping=overlapping_bytes(checkpoint, boxes),
        generators=overlapping_bytes(checkpoint, [state]) if same_layout else 0,
        filled=counts.filled,
    )


def overlapping_bytes(checkpoint: Path, boxes: Iterable[Box]) -> int:
    """Sum the bytes of all stored pieces that overlap a box, using torch's own reader of ``.metadata``."""
    metadata = FileSystemReader(str(checkpoint)).read_metadata()
    found = {}
    for box in boxes:
        tensor = metadata.state_dict_metadata[box.key]
        assert isinstance(tensor, TensorStorageMetadata)
        for number, chunk in enumerate(tensor.chunks):
            if _overlap(box.offset, box.data.shape, chunk.offsets, chunk.sizes):
                found[box.key, number] = MetadataIndex(box.key, chunk.offsets, number)
    return sum(metadata.storage_data[index].length for index in found.values())


def _overlap(offset, sizes, other_offset, other_sizes) -> bool:
    return all(
        a < d + e and d < a + b for a, b, d, e in zip(offset, sizes, other_offset, other_sizes, strict=True)
    )
