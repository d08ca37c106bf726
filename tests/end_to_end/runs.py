"""Starts small runs of the program on its command line, as a user would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_mesh.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """\
recurrence: mesh
layers: 1+1R2+1
hidden_size: 32
num_attention_heads: 2
seq_length: 16
vocab_size: 128
micro_batch_size: 2
global_batch_size: 8
train_iters: 6
lr: 1e-2
lr_warmup_iters: 1
split: 80,10,10
num_workers: 0
eval_interval: 3
eval_iters: 2
log_interval: 1
"""


def launch(*flags: object, processes: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the program. Several processes run under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
        launcher += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    command = [*launcher, "pretrain_mesh.py", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def losses(directory: Path, kind: str = "train") -> list[float]:
    """Return the losses in metrics.jsonl, bit for bit."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == kind]


def write_settings(directory: Path) -> Path:
    """Write a YAML file for a small run, and a corpus of skewed random ids for it."""
    random = np.random.default_rng(0)
    documents = [random.zipf(1.3, size=40) % 128 for _ in range(200)]
    with IndexedWriter(str(directory / "text"), np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents]))
        writer.commit()
    path = directory / "run.yaml"
    path.write_text(f"{SETTINGS}data_path: {directory / 'text'}\n")
    return path
