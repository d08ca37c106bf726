"""Saving: each rank writes its part, rank 0 puts them together, checks, and publishes by one rename."""

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
from megatron_mesh.checkpoint.content import Content
from megatron_mesh.checkpoint.index import INDEX_FILE, Written, index_file, index_of
from megatron_mesh.checkpoint.shares import updates_done
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.checkpoint.writer import BackgroundWriter, file_of, write_file
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.schema import Config
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime import phases, strict_json
from megatron_mesh.runtime.agreement import Reason, from_rank_zero, summarize_reasons, to_rank_zero, with_host

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    step: int
    path: Path
    seconds: float
    """From the start of the save to its publication."""
    stall_seconds: float
    """The part of it in which training waited."""


@dataclass(frozen=True)
class Unsaved:
    """A checkpoint that could not be written."""

    step: int
    reason: str
    steps_at_risk: int
    """Steps since the last complete checkpoint; known on rank 0 only."""


@dataclass
class _Pending:
    """A checkpoint on its way to the disk."""

    step: int
    part: "Future[list[Written]]"
    """This rank's."""
    description: dict[str, Any]
    started: float
    stalled: float = 0.0


class Saver:
    """Writes the checkpoints of a run, one at a time. All methods but ``written`` are collective operations.

    A checkpoint that cannot be written, whatever fails on whichever rank, costs the run nothing but that
    checkpoint: the reason is logged with rank and host, the earlier ones are kept, and the next ``save``
    tries again. ``failed`` says whether the last save failed.
    """

    def __init__(
        self,
        config: Config,
        on_saved: Callable[[Saved], None] = lambda saved: None,
        on_failed: Callable[[Unsaved], None] = lambda unsaved: None,
        loaded_step: int = 0,
    ):
        """Start deleting what a killed run left unfinished.

        Args:
            on_saved, on_failed: called for each checkpoint, on all ranks.
            loaded_step: of the checkpoint that the run has resumed from, which may be elsewhere.
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
            self._delete(names.unfinished(self.directory))

    def save(self, stage: Stage, optimizer: MegatronOptimizer, state: TrainState) -> None:
        """Save the run as it stands; with ``async_save`` this returns when the state is copied."""
        if self._pending is not None:
            self.complete()
        started = time.monotonic()
        phases.enter("planning a save")
        partial = self._partial(state.step)
        if reason := from_rank_zero(lambda: _attempt(lambda: make_empty(partial))):
            self._give_up(state.step, reason)
            return
        described = description(state.state_dict(), dist.get_world_size())
        part = _caught(lambda: self._start(partial, stage, optimizer))
        if dist.get_rank() == 0:
            described["updates"] = updates_done(optimizer)
        self._pending = _Pending(state.step, part, described, started)
        if self.config.checkpoint.async_save:
            self._pending.stalled = time.monotonic() - started
        else:
            self.complete()

    def _partial(self, step: int) -> Path:
        return names.step_directory(self.directory, step).with_suffix(".partial")

    def _start(
        self, partial: Path, stage: Stage, optimizer: MegatronOptimizer
    ) -> "list[Written] | Future[list[Written]]":
        partial.mkdir(parents=True, exist_ok=True)  # a node may not know yet that rank 0 has made it
        path = partial / file_of(dist.get_rank())
        boxes = Content(stage, optimizer).to_write()
        if self.config.checkpoint.async_save:
            return self._writer.start(path, boxes)
        phases.enter("writing")
        return write_file(path, boxes)

    @property
    def pending(self) -> bool:
        """Whether a checkpoint is on its way; the same on all ranks."""
        return self._pending is not None

    def has(self, step: int) -> bool:
        """Whether ``step`` is saved or on its way to the disk; the same on all ranks."""
        return step == (self._pending.step if self._pending is not None else self._published)

    def written(self) -> bool:
        """Whether this rank has nothing more to write of the checkpoint on its way; local."""
        return self._pending is None or self._pending.part.done()

    def complete(self) -> None:
        """Publish the checkpoint on its way, after waiting for all ranks to have written their parts."""
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

        final = names.step_directory(self.directory, pending.step)
        if reason := from_rank_zero(publish):
            self._give_up(pending.step, reason)
            return
        self.failed = False
        self._published = pending.step
        now = time.monotonic()
        stalled = pending.stalled + now - began if pending.stalled else now - pending.started
        self._on_saved(Saved(pending.step, final, now - pending.started, stalled))

    def finish(self) -> None:
        """Publish the checkpoint on its way, if there is one.

        Old ones may still be being deleted; the interpreter waits for that before it exits.
        """
        if self._pending is not None:
            self.complete()

    def _publish(self, final: Path, described: dict[str, Any], written: Iterable[Written]) -> None:
        """On rank 0, when all ranks have written their parts."""
        partial = final.with_suffix(".partial")
        write_small_files(partial, written, dump_config(self.config), described)
        step = described["train_state"]["step"]
        self._delete(names.publish(partial, final, step))
        phases.enter("pruning")
        settings = self.config.checkpoint
        try:
            self._delete(names.outdated(self.directory, step, settings.keep_last, settings.keep_every))
        except OSError as error:  # the new one is complete all the same
            logger.error("old checkpoints in %s cannot be deleted: %s", self.directory, error)

    def _delete(self, paths: Iterable[Path]) -> None:
        """In the background."""
        for path in paths:
            self._pruner.submit(_delete, path)

    def note_validation(self, state: TrainState) -> None:
        """Add the validation loss of this step to its checkpoint, which was saved before; local.

        The checkpoint is complete without it.
        """
        path = names.step_directory(self.directory, state.step)
        if dist.get_rank() or state.valid_loss_step != state.step or not path.is_dir():
            return
        try:
            names.write_validation(path, state.valid_loss)
        except OSError as error:
            logger.warning("the validation loss was not added to %s: %s", path, error)

    def _give_up(self, step: int, reason: str) -> None:
        self.failed = True
        partial, at_risk = self._partial(step), 0
        if dist.get_rank() == 0:
            last = self._last_complete(step)
            at_risk = step - last
            logger.error(
                "no checkpoint of step %d was written to %s: %s; earlier ones are kept (%s), and later saves "
                "try again; steps at risk until then: %d",
                step,
                self.directory,
                reason,
                f"the last is of step {last}" if last else "there is none",
                at_risk,
            )
            shutil.rmtree(partial, ignore_errors=True)
        else:  # rank 0 is removing it, or it is on a disk of this node's own
            with suppress(OSError):
                (partial / file_of(dist.get_rank())).unlink(missing_ok=True)
                partial.rmdir()
        self._on_failed(Unsaved(step, reason, at_risk))

    def _last_complete(self, step: int) -> int:
        """Step of the last complete checkpoint before ``step``; 0 if there is none to be seen."""
        try:
            steps = [saved for saved in names.saved_steps(self.directory) if saved <= step]
        except OSError:
            steps = []
        return max(steps, default=self._loaded_step)


def _delete(path: Path) -> None:
    phases.enter("deleting")
    try:
        shutil.rmtree(path)
    except FileNotFoundError:  # somebody was faster
        pass
    except OSError as error:
        logger.error("%s cannot be deleted: %s; the next start tries again", path, error)


def _caught(work: Callable[[], Any]) -> "Future[list[Written]]":
    """What ``work`` returns, or raises, as a future; what is one stays it."""
    future: Future[list[Written]] = Future()
    try:
        result = work()
    # Whatever it is (memory, the disk, an error of torch's), it must not end the run on one rank alone.
    except Exception as error:
        future.set_exception(error)
        return future
    if isinstance(result, Future):
        return result
    future.set_result(result)
    return future


_Outcome = tuple[list[Written], Reason]


def _outcome(part: "Future[list[Written]]") -> _Outcome:
    """What this rank has written, or why not."""
    error = part.exception()
    if error is None:
        return part.result(), None
    if not isinstance(error, OSError):
        logger.error("this rank's part of a checkpoint was not written", exc_info=error)
    return [], with_host(_cause(error))


def _cause(error: BaseException) -> str:
    """The error without its path, which differs between ranks. The message names the directory."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return f"{type(error).__name__}: {error}"


