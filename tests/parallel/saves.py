"""Saves and loads in which one rank fails. Runs in workers."""

import errno
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mesh.checkpoint import save as save_module
from megatron_mesh.checkpoint import writer
from megatron_mesh.checkpoint.directory import saved_steps
from megatron_mesh.checkpoint.load import Search
from megatron_mesh.checkpoint.save import Saver
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import distributed
from megatron_mesh.runtime.distributed import model_parallel_groups
from tests.helpers import tiny_config
from tests.parallel.resume import _train
from tests.parallel.training import build, settings_of

FAULTS: dict[str, Callable[[], Exception]] = {
    "no space": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "no permission": lambda: PermissionError(errno.EACCES, "Permission denied"),
    "host memory": lambda: MemoryError("cannot allocate"),
    "the GPU's memory": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "torch": lambda: RuntimeError("an error of torch's"),
}
"""Created anew each time, because an exception holds references to the frames, and so to a whole run."""


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def one_rank_fails(
    directory: Path, case: dict[str, Any], victim: int, place: str, fault: str, background: bool
) -> dict[str, Any]:
    """Train and save after every step; the second save fails on ``victim``. Return what this rank has seen.

    Args:
        place: the function of ``checkpoint/save.py`` that fails.
        fault: one of ``FAULTS``.
    """
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    settings = replace(config.checkpoint, save=str(directory), async_save=background)
    config = replace(config, checkpoint=settings)
    recorder = _Recorder()
    logging.getLogger("megatron_mesh").addHandler(recorder)
    module = writer if background and place == "write_file" else save_module
    original, calls = getattr(module, place), itertools.count(1)

    def second_fails(*arguments: Any) -> Any:
        if dist.get_rank() == victim and next(calls) == 2:
            if place == "write_file":
                arguments[0].write_bytes(b"half")
            raise FAULTS[fault]()
        return original(*arguments)

    failed = []
    try:
        with model_parallel_groups(config), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, place, second_fails)
            parts = build(config)
            saver = Saver(config)
            losses = []
            for step in (1, 2, 3):
                losses += _train(config, *parts, last=step)
                saver.save(*parts)
                saver.finish()
                failed.append(saver.failed)
    finally:
        logging.getLogger("megatron_mesh").removeHandler(recorder)
    return {
        "losses": losses,
        "failed": failed,
        "steps": list(saved_steps(directory)),
        "heard": recorder.messages,
    }


def one_rank_sees_no_checkpoint(directory: Path, victim: int) -> str:
    """Search for a checkpoint that ``victim`` doesn't see; return this rank's error message."""
    config = tiny_config(world_size=dist.get_world_size())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == victim:
            patch.setattr(os.path, "isdir", lambda path: False)
        try:
            Search(replace(config.checkpoint, load=str(directory))).next()
        except UserError as error:
            return str(error)
    return ""


def save_to_separate_disks(directory: Path, case: dict[str, Any]) -> tuple[list[str], bool]:
    """Save to a different directory on every rank, as on nodes without a shared disk."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    own = directory / str(dist.get_rank())
    config = replace(config, checkpoint=replace(config.checkpoint, save=str(own)))
    recorder = _Recorder()
    logging.getLogger("megatron_mesh").addHandler(recorder)
    try:
        with model_parallel_groups(config):
            saver = Saver(config)
            saver.save(*build(config))
    finally:
        logging.getLogger("megatron_mesh").removeHandler(recorder)
    return recorder.messages, any(own.iterdir())


def collective_timeout(save_timeout_minutes: float) -> timedelta:
    """Return how long a rank waits for the others in a save."""
    config = tiny_config(world_size=dist.get_world_size(), save_timeout_minutes=save_timeout_minutes)
    with model_parallel_groups(config):
        assert distributed._group is not None
        return distributed._group._get_backend(torch.device("cpu")).options._timeout
