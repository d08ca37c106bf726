"""Reading a checkpoint without running what is in it: people load other people's.

On the stock stack three things of a torch_dist checkpoint are unpickled freely: ``.metadata``, objects inside
the ``.distcp`` files, and extra states of modules. Here the first goes through an unpickler that knows the
few classes it needs, objects are read with ``weights_only=True``, and extra states are not written at all.
``common.pt`` is read so on the stock stack, unless an environment variable says otherwise, and with classes
of Megatron-core's and NumPy's allowed that no checkpoint of ours needs; here there are neither.
"""

import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategy
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME, TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from megatron_mesh.errors import UserError

_DTYPES = {str(x).removeprefix("torch.") for x in vars(torch).values() if isinstance(x, torch.dtype)}

# What torch.distributed.checkpoint writes to .metadata; none of it does anything when it is made.
_KNOWN = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


def read_metadata(directory: Path) -> Metadata:
    """The contents of ``directory/.metadata``: which tensor lies where in which file.

    Raises:
        UserError: it is missing, damaged, or holds something that is no metadata.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise pickle.UnpicklingError("it is no list of tensors")
        for place in metadata.storage_data.values():
            if len(PurePosixPath(place.relative_path).parts) != 1 or place.relative_path == "..":
                raise pickle.UnpicklingError(f"it names a file elsewhere, {place.relative_path}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {directory} is no complete checkpoint") from None
    # A damaged pickle raises whatever its bytes happen to lead to.
    except Exception as error:
        raise UserError(f"{path} cannot be trusted: {error}; take another checkpoint") from error
    return metadata


def check_files(directory: Path) -> None:
    """Raise OSError unless ``.metadata`` is there and every tensor that it names lies within its file."""
    sizes = {path.name: path.stat().st_size for path in directory.iterdir()}
    try:
        places = read_metadata(directory).storage_data
    except UserError as error:
        raise OSError(str(error)) from error
    for index, place in places.items():
        if place.offset + place.length > sizes.get(place.relative_path, 0):
            raise OSError(f"{directory / place.relative_path} is shorter than what was written: {index.fqn}")


class SafeReader(FileSystemReader):
    """torch's reader with ``read_metadata`` above; the metadata are read once.

    At once, too: torch 2.11 goes on without them where reading fails, and says then that they are None.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._metadata = read_metadata(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata


class _SafePlanner(megatron_strategy.MCoreLoadPlanner):
    """Megatron-core's planner, which reads no object but tensors and plain containers of them."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        self.state_dict[read_item.dest_index.fqn] = _load_plain(value)


class _SafeCommon(TorchCommonLoadStrategy):
    """Megatron-core's reader of ``common.pt``, which reads no object but tensors and plain containers."""

    def load_common(self, checkpoint_dir: Any) -> StateDict:
        path = Path(checkpoint_dir) / COMMON_STATE_FNAME
        try:
            return _load_plain(path)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} cannot be trusted: {_reason(error)}; take another checkpoint") from error


def _reason(error: BaseException) -> str:
    """In words; torch's own advise to run what it has refused."""
    refused = isinstance(error, pickle.UnpicklingError)
    return "it holds more than tensors and plain values" if refused else str(error)


def reasons(error: CheckpointException) -> str:
    """What the ranks say that failed to read or to write; nothing on ranks other than the first."""
    return "; ".join(dict.fromkeys(_reason(inner[0]) for inner in error.failures.values()))


def load(sharded: ShardedStateDict, directory: Path, **options: Any) -> StateDict:
    """``dist_checkpointing.load``, without running anything that is in the checkpoint.

    Raises:
        UserError: it holds what could run, or not what is asked for.
    """
    strategies = {"sharded_strategy": SafeLoadStrategy(), "common_strategy": _SafeCommon()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's to Megatron-core's authors
        try:
            return dist_checkpointing.load(sharded, str(directory), **strategies, **options)
        except CheckpointException as error:  # no Exception: it would pass by those who report failures
            raise UserError(
                f"{directory} cannot be read: {reasons(error)}; take another checkpoint"
            ) from error


class SafeLoadStrategy(megatron_strategy.TorchDistLoadShardedStrategy):
    """Megatron-core's reader of the tensors, with the parts above."""

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        with _safe_parts(), _no_added_classes():
            return super().load(sharded_state_dict, checkpoint_dir)

    def load_tensors_metadata(self, checkpoint_dir: Path, metadata: Metadata | None = None) -> Any:
        with _safe_parts():
            return super().load_tensors_metadata(checkpoint_dir, metadata)

    def load_sharded_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        with _safe_parts():
            return super().load_sharded_metadata(checkpoint_dir)


def _load_plain(file: Any) -> Any:
    with _no_added_classes():
        return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def _no_added_classes() -> Iterator[None]:
    """Without what libraries have had torch allow; among it NumPy's arrays, which trust what fills them."""
    added = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(added)


@contextmanager
def _safe_parts() -> Iterator[None]:
    """Megatron's strategy takes reader and planner from its module and has no parameter for them."""
    replaced = {
        "_get_filesystem_reader": lambda directory, cache_metadata=False: SafeReader(Path(directory)),
        "MCoreLoadPlanner": _SafePlanner,
    }
    originals = {name: getattr(megatron_strategy, name) for name in replaced}
    for name, value in replaced.items():
        setattr(megatron_strategy, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(megatron_strategy, name, value)
