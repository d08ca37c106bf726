"""Batches have the same samples whatever the ranks, the loader processes and the length of the run."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from megatron_mesh.config.schema import DataConfig
from megatron_mesh.data import SampleStream, build_datasets, build_loader
from megatron_mesh.errors import UserError
from tests.unit.data.corpora import NumberTokenizer

GLOBAL = 8


@pytest.fixture
def stream(make_data) -> SampleStream:
    config = DataConfig(
        data_path=["0.6", make_data("a"), "0.4", make_data("b", documents=30, first=5000)], split="1,0,0"
    )
    return build_datasets(
        config, NumberTokenizer(), seq_length=16, seed=1, train_samples=200, eval_samples=0  # type: ignore[arg-type]
    ).train  # fmt: skip


def global_batches(
    stream: SampleStream, *, micro: int, ranks: int, workers: int, consumed: int = 0
) -> list[torch.Tensor]:
    """Tokens [GLOBAL, S] of each global batch, put together from all ranks."""
    per_rank = []
    for rank in range(ranks):
        loader = build_loader(
            stream,
            consumed_samples=consumed,
            micro_batch_size=micro,
            global_batch_size=GLOBAL,
            dp_rank=rank,
            dp_size=ranks,
            num_workers=workers,
        )
        tokens = torch.cat([batch.tokens for batch in loader])
        per_rank.append(tokens.view(-1, GLOBAL // ranks, 16))
    return list(torch.cat(per_rank, dim=1))


def test_a_batch_holds_the_fields_of_its_samples(stream: SampleStream) -> None:
    loader = build_loader(
        stream,
        consumed_samples=0,
        micro_batch_size=2,
        global_batch_size=GLOBAL,
        dp_rank=0,
        dp_size=1,
        num_workers=0,
    )
    batch = next(loader)
    for name, field in vars(batch).items():
        assert torch.equal(field, torch.stack([stream[0][name], stream[1][name]])), name
    assert torch.equal(batch.labels[:, :-1], batch.tokens[:, 1:])


def test_a_global_batch_depends_only_on_its_number(stream: SampleStream) -> None:
    expected = [
        torch.stack([stream[i]["tokens"] for i in range(n * GLOBAL, (n + 1) * GLOBAL)])
        for n in range(200 // GLOBAL)
    ]
    for micro, ranks, workers in [(1, 1, 0), (4, 2, 0), (2, 1, 2), (1, 2, 2), (2, 4, 1)]:
        batches = global_batches(stream, micro=micro, ranks=ranks, workers=workers)
        assert len(batches) == 25
        assert all(torch.equal(a, b) for a, b in zip(batches, expected, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_continues_at_its_position(stream: SampleStream, workers: int) -> None:
    whole = global_batches(stream, micro=2, ranks=2, workers=0)
    rest = global_batches(stream, micro=2, ranks=1, workers=workers, consumed=7 * GLOBAL)
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[7:], strict=True))


def test_shapes_and_an_incomplete_last_batch(stream: SampleStream) -> None:
    loader = build_loader(
        stream,
        consumed_samples=190,
        micro_batch_size=2,
        global_batch_size=GLOBAL,
        dp_rank=0,
        dp_size=2,
        num_workers=0,
    )
    batches = list(loader)
    assert len(batches) == 2  # of samples 190 to 199, one global batch is complete
    for tensor in (batches[0].tokens, batches[0].labels, batches[0].position_ids):
        assert tensor.shape == (2, 16) and tensor.dtype == torch.int64
    assert batches[0].loss_mask.shape == (2, 16) and batches[0].loss_mask.dtype == torch.float32


def test_a_loader_does_not_change_the_random_state(stream: SampleStream) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    global_batches(stream, micro=8, ranks=1, workers=1)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("micro", "size"), [(3, 8), (2, 9), (0, 8), (4, 2)])
def test_a_batch_that_does_not_divide(stream: SampleStream, micro: int, size: int) -> None:
    with pytest.raises(UserError, match="not a multiple of"):
        build_loader(
            stream,
            consumed_samples=0,
            micro_batch_size=micro,
            global_batch_size=size,
            dp_rank=0,
            dp_size=1,
            num_workers=0,
        )


class Failing(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """A data set that fails at sample 3."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        if sample == 3:
            raise ValueError("cannot read sample 3")
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"), torch.tensor([sample]))


@pytest.mark.parametrize("stop", ["failure", "close"])
def test_loader_processes_end_with_the_iterator(stop: str) -> None:
    before = set(multiprocessing.active_children())
    loader = build_loader(
        Failing(),
        consumed_samples=0,
        micro_batch_size=1,
        global_batch_size=1,
        dp_rank=0,
        dp_size=1,
        num_workers=1,
    )
    assert [int(next(loader).tokens) for _ in range(3)] == [0, 1, 2]
    assert len(set(multiprocessing.active_children()) - before) == 1
    if stop == "failure":
        with pytest.raises(ValueError, match="cannot read sample 3"):
            next(loader)
    else:
        loader.close()  # type: ignore[attr-defined]
    assert set(multiprocessing.active_children()) <= before


def test_loader_processes_survive_signals_and_end_quietly(tmp_path: Path) -> None:
    """Batches continue after a SIGTERM to every process, and a loader left open doesn't delay the exit."""
    script = """
        import os, signal, torch
        from megatron_mesh.data.loader import build_loader

        class Numbers(torch.utils.data.Dataset):
            def __len__(self):
                return 64
            def __getitem__(self, i):
                value = torch.tensor([i])
                return dict(tokens=value, labels=value, loss_mask=value, position_ids=value)

        signal.signal(signal.SIGTERM, lambda *_: None)
        loader = build_loader(
            Numbers(), consumed_samples=0, micro_batch_size=1, global_batch_size=1, dp_rank=0, dp_size=1,
            num_workers=2,
        )
        seen = [int(next(loader).tokens)]
        os.killpg(0, signal.SIGTERM)
        seen += [int(next(loader).tokens) for _ in range(20)]
        assert seen == list(range(21)), seen
        print("fine")
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = done.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)
        raise
    assert (done.returncode, output) == (0, "fine\n"), errors
    assert "Traceback" not in errors and "killed" not in errors
