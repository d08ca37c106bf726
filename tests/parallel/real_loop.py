"""Run the real loop, watched step by step or with a fault, or only the ranks' agreement. Runs in workers."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megatron_mesh.checkpoint import writer
from megatron_mesh.checkpoint.save import Saver
from megatron_mesh.config.schema import Config
from megatron_mesh.metrics.log import Log
from megatron_mesh.metrics.meters import SpeedMeter
from megatron_mesh.parallel import Stage
from megatron_mesh.runtime import device
from megatron_mesh.runtime.distributed import model_parallel_groups
from megatron_mesh.runtime.health import Health
from megatron_mesh.runtime.stopping import StopRequests
from megatron_mesh.train import loop, pretrain
from megatron_mesh.train import step as step_module
from megatron_mesh.train.output import open_outputs
from megatron_mesh.train.vote import Vote, agree
from tests.helpers import loss_per_token, tiny_config
from tests.parallel.training import batches_of, build, settings_of
from tests.parallel.watch import Seen, Watch


def config_of(corpus: str, case: dict[str, Any]) -> Config:
    """Configure a tiny run on ``corpus`` that logs every third step."""
    data = {"data_path": [corpus], "num_workers": 0, "log_interval": 3, "eval_interval": 0}
    return tiny_config(world_size=dist.get_world_size(), **settings_of({**data, **case}))


class _StepByStep(Health):
    """Calls ``before`` with each step's number, then starts a new count."""

    def __init__(self, watch: Watch, before: Callable[[int], None] = lambda step: None):
        super().__init__(dist.get_rank(), dist.get_world_size(), None)
        self.watch, self.before = watch, before
        self.steps: dict[int, Seen] = {}

    def beat(self, where: str | None = None) -> None:
        super().beat(where)
        if where is not None and where.startswith("step "):
            step = int(where.split()[1])
            self.before(step)
            self.steps[step] = self.watch.seen = Seen()


class BackgroundSave:
    """Replaces the Saver with a fake background save, in which this rank writes for ``steps`` steps."""

    def __init__(self, steps: int):
        self.pending, self.failed = True, False
        self.completed_after: list[int] = []
        """Number of votes that had been cast when the save was completed."""
        self._steps, self._votes = steps, 0

    def written(self) -> bool:
        self._votes += 1
        return self._votes > self._steps

    def has(self, step: int) -> bool:
        return False

    def complete(self) -> None:
        self.completed_after.append(self._votes)
        self.pending = False

    def save(self, *parts: Any) -> None:
        """Do nothing for the save after the last step."""

    def finish(self) -> None:
        """Do nothing at the end of the run."""

    def note_validation(self, state: Any) -> None:
        """Ignore the validation loss of the last step."""


def watch_steps(corpus: str, case: dict[str, Any]) -> tuple[dict[int, Seen], list[int]]:
    """Train 6 steps during a background save, in which the last rank writes until the fifth step.

    Returns:
        What this rank did in each step, and the steps after which it completed a checkpoint.
    """
    config = config_of(corpus, {"train_iters": 6, **case})
    saver = BackgroundSave(4 if dist.get_rank() == dist.get_world_size() - 1 else 0)
    with model_parallel_groups(config), patch.object(loop, "open_saver", lambda *parts: saver):
        run = loop.build_run(config)
        with Watch() as watch:
            health = _StepByStep(watch)
            loop.train(run, Log(), health, StopRequests(config.checkpoint, time.monotonic()))
    return health.steps, saver.completed_after


def stop_in_evaluation(corpus: str, directory: Path) -> tuple[int, int, dict[str, int], dict[str, int]]:
    """Evaluate 50 batches after step 2 of 4; the last rank gets a stop request in the third batch.

    Returns:
        The exit status, the number of evaluated batches, and their collectives and waits.
    """
    settings = {"train_iters": 4, "eval_interval": 2, "eval_iters": 50, "split": "40,60,0"}
    config = config_of(corpus, {"layers": "1+1R2+1", **settings, "save": str(directory)})
    stop, batches = StopRequests(config.checkpoint, time.monotonic()), 0
    seen = Seen()

    class Asking(Health):
        def beat(self, where: str | None = None) -> None:
            nonlocal batches, seen
            super().beat(where)
            if where is not None and where.endswith("of an evaluation"):
                batches += 1
                seen = watch.seen = Seen() if batches == 1 else seen
                if batches == 3 and dist.get_rank() == dist.get_world_size() - 1:
                    stop._note(signal.SIGTERM, None)
            elif where is not None and where.startswith("the save"):
                watch.seen = Seen()

    with model_parallel_groups(config), Watch() as watch:
        run = loop.build_run(config)
        with open_outputs(config, run.state) as log:
            health = Asking(dist.get_rank(), dist.get_world_size(), None)
            ending = loop.train(run, log, health, stop)
    return ending, batches, dict(seen.collectives), dict(seen.waits)


@dataclass
class Watched:
    """What one rank did in a run with the real Saver and the real Log."""

    steps: dict[int, Seen] = field(default_factory=dict)
    pending: list[int] = field(default_factory=list)
    """Steps that began while a save was in progress."""
    writing: list[int] = field(default_factory=list)
    """Steps that began while this rank was still writing its part."""


def watch_saves(corpus: str, case: dict[str, Any], directory: Path, release: int) -> tuple[Watched, Watched]:
    """Train 8 steps without checkpoints, then 8 steps with background saves after steps 4 and 8.

    We hold back the last rank's first write until step ``release``; it finishes before that step begins. So
    all ranks publish the checkpoint after that step.
    """
    logged = {**case, "train_iters": 8, "output_dir": str(directory / "without")}
    saved = {"output_dir": str(directory / "with"), "save": str(directory / "with"), "async_save": True}
    return (
        _watched(config_of(corpus, logged), release),
        _watched(config_of(corpus, {**logged, **saved, "save_interval": 4}), release),
    )


