"""Tiny two-rank pretraining jobs on the cluster, submitted like a user's."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_mesh.data.indexed import IndexedWriter
from tests.slurm.cluster import Cluster, wait_until

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
SETTINGS = f"""\
recurrence: mesh
layers: 1+1R2+1
hidden_size: 32
num_attention_heads: 2
seq_length: 16
vocab_size: 128
micro_batch_size: 2
global_batch_size: 16
train_iters: {STEPS}
lr: 1e-2
lr_warmup_iters: 1
split: 80,10,10
num_workers: 0
eval_interval: 0
eval_iters: 0
log_interval: 1
save_interval: 20
"""
SITE = f"""\
SBATCH_OPTIONS=(--partition=low)
GPUS_PER_NODE=1
CPUS_PER_TASK=1
TIME_LIMIT=10
SAVE_SECONDS=5
ENVIRONMENT=venv
PYTHON={sys.executable}
prepare() {{ export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1; }}
"""
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}


@dataclass
class Job:
    """A run and its first job."""

    cluster: Cluster
    run: Path
    number: int | str

    @property
    def fields(self) -> dict[str, str]:
        """The fields of the job, from SLURM."""
        return self.cluster.job(self.number)

    @property
    def log(self) -> str:
        """The output of batch script and ranks in all starts."""
        path = self.run / f"slurm/{self.number}.log"
        return path.read_text() if path.exists() else ""

    def losses(self) -> list[tuple[int, float]]:
        """Steps and losses in the order in which they were logged, repeated steps included."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("}")]
        return [(each["step"], each["loss"]) for each in records if each["kind"] == "train"]

    def status(self) -> str:
        """The content of run_status.txt."""
        path = self.run / "run_status.txt"
        return path.read_text().strip() if path.exists() else ""

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is done."""
        self._wait(lambda: self.losses() and self.losses()[-1][0] >= step, 600, f"step {step}")

    def wait_for_end(self) -> str:
        """Wait until the job has ended for good, and return its state."""
        self._wait(lambda: self.fields.get("JobState") in OVER, 600, "the end of the job")
        return self.fields["JobState"]

    def wait_for_restart(self, count: int = 1) -> None:
        """Wait until the job has been put back in the queue."""
        self._wait(lambda: self.fields.get("Restarts") == str(count), 600, "a restart")

    def ranks(self) -> list[psutil.Process]:
        """The training processes that exist now, by rank."""
        found = {}
        for process in psutil.process_iter():
            try:
                if str(self.run / "slurm/code/pretrain_mesh.py") in process.cmdline()[:4]:
                    rank = process.environ().get("SLURM_PROCID")
                    if rank is not None and "python" in process.name():
                        found[int(rank)] = process
            except psutil.Error:
                continue  # it has just ended
        return [found[rank] for rank in sorted(found)]

    def weights(self) -> dict[str, torch.Tensor]:
        """Model and optimizer in the last checkpoint (not random states: some generators have no seed)."""
        found = tensors(self.run / f"iter_{STEPS:07d}")
        return {name: tensor for name, tensor in found.items() if not name.startswith("rng")}

    def _wait(self, true, seconds: float, what: str) -> None:
        try:
            wait_until(true, seconds, what)
        except TimeoutError as error:
            raise AssertionError(f"{error}; {self.fields}\n{self.log}") from None


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, read by torch itself."""
    reader = FileSystemReader(checkpoint)
    found = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(found, storage_reader=reader, no_dist=True)
    return found


def write_settings(directory: Path) -> Path:
    """Write a corpus of skewed random ids and a configuration file for it."""
    random = np.random.default_rng(0)
    documents = [random.zipf(1.3, size=40) % 128 for _ in range(400)]
    with IndexedWriter(str(directory / "text"), np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents]))
        writer.commit()
    path = directory / "run.yaml"
    path.write_text(f"{SETTINGS}data_path: {directory / 'text'}\n")
    return path


def tool(cluster: Cluster, *arguments: object, code: int = 0) -> str:
    """Run tools/submit_slurm.py, check its exit status and return its output."""
    command = [sys.executable, str(ROOT / "tools/submit_slurm.py"), *map(str, arguments)]
    ended = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == code, ended.stderr
    return ended.stdout + ended.stderr


def submit(
    cluster: Cluster, settings: Path, run: Path, *flags: object, site: str = "", nodes: int = 2
) -> Job:
    """Submit a run of two ranks; ``site`` is appended to the site file."""
    path = run.parent / f"{run.name}-site.sh"
    path.write_text(SITE + site)
    text = tool(cluster, "--site", path, "--nodes", nodes, "--config", settings, "--save", run, *flags)
    return Job(cluster, run, int(text.split("submitted job ")[1].split(";")[0].split(",")[0]))
