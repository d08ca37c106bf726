"""The checkpoint benchmark, started as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mesh.command import call
from megatron_mesh.errors import UserError
from tests.end_to_end.runs import ROOT
from tools.bench.checkpoints import main

OPERATIONS = (
    "save",
    "save in the background",
    "copy of its file",
    "load, same layout",
    "load, another layout",
)
SETTINGS = """\
layers: 1+1R2+1
hidden_size: 32
num_attention_heads: 2
seq_length: 16
vocab_size: 128
micro_batch_size: 1
global_batch_size: 8
train_iters: 6
use_distributed_optimizer: true
"""


def test_one_line_per_rank_and_operation(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(SETTINGS)
    command = [sys.executable, "-m", "tools.bench.checkpoints", "--ranks", "2", "--rounds", "1"]
    command += ["--config", settings, "--directory", tmp_path / "saved"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = [(operation, str(rank)) for operation in OPERATIONS for rank in (0, 1)]
    found = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[1:11]]
    assert [(cells[0], cells[1]) for cells in found] == expected
    written, copied = (float(found[row][4].split()[0]) for row in (1, 5))
    assert found[1][4].endswith("KiB") and written == copied > 0
    left = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert left == ["iter_0000001", "latest_checkpointed_iteration.txt"]  # no copies
    assert "round 1 of 1" in done.stderr


def test_no_ranks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--ranks 0 is out of range; it must be at least 1"):
        call(main, ["--ranks", "0", "--directory", str(tmp_path / "saved")])
