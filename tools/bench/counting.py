"""Count what one process does in a block: bytes of a checkpoint, host memory, collectives, opened files.

The measured code needs no changes: the counts come from the kernel, Python's audit events and torch's
dispatcher.
"""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mesh.checkpoint import load
from megatron_mesh.compat.torch_internals import TorchDispatchMode, argument_names, tree_leaves
from megatron_mesh.errors import UserError
from tools.bench.measure import now


@dataclass
class Counts:
    """Counts of one process. Sizes are in bytes."""

    seconds: float = 0.0
    memory: int = 0
    """Peak resident memory (``VmHWM``) above what was resident at the start."""
    sent: int = 0
    """Tensors passed to collectives."""
    received: int = 0
    """Tensors filled by collectives. A tensor changed in place counts as sent only."""
    tensors_read: int = 0
    """Bytes that the kernel reports as read while boxes were filled."""
    filled: int = 0
    """Bytes that ``fill`` itself reports as read."""
    reads: list[str] = field(default_factory=list)
    """Names of files opened for reading."""
    writes: list[str] = field(default_factory=list)
    """Names of files opened for writing."""
    others: list[str] = field(default_factory=list)
    """Names of files and directories opened by ``os.open``, to fsync them."""

    @property
    def opened(self) -> int:
        """Number of opened files."""
        return len(self.reads) + len(self.writes) + len(self.others)

    def written(self, checkpoint: Path) -> int:
        """Bytes of the files in ``checkpoint`` that this process wrote."""
        return _sizes(checkpoint, self.writes)

    def read(self, checkpoint: Path) -> int:
        """Bytes of ``checkpoint`` that this process read. A small file counts in full."""
        small = [name for name in self.reads if not name.endswith(".distcp")]
        return self.tensors_read + _sizes(checkpoint, small)


@contextmanager
def counted(directory: Path) -> Iterator[Counts]:
    """Count what this process does in the block. Only files under ``directory`` count.

    Raises:
        UserError: the kernel doesn't report the peak of resident memory.
    """
    counts = Counts()
    _release_free_memory()
    _reset_peak()
    before = _status("VmRSS")
    with _Collectives(counts), _opened_files(directory, counts), _reads_of_tensors(counts):
        start = now()
        yield counts
        counts.seconds = now() - start
    counts.memory = _status("VmHWM") - before


def check_kernel() -> None:
    """Check that ``counted`` works on this machine.

    Raises:
        UserError: it doesn't, for the reason given.
    """
    _reset_peak()
    _status("VmHWM")


def _sizes(checkpoint: Path, names: list[str]) -> int:
    paths = [checkpoint / name for name in set(names)]
    return sum(path.stat().st_size for path in paths if path.is_file())


class _Collectives(TorchDispatchMode):
    """Adds up the tensors of collectives, all of which end as calls to ``torch.ops.c10d``."""

    def __init__(self, counts: Counts):
        super().__init__()
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            given: Mapping[str, Any] = dict(zip(argument_names(func), args, strict=False))
            for name, value in given.items():
                size = sum(t.nbytes for t in tree_leaves(value) if hasattr(t, "nbytes"))
                if name.startswith("output"):
                    self._counts.received += size
                else:
                    self._counts.sent += size
        return func(*args, **(kwargs or {}))


_watch: Callable[[str, Any], None] | None = None
"""Called for every opened file. An audit hook cannot be removed, so we add only one and switch this."""


def _audit(event: str, args: tuple) -> None:
    if event == "open" and _watch is not None and isinstance(args[0], str | bytes | os.PathLike):
        _watch(os.fsdecode(args[0]), args[1])


_hooked = False


@contextmanager
def _opened_files(directory: Path, counts: Counts) -> Iterator[None]:
    global _watch, _hooked
    inside = str(directory.resolve())

    def note(path: str, mode: str | None) -> None:
        if os.path.abspath(path).startswith(inside):
            writes = mode is not None and re.search("[wxa+]", mode)
            (counts.writes if writes else counts.reads if mode else counts.others).append(
                os.path.basename(path)
            )

    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    _watch = note
    try:
        yield
    finally:
        _watch = None


@contextmanager
def _reads_of_tensors(counts: Counts) -> Iterator[None]:
    """Count what ``fill`` reads. Outside of it, the kernel's count would include sockets."""
    fill = load.fill

    def counting(*args: Any) -> int:
        before = _read_so_far()
        try:
            filled = fill(*args)
        finally:
            counts.tensors_read += _read_so_far() - before
        counts.filled += filled
        return filled

    load.fill = counting  # type: ignore[assignment]
    try:
        yield
    finally:
        load.fill = fill


def _read_so_far() -> int:
    return _field(Path("/proc/self/io"), "rchar")


def _status(name: str) -> int:
    return _field(Path("/proc/self/status"), name) * 1024


def _field(path: Path, name: str) -> int:
    try:
        found = re.search(rf"^{name}:\s+(\d+)", path.read_text(), re.MULTILINE)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run this on Linux") from None
    assert found is not None, name
    return int(found[1])


def _release_free_memory() -> None:
    """Return freed memory to the system, so that a save that reuses it doesn't seem to need none."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_peak() -> None:
    """Reset ``VmHWM`` to what is resident now."""
    path = Path("/proc/self/clear_refs")
    try:
        path.write_text("5")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}), so peak resident memory cannot be measured; "
            "run this on Linux, outside a sandbox"
        ) from None
