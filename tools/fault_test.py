#!/usr/bin/env python
"""Kill a small pretraining again and again, and see that nothing is lost.

python tools/fault_test.py --kills 100 --ranks 2 --output-dir runs/faults

First the run is trained undisturbed. Then it is started, killed at a random moment (SIGKILL to one rank, to
the process that writes a checkpoint, or to all) and started again, until it has been killed so often and has
ended. Every step's loss must be the undisturbed run's, bit for bit; after each start no unfinished checkpoint
may be left; and no more steps may be repeated than two save intervals: one, and one while a write is under
way. Data are random ids; about ten seconds a kill.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.progress import Progress

from megatron_mesh.checkpoint.writer import WRITER_NAME
from megatron_mesh.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """\
recurrence: mesh
layers: 1+1R2+1
hidden_size: 32
num_attention_heads: 2
seq_length: 16
vocab_size: 128
micro_batch_size: 2
global_batch_size: 8
lr: 1e-2
lr_warmup_iters: 1
split: 100,0,0
num_workers: 1
eval_interval: 0
log_interval: 1
progress: false
async_save: true
keep_last: 2
"""
# Seconds after which ranks that were not killed are, as a launcher does it: they may wait for one that was
# killed before the ranks knew of each other.
_PATIENCE = 10.0


@dataclass(frozen=True)
class Faults:
    """What happened to the disturbed run."""

    kills: dict[str, int]
    """By victim."""
    most_repeated: int
    """Steps done twice, at most, after one kill."""


class Job:
    """A run's ranks as processes of this one, without a launcher that would tidy up."""

    def __init__(self, ranks: int, flags: Sequence[str], log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.log = log.open("a", encoding="utf-8")
        self.ranks = []
        for rank in range(ranks):
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
            command = [sys.executable, str(ROOT / "pretrain_mesh.py"), *flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", **address, **place}
            self.ranks.append(
                psutil.Popen(command, env=environment, stdout=self.log, stderr=self.log, cwd=ROOT)
            )

    def writers(self) -> list[psutil.Process]:
        """Processes that write checkpoints."""
        found = []
        for rank in self.ranks:
            try:
                found += [child for child in rank.children() if child.name() == WRITER_NAME]
            except psutil.Error:  # it has ended
                continue
        return found

    def kill(self, victim: str) -> bool:
        """SIGKILL to ``victim``; False if there is none."""
        targets = {"all": self.ranks, "writer": self.writers()}.get(victim, [random.choice(self.ranks)])
        for process in targets:
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                return False
        return bool(targets)

    def wait(self, timeout: float | None) -> bool:
        """Whether all ranks ended within ``timeout`` seconds (None: wait for ever)."""
        _, alive = psutil.wait_procs(self.ranks, timeout)
        return not alive

    def close(self) -> None:
        """End what is left."""
        for process in [*self.writers(), *self.ranks]:
            try:
                process.kill()
            except psutil.Error:
                continue
        psutil.wait_procs(self.ranks)
        self.log.close()


def main(argv: Sequence[str]) -> int:
    """Train undisturbed and disturbed, compare, and print what happened."""
    arguments = _parser().parse_args(argv)
    directory: Path = arguments.output_dir
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"--output-dir {directory} is not empty; choose another")
    if min(arguments.kills, arguments.ranks, arguments.steps, arguments.save_interval) < 1:
        raise UserError("--kills, --ranks, --steps and --save-interval must be at least 1")
    directory.mkdir(parents=True, exist_ok=True)
    random.seed(arguments.seed)
    config = write_inputs(directory, arguments.steps, arguments.save_interval)
    calm = train_calmly(directory / "calm", config, arguments.ranks)
    faults = disturb(directory / "disturbed", config, arguments)
    compare(losses(directory / "calm"), losses(directory / "disturbed"), arguments.steps)
    print(f"{sum(faults.kills.values())} kills ({faults.kills}); undisturbed the run takes {calm:.0f} s")
    print(f"every step's loss is the undisturbed run's; at most {faults.most_repeated} steps were repeated")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fault_test.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="an empty directory")
    parser.add_argument("--kills", type=int, default=100, help="how often to kill (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="data-parallel ranks (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of the run (default: %(default)s)")
    parser.add_argument("--save-interval", type=int, default=5, help="in steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    return parser


def write_inputs(directory: Path, steps: int, save_interval: int) -> Path:
    """A corpus of skewed random ids, and the configuration."""
    from megatron_mesh.data.indexed import IndexedWriter

    generator = np.random.default_rng(0)
    documents = [generator.zipf(1.3, size=40) % 128 for _ in range(500)]
    with IndexedWriter(str(directory / "text"), np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents]))
        writer.commit()
    path = directory / "settings.yaml"
    lengths = f"train_iters: {steps}\nsave_interval: {save_interval}\n"
    path.write_text(f"{SETTINGS}{lengths}data_path: {directory.resolve() / 'text'}\n", encoding="utf-8")
    return path


def train_calmly(save: Path, config: Path, ranks: int) -> float:
    """The undisturbed run; returns its seconds."""
    started = time.monotonic()
    job = Job(ranks, ["--config", str(config), "--save", str(save)], save.with_suffix(".log"))
    job.wait(None)
    codes = [process.returncode for process in job.ranks]
    job.close()
    assert codes == [0] * ranks, f"the undisturbed run ended with {codes}; see {save.with_suffix('.log')}"
    return time.monotonic() - started


def disturb(save: Path, config: Path, arguments: argparse.Namespace) -> Faults:
    """Start, kill and start again; the last start is left alone."""
    flags = ["--config", str(config), "--save", str(save), "--load", str(save)]
    kills: dict[str, int] = {}
    most_repeated, rewound = 0, False
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("kills", total=arguments.kills)
        while sum(kills.values()) < arguments.kills:
            found = records(save)
            # Right after a rewind the steps that come are repeated by order, not by accident.
            before, logged = 0 if rewound or not found else found[-1]["step"], len(found)
            job = Job(arguments.ranks, flags, save.with_suffix(".log"))
            victim = kill_once(job)
            job.wait(_PATIENCE if victim else None)
            job.close()
            most_repeated = max(most_repeated, repeated(save, before, logged))
            rewound = rewound and len(records(save)) == logged
            if victim:
                kills[victim] = kills.get(victim, 0) + 1
                progress.advance(task)
                if not console.is_terminal:
                    done = f"kill {sum(kills.values())} of {arguments.kills}"
                    print(f"{done}: {victim}, at step {last_step(save)}", file=sys.stderr, flush=True)
                continue
            assert last_step(save) == arguments.steps, f"the run ended by itself; see {job.log.name}"
            forget_the_end(save, arguments.steps // 2)  # it was done before its time came: once more
            rewound = True
        job = Job(arguments.ranks, flags, save.with_suffix(".log"))
        job.wait(None)
        job.close()
    assert not unfinished(save), f"left over: {unfinished(save)}"
    assert most_repeated <= 2 * arguments.save_interval, f"{most_repeated} steps were repeated"
    return Faults(kills, most_repeated)


def kill_once(job: Job) -> str:
    """Kill a random victim at a random moment after the start; "" if the run ended before."""
    victim = random.choice(["one rank", "writer", "all"])
    moment = time.monotonic() + random.uniform(0.0, 16.0)
    while not job.wait(0.002):
        if time.monotonic() > moment and job.kill(victim):
            return victim
    return ""


def forget_the_end(save: Path, step: int) -> None:
    """Take a finished run back to an earlier checkpoint, to have more to kill."""
    for path in save.glob("iter_*"):
        if int(path.name.removeprefix("iter_").split(".")[0]) > step:
            shutil.rmtree(path)


def unfinished(save: Path) -> list[str]:
    """Directories on their way in or out."""
    return [path.name for path in save.glob("iter_*") if path.suffix]


def records(save: Path) -> list[dict]:
    """The lines of the metrics; a killed run may leave half a line.

    A start that finds no checkpoint keeps what an earlier one wrote as metrics.1.jsonl and so on.
    """
    kept = sorted(save.glob("metrics.*.jsonl"), key=lambda path: int(path.name.split(".")[1]))
    texts = [path.read_text(encoding="utf-8") for path in (*kept, save / "metrics.jsonl") if path.exists()]
    found = []
    for line in "\n".join(texts).splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in found if record["kind"] == "train"]


def last_step(save: Path) -> int:
    """The last step logged."""
    return max((record["step"] for record in records(save)), default=0)


def repeated(save: Path, before: int, logged: int) -> int:
    """Steps up to ``before`` that a start did again, whose records are those after the first ``logged``."""
    steps = [record["step"] for record in records(save)[logged:]]
    return max(0, before - steps[0] + 1) if steps else 0


def losses(save: Path) -> dict[int, set[float]]:
    """Every loss that was ever logged for a step."""
    found: dict[int, set[float]] = {}
    for record in records(save):
        found.setdefault(record["step"], set()).add(record["loss"])
    return found


def compare(calm: dict[int, set[float]], disturbed: dict[int, set[float]], steps: int) -> None:
    """Raise AssertionError unless both runs have every step, with one and the same loss."""
    assert sorted(calm) == list(range(1, steps + 1))
    different = [step for step in calm if disturbed.get(step) != calm[step]]
    assert not different, f"other losses than the undisturbed run's, in steps {different}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
