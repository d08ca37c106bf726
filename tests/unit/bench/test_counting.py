"""``counted`` counts everything that happens in its block, and nothing else."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers import one_process, tiny_config
from tools.bench.counting import counted

MB = 10**6


def test_peak_memory_is_counted(tmp_path: Path) -> None:
    """Memory that is freed in the block counts, and so does reusing memory that was freed before it."""
    before = torch.ones(10 * MB)  # 40 MB
    del before
    with counted(tmp_path) as counts:
        torch.ones(10 * MB)
        torch.ones(5 * MB)
    assert 39 * MB <= counts.memory <= 59 * MB  # Linux counts several pages at a time
    with counted(tmp_path) as nothing:
        pass
    assert nothing.memory <= 2 * MB


def test_only_files_in_the_directory_are_counted(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (inside / "old").write_bytes(b"x" * 300)
    with counted(inside) as counts:
        (inside / "new").write_bytes(b"x" * 1000)
        (outside / "new2").write_bytes(b"x" * 1000)
        assert len((inside / "old").read_bytes()) == 300
        handle = os.open(inside / "new", os.O_RDONLY)
        os.close(handle)
    (inside / "later").write_bytes(b"x")
    assert (counts.writes, counts.reads, counts.others) == (["new"], ["old"], ["new"])
    assert (counts.written(inside), counts.read(inside), counts.opened) == (1000, 300, 3)


def test_bytes_of_collectives_are_counted(tmp_path: Path) -> None:
    """Both those on tensors and those on Python objects, which torch implements with tensors."""
    with one_process(tiny_config()):
        with counted(tmp_path) as plain:
            dist.all_reduce(torch.ones(100))
            dist.all_gather([torch.empty(50)], torch.ones(50))
        with counted(tmp_path) as objects:
            dist.broadcast_object_list(["x" * 5000], src=0)
            dist.gather_object("y" * 7000, [None], dst=0)
    assert (plain.sent, plain.received) == (600, 200)
    payload = len(pickle.dumps("x" * 5000)) + len(pickle.dumps("y" * 7000))
    assert payload <= objects.sent <= payload + 500
    assert 7000 <= objects.received <= 7500


def test_an_error_ends_the_counting(tmp_path: Path) -> None:
    with pytest.raises(ValueError), counted(tmp_path) as counts:
        raise ValueError
    (tmp_path / "later").write_bytes(b"x")
    assert counts.opened == 0
