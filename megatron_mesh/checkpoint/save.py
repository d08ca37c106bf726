"""Saving: each rank writes its part; rank 0 adds index and checksums, and publishes by renaming."""

import logging
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_core_version
from megatron.core.optimizer import MegatronOptimizer

from megatron_mesh import __version__
from megatron_mesh.checkpoint import directory as names
from megatron_mesh.checkpoint import integrity
from megatron_mesh.checkpoint.content import Content, TrainState
from megatron_mesh.checkpoint.index import INDEX_FILE, Written, index_file, index_of
from megatron_mesh.checkpoint.shares import updates_done
from megatron_mesh.checkpoint.writer import BackgroundWriter, file_of, write_file
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import dump_config
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime import phases, strict_json
from megatron_mesh.runtime.distributed import (
    Reason,
    from_rank_zero,
    summarize_reasons,
    to_rank_zero,
    with_host,
)
from megatron_mesh.runtime.run_files import CONFIG_FILE, checkpoint_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was published."""

    step: int
    path: Path
    seconds: float
    """Time from the start of the save to its publication."""
    stall_seconds: float
    """The part of that time in which training waited."""


@dataclass(frozen=True)
class Unsaved:
    """A checkpoint that could not be written."""

    step: int
    reason: str
    steps_at_risk: int
    """Steps since the last complete checkpoint. Known only on rank 0."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    part: "Future[list[Written]]"
    """This rank's pieces."""
    description: dict[str, Any]
    started: float
    stalled: float = 0.0


class Saver:
    """Writes the checkpoints of a run, one at a time. All methods except ``written`` are collective.

    If a save fails, for whatever reason and on whichever rank, the run continues. The reason is logged with
    rank and host, earlier checkpoints stay, and the next ``save`` tries again. ``failed`` tells whether the
    last save failed.
    """

    def __init__(
        self,
        config: Config,
        on_saved: Callable[[Saved], None] = lambda saved: None,
        on_failed: Callable[[Unsaved], None] = lambda unsaved: None,
        loaded_step: int = 0,
    ):
        """Start deleting unfinished checkpoints that a killed run left behind.

        Args:
            on_saved, on_failed: called for each checkpoint, on all ranks.
            loaded_step: the step of the checkpoint that the run resumed from, perhaps from another directory.
        """
        assert config.checkpoint.save is not None
        self.config = config
        self.directory = Path(config.checkpoint.save)
        self.failed = False
        self._on_saved, self._on_failed = on_saved, on_failed
        self._loaded_step = loaded_step
        self._pending: _Pending | None = None
        self._published: int | None = None
        self._writer = BackgroundWriter()
        self._pruner = ThreadPoolExecutor(1, thread_name_prefix="ckpt-pruner")
        if dist.get_rank() == 0:
            self._delete(names.retire_unfinished(self.directory))

    def save(self, stage: Stage, optimizer: MegatronOptimizer, state: TrainState) -> None:
        """Save the current state. With ``async_save`` this returns as soon as the state is copied."""
        if self._pending is not None:
            self.complete()
        started = time.monotonic()
        phases.enter("planning a save")
        partial = self._partial(state.step)
        if reason := from_rank_zero(lambda: _attempt(lambda: make_empty(partial))):
            self._give_up(state.step, reason)
            return
        described = describe_state(state.state_dict(), dist.get_world_size())
        part = _as_future(lambda: self._start(partial, stage, optimizer))
        if dist.get_rank() == 0:
            described["updates"] = updates_done(optimizer)
        self._pending = _Pending(state.step, part, described, started)
        if self.config.checkpoint.async_save:
            self._pending.stalled = time.monotonic() - started
        else:
            self.complete()

    def _partial(self, step: int) -> Path:
        return checkpoint_path(self.directory, step).with_suffix(".partial")

    def _start(
        self, partial: Path, stage: Stage, optimizer: MegatronOptimizer
    ) -> "list[Written] | Future[list[Written]]":
        partial.mkdir(parents=True, exist_ok=True)  # on a network disk, rank 0's may not be visible yet
        path = partial / file_of(dist.get_rank())
        boxes = Content(stage, optimizer).to_write()
        if self.config.checkpoint.async_save:
            return self._writer.start(path, boxes)
        phases.enter("writing")
        return write_file(path, boxes)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is being written; the same on all ranks."""
        return self._pending is not None

    def has(self, step: int) -> bool:
        """Return whether ``step`` is saved or being written; the same on all ranks."""
        return step == (self._pending.step if self._pending is not None else self._published)

    def written(self) -> bool:
        """Return whether this rank has written its part of the pending checkpoint. Not collective."""
        return self._pending is None or self._pending.part.done()

    def complete(self) -> None:
        """Wait until all ranks have written their parts of the pending checkpoint, and publish it."""
        pending, self._pending = self._pending, None
        assert pending is not None
        began = time.monotonic()
        outcome = _outcome(pending.part)
        phases.enter("between data and .metadata")
        gathered = to_rank_zero(outcome)

        def publish() -> str:
            missing = "; ".join(summarize_reasons([reason for _, reason in gathered]))
            written = (entry for part, _ in gathered for entry in part)
            return missing or _attempt(lambda: self._publish(final, pending.description, written))

        final = checkpoint_path(self.directory, pending.step)
        if reason := from_rank_zero(publish):
            self._give_up(pending.step, reason)
            return
        self.failed = False
        self._published = pending.step
        now = time.monotonic()
        stalled = pending.stalled + now - began if pending.stalled else now - pending.started
        self._on_saved(Saved(pending.step, final, now - pending.started, stalled))

    def finish(self) -> None:
        """Publish the pending checkpoint, if there is one.

        Old checkpoints may still be being deleted; the interpreter waits for that before it exits.
        """
        if self._pending is not None:
            self.complete()

    def _publish(self, final: Path, described: dict[str, Any], written: Iterable[Written]) -> None:
        """Complete and publish a checkpoint. Rank 0 calls this when all ranks have written their parts."""
        partial = final.with_suffix(".partial")
        write_small_files(partial, written, dump_config(self.config), described)
        step = described["train_state"]["step"]
        self._delete(names.publish(partial, final, step))
        phases.enter("pruning")
        settings = self.config.checkpoint
        try:
            self._delete(names.retire_old(self.directory, step, settings.keep_last, settings.keep_every))
        except OSError as error:  # the new checkpoint is complete, so the save has not failed
            logger.error("old checkpoints in %s cannot be deleted: %s; delete them", self.directory, error)

    def _delete(self, paths: Iterable[Path]) -> None:
        """Delete directories in the background."""
        for path in paths:
            self._pruner.submit(_delete, path)

    def note_validation(self, state: TrainState) -> None:
        """Add this step's validation loss to its checkpoint, which was saved earlier. Not collective."""
        path = checkpoint_path(self.directory, state.step)
        if dist.get_rank() or state.valid_loss_step != state.step or not path.is_dir():
            return
        try:
            names.write_validation(path, state.valid_loss)
        except OSError as error:
            logger.warning("the validation loss was not added to %s: %s; metrics.jsonl has it", path, error)

    def _give_up(self, step: int, reason: str) -> None:
        self.failed = True
        partial, at_risk = self._partial(step), 0
        if dist.get_rank() == 0:
            last = self._last_complete(step)
            at_risk = step - last
            logger.error(
                "saving step %d to %s failed: %s; later saves try again; last complete checkpoint: %s; steps "
                "at risk until then: %d",
                step,
                self.directory,
                reason,
                f"step {last}" if last else "none",
                at_risk,
            )
            shutil.rmtree(partial, ignore_errors=True)
        else:  # for a directory that rank 0 doesn't see, on a local disk of this node
            with suppress(OSError):
                (partial / file_of(dist.get_rank())).unlink(missing_ok=True)
                partial.rmdir()
        self._on_failed(Unsaved(step, reason, at_risk))

    def _last_complete(self, step: int) -> int:
        """Return the step of the last complete checkpoint up to ``step``; 0 if there is none."""
        try:
            steps = [saved for saved in names.saved_steps(self.directory) if saved <= step]
        except OSError:
            steps = []
        return max(steps, default=self._loaded_step)


