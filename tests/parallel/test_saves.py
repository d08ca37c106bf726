"""A save that fails on one rank fails on all, and costs nothing else; what is written, stock torch reads."""

import socket

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mesh.checkpoint.offline import open_index
from megatron_mesh.checkpoint.reader import read_whole
from tests.parallel import resume, saves
from tests.parallel.layouts import LAYOUTS, model_of
from tests.parallel.pool import pool

MODEL = model_of("mesh", 2, tied=False)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("layout", "victim"), [("dp2-distopt", 1), ("tp2", 0), ("pp2-dp2-overlap", 3)])
def test_one_rank_fails(layout: str, victim: int, background: bool, tmp_path) -> None:
    processes, settings = LAYOUTS[layout]
    found = pool(processes).run(saves.one_rank_fails, tmp_path, {**MODEL, **settings}, victim, background)
    for seen in found:
        assert seen["failed"] == [False, True, False] and seen["steps"] == [1, 3]
        assert seen["losses"] == found[0]["losses"]
    place = f"rank {victim} on {socket.gethostname()}: [Errno 28] No space left on device"
    (said,) = found[0]["heard"]
    assert said.startswith(f"no checkpoint was written to {tmp_path}: {place}; earlier ones are kept")
    assert not [message for seen in found[1:] for message in seen["heard"]]
    assert not list(tmp_path.glob("*.partial"))


def test_a_rank_that_does_not_see_the_checkpoint_says_so(tmp_path) -> None:
    processes, settings = LAYOUTS["dp2-distopt"]
    pool(processes).run(resume.save_and_go_on, tmp_path, {**MODEL, **settings})
    found = pool(2).run(saves.one_rank_is_blind, tmp_path, 1)
    assert found[0] == found[1]
    path = tmp_path.resolve() / "iter_0000003"
    assert f"the checkpoint {path} is not there (rank 1 on {socket.gethostname()})" in found[0]


@pytest.mark.parametrize("layout", ["dp2-distopt", "tp2-pp2", "pp2-dp2-overlap"])
def test_stock_torch_reads_the_same(layout: str, tmp_path) -> None:
    """Torch's own reader and planner, in one process, from what several ranks have written."""
    processes, settings = LAYOUTS[layout]
    pool(processes).run(resume.save_and_go_on, tmp_path, {**MODEL, **settings, "bf16": True})
    path = tmp_path / "iter_0000003"
    index = open_index(path)
    stock = {key: torch.zeros(entry.shape, dtype=entry.dtype) for key, entry in index.entries.items()}
    dcp.load(stock, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    assert any(key.startswith("optimizer.state.fp32_param.") for key in stock)
    for key, tensor in stock.items():
        assert torch.equal(read_whole(index, key), tensor), key
        weight = stock.get(key.removeprefix("optimizer.state.fp32_param."))
        if weight is not None and weight is not tensor:
            assert torch.equal(tensor.bfloat16(), weight), key


def test_disks_that_are_not_shared(tmp_path) -> None:
    processes, settings = LAYOUTS["dp2-distopt"]
    found = pool(processes).run(saves.disks_of_their_own, tmp_path, {**MODEL, **settings})
    assert "__1_0.distcp is missing" in found[0][0][0]
    assert "--save must be on a disk that all nodes share" in found[0][0][0]
    assert [left for _, left in found] == [False, False]