def _watched(config: Config, release: int) -> Watched:
    found, savers = Watched(), list[Saver]()
    with model_parallel_groups(config), _slow_writes() as (parts, released), Watch() as watch:
        open_saver = loop.open_saver

        def keep(*args: Any) -> Saver | None:
            saver = open_saver(*args)
            savers.extend([saver] if saver is not None else [])
            return saver

        def before(step: int) -> None:
            if step == release:
                released.set()
                for part in parts:
                    part.result()
            if savers and savers[0].pending:
                found.pending.append(step)
                found.writing.extend([step] if not parts[-1].done() else [])

        run, health = loop.build_run(config), _StepByStep(watch, before)
        with patch.object(loop, "open_saver", keep), open_outputs(config, run.state) as log:
            loop.train(run, log, health, StopRequests(config.checkpoint, time.monotonic()))
    found.steps = health.steps
    return found


@contextmanager
def _slow_writes() -> Iterator[tuple[list["Future[Any]"], threading.Event]]:
    """Collect what this rank writes in the background. On the last rank, each write waits for the event."""
    parts: list[Future[Any]] = []
    released = threading.Event()
    start, write_file = writer.BackgroundWriter.start, writer.write_file

    def started(*args: Any) -> "Future[Any]":
        parts.append(start(*args))
        return parts[-1]

    def slow(*args: Any) -> Any:
        assert dist.get_rank() < dist.get_world_size() - 1 or released.wait(60)
        return write_file(*args)

    with (
        patch.object(writer.BackgroundWriter, "start", started),
        patch.object(writer, "write_file", slow),
    ):
        yield parts, released


@contextmanager
def poisoned(kind: str, step: int) -> Iterator[None]:
    """Make a value on this rank non-finite in step ``step`` (from 1).

    Args:
        kind: "loss" (the reported loss, with finite gradients), "own gradient" (before the reduction, with a
            finite reported loss), or "reduced gradient" (after the reduction, so that no other replica has
            it).
    """
    count, run_batch, masked_loss = 0, step_module.run_batch, step_module.masked_loss

    def nan_gradient(loss_mask: Tensor, losses: Tensor) -> step_module.LossReport:
        total, tokens, report = masked_loss(loss_mask, losses)
        return (total * math.nan if count == step else total), tokens, report

    def run(stage: Stage, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        totals = run_batch(stage, *args, **kwargs)
        if count == step and kind == "reduced gradient":
            for buffer in (buffer for group in stage.groups for buffer in group.buffers):
                buffer.grad_data.fill_(math.nan)
        return totals * math.inf if count == step and kind == "loss" else totals

    loss = nan_gradient if kind == "own gradient" else masked_loss
    with patch.object(step_module, "run_batch", run), patch.object(step_module, "masked_loss", loss):
        yield


def pretrained(
    corpus: str, port: int, case: dict[str, Any], directory: Path, fault: tuple[str, int] | None
) -> tuple[int, dict[str, Tensor], list[dict[str, Any]]]:
    """Run ``pretrain()`` on all processes, with a fault on the last one.

    Args:
        port: a free port for the ranks to meet.
        fault: arguments of ``poisoned``.

    Returns:
        The exit status, this rank's weights, and the records of metrics.jsonl.
    """
    config = config_of(corpus, {**case, "log_interval": 1, "output_dir": str(directory)})
    last = dist.get_rank() == dist.get_world_size() - 1
    dist.barrier()  # otherwise a rank might leave before all are connected
    dist.destroy_process_group()  # the run creates its own
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    weights: dict[str, Tensor] = {}
    train = loop.train

    def train_and_keep(run: loop.Run, *args: Any) -> int:
        ending = train(run, *args)
        with run.stage.parameters_gathered():
            for module in run.stage.modules:
                weights.update((name, p.detach().clone()) for name, p in module.named_parameters())
        return ending

    with patch.object(loop, "train", train_and_keep), poisoned(*fault) if fault and last else nullcontext():
        ending = pretrain(config)
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return ending, weights, [json.loads(line) for line in lines]


def agreement(case: dict[str, Any]) -> dict[str, Any]:
    """Return gradient norms, ours and Megatron-core's, and the outcomes of votes in which ranks disagree."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of(case))
    first, last = dist.get_rank() == 0, dist.get_rank() == dist.get_world_size() - 1
    with model_parallel_groups(config):
        stage, optimizer, _ = build(config)
        totals = step_module.run_batch(stage, batches_of(config, 0), config.training)
        optimizer.prepare_grads()
        split = agree(
            optimizer, totals, Vote("--exit-interval" if first else "SIGINT" if last else "", first)
        )
        return {
            "ours": split.grad_norm,
            "Megatron's": optimizer.get_grad_norm(),
            "loss": (split.loss, loss_per_token(totals)),
            "split": (split.stop, split.all_written),
            "one": agree(optimizer, totals, Vote("the stop file" if last else "")).stop,
            "none": agree(optimizer, totals, Vote()),
        }


def peak_memory() -> list[float]:
    """Return the peak memory that the speed meter logs if each rank in turn is the fullest."""
    config = tiny_config(world_size=dist.get_world_size(), **settings_of({}))
    peaks = []
    for fullest in range(dist.get_world_size()):
        memory = 2000 if dist.get_rank() == fullest else 1000
        with patch.object(device, "peak_memory_bytes", lambda memory=memory: memory):
            peaks.append(SpeedMeter(config, 0, 0).read(1, 8)["peak_memory_bytes"])
    return peaks
