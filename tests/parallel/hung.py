"""Runs of ``pretrain`` in which one rank hangs in a given phase."""

import os
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_mesh.config.schema import Config
from tests.parallel.forked import Rank, start_ranks

HANG_SECONDS = 20.0
"""How long the rank hangs. If nothing ends the run meanwhile, it then continues normally."""


def start_hung_run(config: Config, phase: str, victim: int, directory: Path) -> list[Rank]:
    """Start a run on two processes, without waiting for it.

    Args:
        config: resolved for two ranks.
        phase: the phase in which ``victim`` hangs, once (``runtime/phases.py``).
        directory: where the ranks' stderr is written.
    """
    return start_ranks(_run, [(config, phase if rank == victim else "") for rank in range(2)], directory)


def _run(rank: int, config: Config, phase: str) -> None:
    from megatron_mesh.checkpoint.writer import BackgroundWriter
    from megatron_mesh.runtime import phases
    from megatron_mesh.train import pretrain

    left, start = [phase], BackgroundWriter.start

    def hang(entered: str) -> None:
        if entered in left:
            left.clear()
            time.sleep(HANG_SECONDS)

    def write_at_once(*args: Any) -> Any:
        part = start(*args)
        # The checkpoint is then published after the next step, unless this rank hangs while writing.
        wait([part], timeout=1.0)
        return part

    phases.listen(hang)
    with patch.object(BackgroundWriter, "start", write_at_once):
        ending = pretrain(config)
    os._exit(ending)
