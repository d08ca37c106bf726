"""Test the index cache with several ranks: one rank builds per file system, and errors name the node."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_mesh.data.indexed import IndexedWriter
from tests.parallel.index_cache import open_data, refusal
from tests.parallel.pool import pool

WORDS = ["0.6", "one", "0.4", "two"]
ENTRIES = 6  # training and validation: two parts and their blend


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Put the data on a shared disk and on the disks of two nodes."""
    for first, name in ((1, "one"), (5000, "two")):
        with IndexedWriter(str(tmp_path / name), np.uint16) as writer:
            writer.add(np.arange(first, first + 2000), np.full(40, 50))
            writer.commit()
    for node in ("node0", "node1"):
        (tmp_path / node).mkdir()
        for path in tmp_path.glob("*.*"):
            shutil.copy(path, tmp_path / node)
    return tmp_path


@pytest.mark.parametrize("shared", [True, False])
def test_one_rank_builds_for_each_file_system(root: Path, shared: bool) -> None:
    results = pool(4).run(open_data, root, WORDS, 2, shared)
    assert [written for written, _ in results] == [ENTRIES, 0, 0 if shared else ENTRIES, 0]
    assert all(tokens == results[0][1] for _, tokens in results)
    again = pool(4).run(open_data, root, WORDS, 2, shared)
    assert again == [(0, tokens) for _, tokens in results]


def test_one_node_has_lost_its_cache(root: Path) -> None:
    pool(4).run(open_data, root, WORDS, 2, False)
    shutil.rmtree(root / "node1" / "cache")
    results = pool(4).run(open_data, root, WORDS, 2, False)
    assert [written for written, _ in results] == [0, 0, ENTRIES, 0]


def test_data_that_a_node_lacks(root: Path) -> None:
    (root / "node1" / "two.idx").unlink()
    message = "data file two.idx does not exist"
    for refused in pool(2).run(refusal, root, WORDS, 1, False):
        assert message in refused and "(rank 1 on host node1)" in refused


def test_data_that_differ_between_nodes(root: Path) -> None:
    with (root / "node1" / "one.bin").open("ab") as file:
        file.write(b"12")
    for refused in pool(2).run(refusal, root, WORDS, 1, False):
        assert "on rank 0; copy the same files" in refused and "(rank 1 on host node1)" in refused


def test_data_of_equal_size_that_differ_between_nodes(root: Path) -> None:
    np.arange(2000, 0, -1).astype(np.uint16).tofile(root / "node1" / "one.bin")
    for refused in pool(2).run(refusal, root, WORDS, 1, False):
        assert "the data one differ from those that rank 0 sees" in refused
        assert "(rank 1 on host node1)" in refused


def test_bad_input_is_raised_on_every_rank(root: Path) -> None:
    for refused in pool(2).run(refusal, root, ["one", "two"], 1, True):
        assert "is not a positive number" in refused


def test_a_cache_that_one_node_cannot_write(root: Path) -> None:
    (root / "node1" / "cache").write_text("a file")
    for refused in pool(2).run(refusal, root, WORDS, 1, False):
        assert "the index cache cache cannot be written" in refused and "(rank 1 on host node1)" in refused
