"""Test what starting a run costs each rank: the files that it opens, and the breakdown of its time."""

import re
from pathlib import Path

import numpy as np
import pytest

from megatron_mesh.config.schema import Config
from megatron_mesh.data.indexed import IndexedWriter
from megatron_mesh.runtime import phases
from tests.helpers import tiny_config
from tests.parallel.started import Start, start

PREFIXES = 2
STREAMS = 3  # training, validation, test
# For each prefix the reader opens .idx twice (header, map) and .bin once. For each cache entry it opens the
# manifest and the arrays: three for an epoch, two for a blend.
EVERY_RANK = {"data": 3 * PREFIXES, "cache": STREAMS * (PREFIXES * 4 + 3), "output": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Write two data sets to ``data``."""
    directory = tmp_path_factory.mktemp("start")
    random = np.random.default_rng(0)
    for name in ("one", "two"):
        with IndexedWriter(str(directory / "data" / name), np.uint16) as writer:
            writer.add(random.integers(0, 96, 12_000).astype(np.uint16), np.full(300, 40))
            writer.commit()
    return directory


def run(root: Path, world_size: int, name: str, **settings: object) -> list[Start]:
    starts = start(config_of(root, world_size, name, **settings), world_size)
    assert [each.ending for each in starts] == [0] * world_size
    return starts


def config_of(root: Path, world_size: int, name: str, **settings: object) -> Config:
    values = {
        "data_path": ["0.7", str(root / "data/one"), "0.3", str(root / "data/two")],
        "data_cache_path": str(root / "cache"),
        "split": "80,10,10",
        "num_workers": 0,
        "eval_interval": 100,
        "lr_decay_iters": 100,
        "lr_warmup_fraction": None,
        "save": str(root / name / "save"),
        "output_dir": str(root / name / "output"),
        "save_interval": 2,
        **settings,
    }
    return tiny_config("mesh", "1+1R2+1", world_size=world_size, **values)


def counts(root: Path, name: str, each: Start) -> dict[str, int]:
    """Count the files opened below the directories for data, cache and output."""
    places = {"data": root / "data", "cache": root / "cache", "output": root / name / "output"}
    return {place: each.count(directory) for place, directory in places.items()}


def test_files_opened_at_the_start(root: Path) -> None:
    """Their number depends only on the number of data sets, not on ranks, steps or old checkpoints.

    Rank 0 also inspects the data, checks the cache for missing entries, and opens the outputs.
    """
    # The cache is cold, so rank 0 builds it. "many" leaves four checkpoints.
    many = run(root, 4, "many", train_iters=8)
    few = run(root, 2, "few", train_iters=2)
    # The cache is warm: other numbers of ranks and steps, and resumed runs.
    warm = {
        "few again": run(root, 4, "few again", train_iters=2),
        "many again": run(root, 2, "many again", train_iters=8),
        "few": run(root, 2, "few", train_iters=8, load=str(root / "few/save")),
        "many": run(root, 4, "many", train_iters=10, load=str(root / "many/save")),
    }
    for name, starts in [("many", many), ("few", few), *warm.items()]:
        for each in starts[1:]:
            assert counts(root, name, each) == EVERY_RANK, name
    looked_through = STREAMS * (PREFIXES * 4 + PREFIXES * 4 + 3)
    inspected = 4 * PREFIXES
    for name in ("few again", "many again"):
        rank_zero = counts(root, name, warm[name][0])
        assert rank_zero["data"] == EVERY_RANK["data"] + inspected
        assert rank_zero["cache"] == EVERY_RANK["cache"] + looked_through
    assert counts(root, "few again", warm["few again"][0]) == counts(
        root, "many again", warm["many again"][0]
    )
    check_checkpoints(root, few=warm["few"], many=warm["many"])
    fresh, resumed = warm["many again"][0], warm["few"][0]
    check_breakdown(fresh.messages, checkpoint=False)
    check_breakdown(resumed.messages, checkpoint=True)


def check_checkpoints(root: Path, *, few: list[Start], many: list[Start]) -> None:
    """Check resuming from a single checkpoint of two ranks, and from the last of four of four ranks.

    On the same layout each rank reads the file that it wrote. Rank 0 also searches for checkpoints and reads
    the last one's metadata and validation loss. Each rank opens an unnamed temporary file, to test whether
    the directory is writable.
    """
    writable = 2  # opening the unnamed file counts for the directory and for the file
    for name, starts in (("few", few), ("many", many)):
        for rank, each in enumerate(starts[1:], start=1):
            own = [path for path in each.opened if path.endswith(".distcp")]
            assert [Path(path).name for path in own] == [f"__{rank}_0.distcp"]
            assert each.count(root / name / "save") == 1 + writable
    assert few[0].count(root / "few/save") == many[0].count(root / "many/save") <= 21


def check_breakdown(messages: list[str], *, checkpoint: bool) -> None:
    """One log line breaks down the time to the first step, and its parts add up."""
    pattern = (
        r"first step done ([\d.]+) s after the start of the process: imports ([\d.]+) s, groups ([\d.]+) s, "
        r"data ([\d.]+) s, model ([\d.]+) s, checkpoint ([\d.]+) s, first step ([\d.]+) s"
    )
    ((whole, *parts),) = [
        tuple(map(float, match.groups())) for text in messages if (match := re.fullmatch(pattern, text))
    ]
    assert abs(whole - sum(parts)) < 0.5
    loaded = any(text.startswith("resumed at step ") for text in messages)
    assert loaded == checkpoint


def test_the_breakdown_adds_up(monkeypatch) -> None:
    """Unknown phases, such as those of a save, count towards the phase around them."""
    clock = iter([2.0, 3.0, 7.0, 8.0, 12.0, 12.5])
    monkeypatch.setattr(phases, "process_age", lambda: next(clock))
    monkeypatch.setattr(phases, "_listeners", [])
    times = phases.StartTimes()
    phases.listen(times)
    for phase in ("groups", "data", "planning a save", "model", "loading a checkpoint", "step"):
        phases.enter(phase)
    phases.enter(phases.STARTED)
    phases.enter("data")  # time after the first step is ignored
    assert times.seconds == {
        "imports": 2.0,
        "groups": 1.0,
        "data": 4.0,
        "model": 1.0,
        "loading a checkpoint": 4.0,
        "step": 0.5,
    }
