"""Runs of ``pretrain`` in which one rank stands still in a phase, and how each rank ends."""

import multiprocessing
import os
import time
from concurrent.futures import wait
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_mesh.config.schema import Config
from tests.parallel.pool import free_port

STANDS_STILL = 20.0
"""Seconds after which the rank goes on and the run ends well, if nothing ends it before."""


@dataclass
class HungRun:
    """A run under way on two processes.

    Args:
        config: resolved for two ranks.
        phase: where ``victim`` stands still, once (``runtime/phases.py``).
        directory: gets what the ranks print.
    """

    config: Config
    phase: str
    victim: int
    directory: Path
    processes: list[BaseProcess] = field(default_factory=list)

    def start(self) -> "HungRun":
        """Start the ranks, and return."""
        context, port = multiprocessing.get_context("forkserver"), free_port()
        context.set_forkserver_preload(["megatron_mesh.train"])
        for rank in range(2):
            phase = self.phase if rank == self.victim else ""
            process = context.Process(target=_run, args=(rank, port, self.config, phase, self._log(rank)))
            process.start()
            self.processes.append(process)
        return self

    def end(self) -> tuple[list[int | None], list[str]]:
        """Wait for the end: exit codes, and what each rank printed to stderr."""
        for process in self.processes:
            process.join(120)
            process.kill()
        return [p.exitcode for p in self.processes], [self._log(rank).read_text() for rank in range(2)]

    def _log(self, rank: int) -> Path:
        return self.directory / f"{rank}.log"


def _run(rank: int, port: int, config: Config, phase: str, log: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    import torch

    from megatron_mesh.checkpoint.writer import BackgroundWriter
    from megatron_mesh.runtime import phases
    from megatron_mesh.train import pretrain

    torch.set_num_threads(1)
    left, start = [phase], BackgroundWriter.start

    def stand_still(entered: str) -> None:
        if entered in left:
            left.clear()
            time.sleep(STANDS_STILL)

    def written_at_once(*args: Any) -> Any:
        part = start(*args)
        # The checkpoint is then published after the next step, unless this rank stands still in writing.
        wait([part], timeout=1.0)
        return part

    phases.listen(stand_still)
    with patch.object(BackgroundWriter, "start", written_at_once):
        ending = pretrain(config)
    os._exit(ending)