def _attempt(work: Callable[[], object]) -> str:
    """Let rank 0, which calls this, do ``work``; returns why it could not, or ""."""
    return "; ".join(summarize_reasons([_outcome(_caught(work))[1]]))


def write_small_files(
    directory: Path, written: Iterable[Written], config: str, described: dict[str, Any]
) -> None:
    """Write the files beside the tensors that all ranks have written, and the checksums of all.

    Raises:
        OSError: the disk will not have them, or what the ranks wrote is not all here.
    """
    digests: integrity.Digests = {}
    listed = sorted(written, key=lambda w: (w.piece.file, w.piece.start))
    for entry in listed:
        digests.setdefault(entry.piece.file, []).append((entry.piece.length, entry.piece.sha256 or ""))
    phases.enter("checks")
    if missing := integrity.differences(directory, digests, read=False):
        raise OSError(
            f"{'; '.join(missing)} in {directory}: not all ranks' files are seen on {socket.gethostname()}; "
            "--save must be on a disk that all nodes share"
        )
    small = {
        INDEX_FILE: index_file(index_of(directory, listed)),
        names.CONFIG_FILE: config.encode(),
        names.STATE_FILE: strict_json.dumps(described, indent=2).encode(),
    }
    for name, content in small.items():
        (directory / name).write_bytes(content)
        digests[name] = [(len(content), integrity.sha256(content))]
    integrity.write_checksums(directory, digests)


def make_empty(directory: Path) -> None:
    """Make ``directory``, without what a killed run may have left there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def description(train_state: dict[str, Any], world_size: int = 1) -> dict[str, Any]:
    """Contents of the state file: format, versions, and ``TrainState.state_dict``."""
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
