"""Start the processes of a job, give them Megatron's groups, and take both down again.

Exchange Python objects between ranks, when a run starts and when it saves.

The messages use a separate gloo group. They need no GPU memory, and its timeout is long enough for a save on
a slow rank.
"""

import gc
import resource
import socket
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_mesh.config.placement import virtual_stages
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import RanksLost, UserError
from megatron_mesh.runtime import device, exits, phases
from megatron_mesh.runtime.environment import (
    rank_from_environment,
    world_size_from_environment,
)
from megatron_mesh.runtime.failures import RUNNING, Failures, describe_rank, resumes
from megatron_mesh.runtime.health import Health, report_failure, watched
from megatron_mesh.runtime.rendezvous import Meeting, PortTaken

OPEN_FILES = 65_536
"""Limit that is enough for 16,384 ranks."""


@contextmanager
def process_groups(config: Config) -> Iterator[Health]:
    """Start torch.distributed and Megatron's groups, and seed the generators; take the groups down on exit.

    Plain python is a world of one process, which needs no address. Inside, a rank that fails or hangs ends
    the job (``health.py``).
    """
    phases.enter("groups")
    gc.collect()  # models and groups of an earlier run refer to each other
    device.prepare()
    if config.training.deterministic_mode:
        device.be_deterministic()
    allow_many_files()
    timeout = timedelta(minutes=config.parallel.distributed_timeout_minutes)
    world, rank = world_size_from_environment(), rank_from_environment()
    store = shared_store(config, rank, world, timeout) if world > 1 else dist.HashStore()
    # A second connection: the watchdog uses it while this thread may be waiting for an answer on the first.
    own_store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    health = Health(rank, world, failures_of(config, own_store))
    try:
        with watched(health, config.parallel.watchdog_timeout_minutes), report_failure(health):
            dist.init_process_group(
                device.backend(), store=store, rank=rank, world_size=world, timeout=timeout
            )
            with model_parallel_groups(config):
                yield health
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def allow_many_files() -> None:
    """Raise this process's limit of open files as far as allowed.

    Rank 0 has two connections from every rank to its store, and one connection of gloo for each group that it
    shares with another rank. With 512 ranks that exceeds the usual limit of 1,024.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def shared_store(config: Config, rank: int, world: int, timeout: timedelta) -> dist.Store:
    """Open the job's store, and return when all ranks have connected to it.

    Raises:
        UserError: the address where the ranks meet is unknown or cannot be used.
        SystemExit: a rank is missing or has failed. The error has been reported.
    """
    meeting = None
    try:
        meeting = Meeting(rank, world, timeout)
        meeting.start()
        return meeting.store
    except RanksLost as error:
        failures = failures_of(config, meeting.store if meeting else None)
        failures.report(describe_rank(rank, world), str(error), RUNNING)
        if meeting is not None:
            meeting.leave()
        sys.exit(exits.CRASHED)
    except PortTaken:
        if rank > 1:  # every rank sees this; ranks 0 and 1 report it, because the ranks cannot agree on one
            sys.exit(exits.BAD_INPUT)
        raise


def failures_of(config: Config, store: dist.Store | None) -> Failures:
    """The object by which the ranks of this run report failures to each other."""
    settings = config.checkpoint
    return Failures(store, settings.save, resumes(settings.save, settings.load, settings.finetune))


@contextmanager
def model_parallel_groups(config: Config) -> Iterator[None]:
    """Make Megatron's groups for the rank layout of ``config``, once torch.distributed is initialized."""
    parallel, seed = config.parallel, config.training.seed
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        virtual_pipeline_model_parallel_size=virtual_stages(config.model, parallel),
        distributed_timeout_minutes=int(max(1, parallel.distributed_timeout_minutes)),
        create_gloo_process_groups=False,  # used by Megatron's checkpoints, but not by ours
    )
    try:
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        # The watchdog ends a save that takes too long, and prints every rank's stacks. So wait longer than it
        # does.
        slowest = max(parallel.distributed_timeout_minutes, config.checkpoint.save_timeout_minutes + 5)
        with separate_group(slowest):
            yield
    finally:
        parallel_state.destroy_model_parallel()


def is_rank_zero() -> bool:
    """Whether this process is rank 0, which logs for the whole job. True before any group exists."""
    return not dist.is_initialized() or dist.get_rank() == 0


_Result = TypeVar("_Result")

Reason = tuple[str, str] | None
"""Why a rank cannot continue, and the name of its host."""

_group: dist.ProcessGroup | None = None
"""None means the default group."""


@contextmanager
def separate_group(minutes: float) -> Iterator[None]:
    """Use a separate gloo group of all ranks for the exchanges inside; a collective operation.

    Args:
        minutes: how long a rank waits for the others before it fails.
    """
    global _group
    if _alone():
        yield
        return
    before, _group = _group, dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))
    dist.barrier(_group)  # a rank that leaves early would break connections that others are still making
    try:
        yield
    finally:
        group, _group = _group, before
        dist.destroy_process_group(group)


def from_rank_zero(make: Callable[[], _Result]) -> _Result:
    """Return on every rank what ``make`` returns on rank 0; a collective operation.

    Raises:
        UserError: ``make`` raised it on rank 0; every rank raises it.
    """
    if _alone():
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0, group=_group)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def from_every_rank(value: _Result) -> list[_Result]:
    """Return the ``value`` of each rank, in rank order; a collective operation."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_group)
    return values


def to_rank_zero(value: _Result) -> list[_Result]:
    """Return the ``value`` of each rank on rank 0, an empty list on the others; a collective operation."""
    if _alone():
        return [value]
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0, group=_group)
    return values or []


def with_host(reason: str | None) -> Reason:
    """``reason`` with the name of this rank's host."""
    return None if reason is None else (reason, socket.gethostname())


def summarize_reasons(reasons: Sequence[Reason], at_most: int = 5) -> list[str]:
    """List each distinct reason once, with the first rank and host that gave it.

    Args:
        reasons: those of all ranks, in rank order.
        at_most: how many to spell out; the others are counted.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for number, reason in enumerate(reasons):
        if reason is not None:
            text, host = reason
            found[text].append(f"rank {number} on {host}")
    sentences = [
        f"{text} ({places[0]}{f' and {others} more' if (others := len(places) - 1) else ''})"
        for text, places in found.items()
    ]
    left = len(sentences) - at_most
    return sentences if left <= 0 else [*sentences[:at_most], f"and {left} more reasons"]


def gather_reasons(reason: str | None) -> list[str]:
    """Collect every rank's ``reason``, or None, and list the distinct ones; a collective operation."""
    return summarize_reasons(from_every_rank(with_host(reason)))


def on_every_rank(make: Callable[[], _Result]) -> _Result:
    """Call ``make`` on each rank; a collective operation.

    Raises:
        UserError: ``make`` raised a UserError or an OSError on some rank. Every rank raises the first one,
            with the name of its rank and host.
    """
    result, problem = None, ""
    try:
        result = make()
    except (UserError, OSError) as error:
        if _alone() and isinstance(error, UserError):
            raise
        problem = f"{error} (rank {rank()} on host {socket.gethostname()})"
    if problem := next(filter(None, from_every_rank(problem)), ""):
        raise UserError(problem)
    return result  # type: ignore[return-value]


def rank() -> int:
    """Index of this process, 0 without torch.distributed."""
    return 0 if _alone() else dist.get_rank()


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
