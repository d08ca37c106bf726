"""Test that a save that fails on one rank fails on all, without other harm. Torch reads our checkpoints."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mesh.checkpoint.offline import open_index
from megatron_mesh.checkpoint.reader import read_tensor
from megatron_mesh.config.schema import Config
from tests.parallel import resume, saves
from tests.parallel.layouts import LAYOUTS, model_of
from tests.parallel.pool import pool

MODEL = model_of("mesh", 2, tied=False)


NO_SPACE = [
    (layout, victim, "write_file", "no space", background)
    for layout, victim in [("dp2-distopt", 1), ("tp2", 0), ("pp2-dp2-overlap", 3)]
    for background in (False, True)
]
OTHERS = [
    ("dp2-distopt", 1, place, fault, background)
    for place, background in [("write_file", True), ("write_file", False), ("Content", True)]
    for fault in saves.FAULTS
    if (place, fault) != ("write_file", "no space")
]


@pytest.mark.parametrize(("layout", "victim", "place", "fault", "background"), NO_SPACE + OTHERS)
def test_one_rank_fails(
    layout: str, victim: int, place: str, fault: str, background: bool, tmp_path: Path
) -> None:
    processes, settings = LAYOUTS[layout]
    case = {**MODEL, **settings}
    found = pool(processes).run(saves.one_rank_fails, tmp_path, case, victim, place, fault, background)
    for seen in found:
        assert seen["failed"] == [False, True, False] and seen["steps"] == [1, 3]
        assert seen["losses"] == found[0]["losses"]
    error = saves.FAULTS[fault]()
    cause = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    told = f"{cause} (rank {victim} on {socket.gethostname()})"
    said = [message for message in found[0]["heard"] if "share of a checkpoint" not in message]
    at_risk = "last complete checkpoint: step 1; steps at risk until then: 1"
    assert said == [f"saving step 2 to {tmp_path} failed: {told}; later saves try again; {at_risk}"]
    # Unexpected errors are logged with a traceback, on the rank that raised them.
    tracebacks = [rank for rank, seen in enumerate(found) if any("share of" in m for m in seen["heard"])]
    assert tracebacks == ([] if isinstance(error, OSError) else [victim])
    assert not list(tmp_path.glob("*.partial"))


def test_a_rank_that_does_not_see_the_checkpoint_is_named(tmp_path) -> None:
    processes, settings = LAYOUTS["dp2-distopt"]
    pool(processes).run(resume.save_and_continue, tmp_path, {**MODEL, **settings})
    found = pool(2).run(saves.one_rank_sees_no_checkpoint, tmp_path, 1)
    assert found[0] == found[1]
    path = tmp_path.resolve() / "iter_0000003"
    assert f"the checkpoint {path} does not exist here (rank 1 on {socket.gethostname()})" in found[0]


@pytest.mark.parametrize("layout", ["dp2-distopt", "tp2-pp2", "pp2-dp2-overlap"])
def test_stock_torch_reads_the_same(layout: str, tmp_path) -> None:
    """torch's own reader and planner, in one process, load the tensors that several ranks have written."""
    processes, settings = LAYOUTS[layout]
    pool(processes).run(resume.save_and_continue, tmp_path, {**MODEL, **settings, "bf16": True})
    path = tmp_path / "iter_0000003"
    index = open_index(path)
    stock = {key: torch.zeros(entry.shape, dtype=entry.dtype) for key, entry in index.entries.items()}
    dcp.load(stock, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert any(key.startswith("optimizer.state.fp32_param.") for key in stock)
    for key, tensor in stock.items():
        assert torch.equal(read_tensor(index, key), tensor), key
        weight = stock.get(key.removeprefix("optimizer.state.fp32_param."))
        if weight is not None and weight is not tensor:
            assert torch.equal(tensor.bfloat16(), weight), key


def test_disks_that_are_not_shared(tmp_path) -> None:
    processes, settings = LAYOUTS["dp2-distopt"]
    found = pool(processes).run(saves.save_to_separate_disks, tmp_path, {**MODEL, **settings})
    assert "__1_0.distcp is missing" in found[0][0][0]
    assert "put --save on a file system that all nodes share" in found[0][0][0]
    assert [left for _, left in found] == [False, False]


@pytest.mark.parametrize("save_timeout", [10.0, 90.0])
def test_ranks_wait_longer_for_a_save_than_the_watchdog(save_timeout: float) -> None:
    for timeout in pool(2).run(saves.collective_timeout, save_timeout):
        assert timeout > timedelta(minutes=save_timeout)
        assert timeout >= timedelta(minutes=Config().parallel.distributed_timeout_minutes)
