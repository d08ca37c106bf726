"""Start the ranks of a separate job as forks, which saves seconds for importing torch and Megatron."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.parallel.pool import free_port


@dataclass
class Rank:
    """One process of a job."""

    process: BaseProcess
    stderr: Path

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, seconds: float) -> int | None:
        """Wait for the process to end; return its exit code, or None if it is still running."""
        self.process.join(seconds)
        return self.process.exitcode


def start_ranks(
    function: Callable[..., None], arguments: Sequence[tuple[Any, ...] | None], directory: Path
) -> list[Rank]:
    """Start a process for each of ``arguments``, which calls ``function(rank, *arguments)``, without waiting.

    Args:
        arguments: one tuple per rank; None for a rank that is never started.
        directory: where the ranks' stderr is written.
    """
    context, port, size = multiprocessing.get_context("forkserver"), free_port(), len(arguments)
    context.set_forkserver_preload(["tests.preload"])
    ranks = []
    for rank, own in enumerate(arguments):
        if own is None:
            continue
        stderr = directory / f"rank{rank}.stderr"
        process = context.Process(target=_run, args=(function, rank, size, port, own, stderr))
        process.start()
        ranks.append(Rank(process, stderr))
    return ranks


def end_ranks(ranks: list[Rank], seconds: float = 300) -> tuple[list[int | None], list[str]]:
    """Wait for all processes to end; return their exit codes and stderr."""
    for rank in ranks:
        rank.wait(seconds)
        rank.process.kill()
        rank.process.join()
    return [rank.process.exitcode for rank in ranks], [rank.stderr.read_text() for rank in ranks]


def hurry() -> None:
    """Make this rank notice sooner than in production that another has ended."""
    from megatron_mesh.runtime import health

    health.LISTEN_SECONDS, health.LINGER_SECONDS = 0.3, 3.0


def _run(
    function: Callable[..., None], rank: int, size: int, port: int, arguments: tuple[Any, ...], stderr: Path
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), 2)
    import torch

    hurry()
    torch.set_num_threads(1)
    try:
        function(rank, *arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
