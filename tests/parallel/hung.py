"""Runs of ``pretrain`` in which one rank stands still in a phase."""

import os
import time
from concurrent.futures import wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megatron_mesh.config.schema import Config
from tests.parallel.forked import Rank, start_ranks

STANDS_STILL = 20.0
"""Seconds after which the rank goes on and the run ends well, if nothing ends it before."""


def start_hung_run(config: Config, phase: str, victim: int, directory: Path) -> list[Rank]:
    """Start a run on two processes, and return.

    Args:
        config: resolved for two ranks.
        phase: where ``victim`` stands still, once (``runtime/phases.py``).
        directory: gets what the ranks print.
    """
    return start_ranks(_run, [(config, phase if rank == victim else "") for rank in range(2)], directory)


def _run(rank: int, config: Config, phase: str) -> None:
    from megatron_mesh.checkpoint.writer import BackgroundWriter
    from megatron_mesh.runtime import phases
    from megatron_mesh.train import pretrain

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
