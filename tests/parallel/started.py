"""Run ``pretrain`` on several ranks, and record what each rank does before its first step."""

import logging
import multiprocessing
import os
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mesh.config.schema import Config


@dataclass
class Start:
    """What one rank did before its first step."""

    opened: Counter[str] = field(default_factory=Counter)
    """How often it opened or listed each path: ``PATH`` if opened, ``PATH/`` if listed."""
    messages: list[str] = field(default_factory=list)
    """Log messages of the package until the end of the run."""
    ending: int = -1

    def count(self, directory: Path) -> int:
        """Count the opened files and listed directories at or below ``directory``."""
        return sum(n for path, n in self.opened.items() if Path(path).is_relative_to(directory))


def start(config: Config, world_size: int) -> list[Start]:
    """Run ``pretrain`` on ``world_size`` processes; return what each rank did before its first step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    results: Any = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(rank, world_size, port, config, results))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    starts = dict(results.get() for _ in processes)
    for process in processes:
        process.join(60)
    return [starts[rank] for rank in range(world_size)]


def _run(rank: int, world_size: int, port: int, config: Config, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from megatron_mesh.runtime import phases
    from megatron_mesh.runtime.phases import log_start_times
    from megatron_mesh.runtime.run_files import OWNER_FILE
    from megatron_mesh.train import pretrain
    from tests.parallel.forked import hurry

    hurry()
    torch.set_num_threads(1)
    found, stepping = Start(), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.messages.append(record.getMessage())

    package = logging.getLogger("megatron_mesh")
    package.handlers, package.propagate = [Keep()], False
    package.setLevel(logging.INFO)

    def note(event: str, args: tuple[Any, ...]) -> None:
        if (
            event in ("open", "os.listdir", "os.scandir")
            and not stepping
            and isinstance(args[0], str | os.PathLike)
            and OWNER_FILE not in os.fspath(args[0])  # rank 0 checks it every few seconds
        ):
            found.opened[os.fspath(args[0])] += 1

    phases.listen(lambda phase: stepping.append(phase) if phase == "step" else None)
    log_start_times()
    sys.addaudithook(note)
    try:
        found.ending = pretrain(config)
    finally:
        results.put((rank, found))
