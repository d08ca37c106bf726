"""Saving: written under a temporary name, checked, published by one rename; now or in the background."""

import json
import logging
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import __version__ as megatron_core_version
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mesh import __version__
from megatron_mesh.checkpoint import directory as names
from megatron_mesh.checkpoint import integrity, safe
from megatron_mesh.checkpoint.content import sharded_state
from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.checkpoint.writer import CommonState, digests_file, plan
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.schema import Config
from megatron_mesh.parallel import Stage

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


@dataclass
class _Pending:
    """A checkpoint on its way to the disk."""

    step: int
    request: AsyncRequest
    common: CommonState
    description: dict[str, Any]
    started: float
    stalled: float


class Saver:
    """Writes the checkpoints of a run, one at a time. Every method but ``written`` is a collective operation.

    A checkpoint that cannot be written costs the run nothing but that checkpoint: the reason is logged,
    the earlier ones are kept, and the next ``save`` tries again. ``failed`` tells of the last one.
    """

    def __init__(self, config: Config, on_saved: Callable[[Saved], None] = lambda saved: None):
        """``on_saved`` is called when a checkpoint is complete."""
        assert config.checkpoint.save is not None
        self.config = config
        self.directory = Path(config.checkpoint.save)
        self.failed = False
        self._on_saved = on_saved
        self._caller = TemporalAsyncCaller()
        self._pending: _Pending | None = None

    def save(self, stage: Stage, optimizer: MegatronOptimizer, state: TrainState) -> None:
        """Save the run as it stands; with ``async_save`` this returns when the state is copied."""
        self.finish()
        started = time.monotonic()
        partial = names.step_directory(self.directory, state.step).with_suffix(".partial")
        if not self._agreed(lambda: make_empty(partial), partial):
            return
        with _without_notes(), stage.parameters_gathered():
            request, common = plan(sharded_state(stage, optimizer, with_generators=True), partial)
            request = staged(request)
        self._pending = _Pending(state.step, request, common, description(state.state_dict()), started, 0.0)
        if self.config.checkpoint.async_save:
            self._caller.schedule_async_call(request)
            self._pending.stalled = time.monotonic() - started
        else:
            write_now(request)
            self._complete()

    @property
    def pending(self) -> bool:
        """Whether a background save is under way: the same on all ranks."""
        return self._pending is not None

    def written(self) -> bool:
        """Whether this rank's part of the background save is done, or there is none. Not collective."""
        process = self._caller.process
        return process is None or not process.is_alive()

    def complete(self) -> None:
        """Publish the background save, which all ranks have ``written``."""
        self._caller.is_current_async_call_done(blocking=True, no_dist=True)
        self._complete()

    def finish(self) -> None:
        """Wait for the checkpoint in the background, if there is one, and publish it."""
        if self._pending is not None:
            self._caller.is_current_async_call_done(blocking=True)
            self._complete()

    def _complete(self) -> None:
        """What comes after the writing: Megatron's lists, ours, and the name."""
        pending, self._pending = self._pending, None
        assert pending is not None
        began = time.monotonic()
        final = names.step_directory(self.directory, pending.step)
        try:
            pending.request.finalize_fns[0]()
        except CheckpointException as error:
            # Raised by all ranks alike; rank 0, which coordinates, has the reasons.
            self._give_up(final.with_suffix(".partial"), safe.reasons(error))
            return
        if not self._agreed(lambda: self._publish(final, pending), final.with_suffix(".partial")):
            return
        self.failed = False
        now = time.monotonic()
        stalled = pending.stalled + now - began if pending.stalled else now - pending.started
        self._on_saved(Saved(pending.step, final, now - pending.started, stalled))

    def _publish(self, final: Path, pending: _Pending) -> None:
        partial = final.with_suffix(".partial")
        complete(partial, pending.common, dump_config(self.config), pending.description)
        names.publish(partial, final, pending.step)
        settings = self.config.checkpoint
        try:
            names.prune(self.directory, pending.step, settings.keep_last, settings.keep_every)
        except OSError as error:  # the new one is complete all the same
            logger.error("old checkpoints in %s cannot be deleted: %s", self.directory, error)

    def _agreed(self, work: Callable[[], None], partial: Path) -> bool:
        """Let rank 0 do ``work`` on the disk; False, on all ranks, if the disk would not have it."""
        reason = None
        if dist.get_rank() == 0:
            try:
                work()
            except OSError as error:
                reason = str(error)
        box = [reason]
        dist.broadcast_object_list(box, src=0)
        if box[0] is not None:
            self._give_up(partial, box[0])
        return box[0] is None

    def _give_up(self, partial: Path, reason: str) -> None:
        self.failed = True
        if dist.get_rank() == 0:
            logger.error(
                "no checkpoint was written to %s: %s; earlier ones are kept, and the next save tries again",
                self.directory,
                reason,
            )
            shutil.rmtree(partial, ignore_errors=True)


def complete(directory: Path, common: CommonState, config: str, description: dict[str, Any]) -> None:
    """Write the small files beside the tensors that all ranks have written, and the checksums of all.

    Raises:
        OSError: the disk will not have them, or what the ranks wrote is not all there.
    """
    known: dict[str, integrity.Digest] = {}
    for rank in range(dist.get_world_size()):
        path = digests_file(directory, rank)
        if path.exists():
            known |= json.loads(path.read_text(encoding="utf-8"))
            path.unlink()
    common.write(directory)
    (directory / names.CONFIG_FILE).write_text(config, encoding="utf-8")
    (directory / names.STATE_FILE).write_text(json.dumps(description, indent=2), encoding="utf-8")
    safe.check_files(directory)
    integrity.write_checksums(directory, known)


def staged(request: AsyncRequest) -> AsyncRequest:
    """``request`` with its tensors copied from the GPU; hold it until they are written.

    The copies are in pinned memory, which a forked writer shares with the trainer. Megatron's caller drops
    them once the writer is started, and then the next batch that is pinned could be written over them.
    """
    if request.preload_fn is None:  # nothing to write on this rank
        return request
    rank, _, results = request.async_fn_args
    return request._replace(async_fn_args=(rank, request.preload_fn(), results), preload_fn=None)


def write_now(request: AsyncRequest) -> None:
    """Write this rank's tensors, which are ``staged``, in this process."""
    if request.async_fn is not None:
        request.async_fn(*request.async_fn_args)


def make_empty(directory: Path) -> None:
    """Make ``directory``, without what a killed run may have left there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


@contextmanager
def _without_notes() -> Iterator[None]:
    """Keep back what torch tells Megatron-core's authors of names that it will drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def description(train_state: dict[str, Any]) -> dict[str, Any]:
    """Contents of the state file: format, versions, and ``TrainState.state_dict``."""
    return {
        "format_version": names.FORMAT_VERSION,
        "world_size": dist.get_world_size(),
        "versions": {
            "megatron_mesh": __version__,
            "megatron_core": megatron_core_version,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "train_state": train_state,
    }
