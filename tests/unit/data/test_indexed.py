"""Indexed data: equal to Megatron's own writer, and damaged files are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from megatron_mesh.data.indexed import IndexedWriter, inspect_prefix
from megatron_mesh.errors import UserError


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_files_equal_megatrons(tmp_path: Path, dtype: type) -> None:
    random = np.random.default_rng(0)
    documents = [random.integers(0, 60_000, size) for size in random.integers(1, 90, 200)]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype)
    for document in documents:
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(str(tmp_path / "ours"), dtype) as writer:
        for start in range(0, 200, 23):
            batch = documents[start : start + 23]
            writer.add(np.concatenate(batch), np.array([len(document) for document in batch]))
        writer.commit()
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = IndexedDataset(str(tmp_path / "ours"))
    assert all(np.array_equal(read[i], document) for i, document in enumerate(documents))


def test_nothing_changes_without_commit(tmp_path: Path, make_data) -> None:
    prefix = make_data("data")
    before = Path(f"{prefix}.bin").read_bytes()
    with pytest.raises(RuntimeError, match="stop"), IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.arange(5), np.array([5]))
        raise RuntimeError("stop")
    assert Path(f"{prefix}.bin").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.bin", "data.idx"]


def test_the_writer_copies_the_lengths_it_is_given(make_data) -> None:
    prefix = make_data("data")
    lengths = np.full(3, 2, np.int32)
    with IndexedWriter(f"{prefix}2", np.uint16) as writer:
        writer.add(np.arange(6), lengths)
        lengths[:] = 9
        writer.commit()
    assert list(IndexedDataset(f"{prefix}2").sequence_lengths) == [2, 2, 2]


def test_intact_data_are_described(make_data) -> None:
    facts = inspect_prefix(make_data("data", documents=7))
    assert (facts.sequences, facts.token_bytes) == (7, 2)
    assert facts.fingerprint != inspect_prefix(make_data("other", documents=8)).fingerprint


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda bin_, idx: bin_.unlink(), r"data\.bin does not exist"),
        (lambda bin_, idx: idx.unlink(), r"data\.idx does not exist"),
        (lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:-5]), r"data\.idx has .* truncated"),
        (lambda bin_, idx: idx.write_bytes(b"MMID"), r"data\.idx is truncated"),
        (lambda bin_, idx: idx.write_bytes(b"x" * 900), "not a Megatron index"),
        (
            lambda bin_, idx: idx.write_bytes(idx.read_bytes()[:17] + b"\x63" + idx.read_bytes()[18:]),
            "token type 99",
        ),
        (lambda bin_, idx: bin_.write_bytes(bin_.read_bytes()[:-2]), r"data\.bin has 3,998 bytes"),
    ],
)
def test_damaged_data_are_named(make_data, damage, message: str) -> None:
    prefix = make_data("data")
    damage(Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))
    with pytest.raises(UserError, match=message):
        inspect_prefix(prefix)
