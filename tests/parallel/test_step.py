"""Test a step of the real loop: its collectives, its waits for the device, and steps that all ranks skip."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_mesh.checkpoint.directory import saved_steps
from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.runtime import exits
from tests.parallel.layouts import LAYOUTS
from tests.parallel.pool import free_port, pool
from tests.parallel.real_loop import (
    agreement,
    peak_memory,
    pretrained,
    stop_in_evaluation,
    watch_saves,
    watch_steps,
)
from tests.parallel.watch import IN_HOST_MEMORY

OVERLAP = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}

# layout -> (processes, settings, for each rank the collectives of a step and those that logging adds)
# Each rank has two micro-batches of two sequences, and all or a part of 1+1R2+1 layers.
STEP: dict[str, tuple[int, dict[str, Any], list[tuple[dict[str, int], dict[str, int]]]]] = {
    "one rank": (1, {"global_batch_size": 4}, [({}, {})]),
    "data parallel": (
        2,
        {"global_batch_size": 8},
        # Gradients; number of tokens and agreement. Logging adds: peak memory; router means.
        [({"allreduce_coalesced data": 1, "allreduce world": 2}, {"allreduce world": 1, "allreduce data": 1})]
        * 2,
    ),
    "tensor parallel": (
        2,
        {"global_batch_size": 4, "tensor_model_parallel_size": 2},
        # For each micro-batch 21 + 8 from layers, memory and loss; then the routers' gradients.
        [
            (
                {"allreduce tensor": 2 * 21 + 1, "allgather_base tensor": 2 * 8, "allreduce world": 2},
                {"allreduce world": 1, "allreduce tensor": 1},
            )
        ]
        * 2,
    ),
    "ring": (
        2,
        {"global_batch_size": 4, "pipeline_model_parallel_size": 2},
        # The 4 passes of a micro-batch send 7 messages between ranks, and 7 back. With two ranks
        # Megatron-core uses a group for each direction. The second rank has no routers.
        [
            (
                {"send pipeline": 2 * 7, "recv world": 2 * 7, "allreduce world": 2},
                {"allreduce world": 1},
            ),
            (
                {"recv pipeline": 2 * 7, "send world": 2 * 7, "allreduce world": 2},
                {"allreduce world": 1},
            ),
        ],
    ),
    "distributed optimizer": (
        2,
        {"global_batch_size": 8, **OVERLAP},
        # Gradients; weights, which the next forward gathers; number of tokens and agreement.
        [
            (
                {
                    "reduce_scatter_tensor_coalesced data": 1,
                    "allgather_into_tensor_coalesced data": 1,
                    "allreduce world": 2,
                },
                {"allreduce world": 1, "allreduce data": 1},
            )
        ]
        * 2,
    ),
}

# The waits of every step, and those that logging and saving add.
WAIT = {"train/vote.py: _count": 1}
LOGGED = {"metrics/meters.py: SpeedMeter.read": 2}  # for the end of the step and for the peak memory
ROUTERS = {"metrics/meters.py: RouterMeter.read": 1}  # on ranks with routers
SAVED = {"metrics/meters.py: SpeedMeter.paused": 2}  # before and after the save


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """Write 200 documents of skewed random ids below 96; return their prefix."""
    prefix = str(tmp_path_factory.mktemp("corpus") / "text")
    random = np.random.default_rng(0)
    documents = [random.zipf(1.3, size=40) % 96 for _ in range(200)]
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(np.concatenate(documents).astype(np.uint16), np.array([len(d) for d in documents]))
        writer.commit()
    return prefix


@pytest.mark.parametrize("layout", STEP)
def test_every_collective_and_every_wait_of_a_step(layout: str, corpus: str) -> None:
    processes, settings, ranks = STEP[layout]
    results = pool(processes).run(watch_steps, corpus, {"layers": "1+1R2+1", **settings})
    for rank, (steps, completed_after) in enumerate(results):
        collectives, logged = map(Counter, ranks[rank])
        waits = {number: without_host_memory(step.waits) for number, step in steps.items()}
        # Steps 2 and 4 only train, while a checkpoint is being written in the background.
        for number in (2, 4):
            assert steps[number].collectives == collectives
            assert waits[number] == WAIT
        # Step 3 is logged.
        assert steps[3].collectives == collectives + logged
        has_routers = (layout, rank) != ("ring", 1)
        assert waits[3] == WAIT | LOGGED | (ROUTERS if has_routers else {})
        # By step 5 the last rank has written its share, so all ranks publish the checkpoint after that step.
        assert completed_after == [5]
        assert steps[5].collectives == collectives
        assert waits[5] == WAIT | SAVED


def test_a_save_in_progress_costs_a_step_nothing(corpus: str, tmp_path: Path) -> None:
    """With the real Saver and Log, a background save starts after step 4 and is published after step 7."""
    processes, settings, _ = STEP["data parallel"]
    results = pool(processes).run(
        watch_saves, corpus, {"layers": "1+1R2+1", **settings}, tmp_path, 7, timeout=120
    )
    for rank, (without, saving) in enumerate(results):
        assert without.pending == [] and saving.pending == [5, 6, 7]
        assert rank == 0 or saving.writing == [5, 6]
        for number in (1, 2, 3, 5, 6):  # 1, 3 and 6 are logged
            assert saving.steps[number] == without.steps[number]
        for number in (4, 7):  # starting and publishing the save both communicate
            assert saving.steps[number].collectives > without.steps[number].collectives
            assert saving.steps[number].waits > without.steps[number].waits + Counter(SAVED)
    assert list(saved_steps(tmp_path / "with")) == [4, 8]
    lines = (tmp_path / "with/metrics.jsonl").read_text().splitlines()
    logged = [(record["kind"], record["step"]) for record in map(json.loads, lines)]
    assert logged == [("train", 1), ("train", 3), ("train", 6), ("save", 4), ("train", 8), ("save", 8)]


def test_one_rank_stops_an_evaluation(corpus: str, tmp_path: Path) -> None:
    """A signal may reach only one rank (on SLURM), in a long evaluation before which the run didn't save.

    All ranks leave the evaluation after the same batch, save, and end with the same status. Each batch has
    one all-reduce and one wait.
    """
    results = pool(2).run(stop_in_evaluation, corpus, tmp_path)
    for ending, batches, collectives, waits in results:
        assert ending == exits.STOPPED and batches == 3
        assert collectives == {"allreduce world": 3}
        waits.pop("data/loader.py: _batches", None)  # the loader's start, in host memory
        assert without_host_memory(waits) == {"train/vote.py: _count": 3}
    assert list(saved_steps(tmp_path)) == [2]
    assert '"valid"' not in (tmp_path / "metrics.jsonl").read_text()


def without_host_memory(waits: Mapping[str, int]) -> dict[str, int]:
    return {where: count for where, count in waits.items() if where not in IN_HOST_MEMORY}


@pytest.mark.parametrize(
    ("layout", "bf16", "kind"),
    [
        ("dp2", False, "reduced gradient"),
        ("dp2", True, "loss"),
        ("dp2-gather", False, "own gradient"),
        ("dp2-gather", True, "reduced gradient"),
        ("tp2-dp2-distopt", True, "loss"),
        ("pp2-dp2-overlap", False, "reduced gradient"),
        ("pp2-dp2-overlap", True, "own gradient"),
    ],
)
def test_all_ranks_skip_what_is_not_finite_on_one(layout, bf16, kind, corpus, tmp_path) -> None:
    """All ranks skip the last of three steps, so their weights equal those of a two-step run bit for bit."""
    two = train(corpus, layout, tmp_path / "two", train_iters=2, bf16=bf16)
    three = train(corpus, layout, tmp_path / "three", (kind, 3), train_iters=3, bf16=bf16)
    for (_, expected, _), (ending, weights, records) in zip(two, three, strict=True):
        assert ending == exits.DONE
        assert expected and weights.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())
        steps = [(record["kind"], record["step"]) for record in records if record["kind"] != "summary"]
        assert steps == [("train", 1), ("train", 2), ("skipped", 3)]
        assert records[2]["loss" if kind == "loss" else "grad_norm"] is None  # JSON has no NaN


def train(corpus: str, layout: str, directory: Path, fault: Any = None, **case: Any) -> list[Any]:
    """Return the results of ``pretrained`` on each rank."""
    processes, settings = LAYOUTS[layout]
    case = {"layers": "1+1R2+1", "lr": 1e-2, "lr_decay_style": "constant", **settings, **case}
    return pool(processes).run(pretrained, corpus, free_port(), case, directory, fault, timeout=120)


def test_the_skipped_step_would_have_changed_the_weights(corpus, tmp_path) -> None:
    """If the step changed nothing, the test above could not fail."""
    (_, two, _), _ = train(corpus, "dp2", tmp_path / "two", train_iters=2)
    (_, three, _), _ = train(corpus, "dp2", tmp_path / "three", train_iters=3)
    assert not any(torch.equal(weight, three[name]) for name, weight in two.items())


@pytest.mark.parametrize("layout", ["dp2", "tp2-dp2-distopt", "pp2-dp2-overlap"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_all_ranks_agree_on_norm_loss_and_votes(layout: str, bf16: bool) -> None:
    processes, settings = LAYOUTS[layout]
    results = pool(processes).run(agreement, {"bf16": bf16, **settings})
    for result in results:
        assert result["ours"] == results[0]["ours"] == pytest.approx(result["Megatron's"], rel=1e-6)
        assert result["loss"][0] == result["loss"][1]
        assert result["split"] == ("SIGINT", False)  # the more urgent reason wins; one rank is still writing
        assert result["one"] == "the stop file"
        assert (result["none"].stop, result["none"].all_written, result["none"].taken) == ("", True, True)


def test_the_peak_memory_is_that_of_the_fullest_rank() -> None:
    assert pool(2).run(peak_memory) == [[2000, 2000]] * 2