def _delete(path: Path) -> None:
    phases.enter("deleting")
    try:
        shutil.rmtree(path)
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        logger.error("%s cannot be deleted: %s; the next start of the run tries again", path, error)


def _as_future(work: Callable[[], Any]) -> "Future[list[Written]]":
    """Do ``work``, and return its result or exception as a future. A future is returned as it is."""
    future: Future[list[Written]] = Future()
    try:
        result = work()
    # No error (memory, disk, torch) may end the run on only one rank: the others would wait forever.
    except Exception as error:
        future.set_exception(error)
        return future
    if isinstance(result, Future):
        return result
    future.set_result(result)
    return future


_Outcome = tuple[list[Written], Reason]


def _outcome(part: "Future[list[Written]]") -> _Outcome:
    """Return the pieces that this rank has written, or the reason why it failed."""
    error = part.exception()
    if error is None:
        return part.result(), None
    if not isinstance(error, OSError):
        logger.error("this rank could not write its part of a checkpoint", exc_info=error)
    return [], with_host(_cause(error))


def _cause(error: BaseException) -> str:
    """Describe an error without its path, so that equal errors of several ranks have equal descriptions."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


def _attempt(work: Callable[[], object]) -> str:
    """Do ``work`` on rank 0, which calls this; return the reason if it fails, or ""."""
    return "; ".join(summarize_reasons([_outcome(_as_future(work))[1]]))


def write_small_files(
    directory: Path, written: Iterable[Written], config: str, described: dict[str, Any]
) -> None:
    """Write index, configuration, description and checksums next to the tensor files of all ranks.

    Raises:
        OSError: a file cannot be written, or a rank's tensor file is not visible here.
    """
    digests: integrity.Digests = {}
    listed = sorted(written, key=lambda w: (w.piece.file, w.piece.start))
    for entry in listed:
        digests.setdefault(entry.piece.file, []).append((entry.piece.length, entry.piece.sha256 or ""))
    phases.enter("checks")
    if missing := integrity.find_differences(directory, digests, read=False):
        raise OSError(
            f"{'; '.join(missing)} in {directory}: {socket.gethostname()} does not see the files of all "
            "ranks; put --save on a file system that all nodes share"
        )
    small = {
        INDEX_FILE: index_file(index_of(directory, listed)),
        CONFIG_FILE: config.encode(),
        names.STATE_FILE: strict_json.dumps(described, indent=2).encode(),
    }
    for name, content in small.items():
        (directory / name).write_bytes(content)
        digests[name] = [(len(content), integrity.sha256(content))]
    integrity.write_checksums(directory, digests)


def make_empty(directory: Path) -> None:
    """Create an empty ``directory``, deleting what a killed run may have left there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def describe_state(train_state: dict[str, Any], world_size: int = 1) -> dict[str, Any]:
    """Return the contents of the state file: format, versions, and ``TrainState.state_dict``."""
    return {
        "format_version": names.FORMAT_VERSION,
        "world_size": world_size,
        "versions": {
            "megatron_mesh": __version__,
            "megatron_core": megatron_core_version,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "train_state": train_state,
    }
