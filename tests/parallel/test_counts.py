"""Each rank writes and reads only what it owns: count bytes, memory, collectives and opened files.

``make test-scale`` runs all cases of the 160M model, which takes minutes and up to 12 GB of memory.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.planner.plan import make_plan
from tests.helpers import tiny_config
from tests.parallel import counts
from tests.parallel.pool import pool

MB = 10**6
TENSOR, PIPELINE = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
BOTH, SHARDED = TENSOR | PIPELINE, {"use_distributed_optimizer": True}
# (number of ranks that save, their settings, number of ranks that load on another layout, their settings)
Case = tuple[int, dict[str, Any], int, dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """Bytes allowed in addition to a rank's share."""

    written: int
    memory: int
    """For a box and its file (four at once when loading), and for libraries."""
    collectives: int
    read_twice: float
    """A ratio: bytes that all ranks read from another layout's checkpoint, divided by the bytes needed.

    Two ranks read a piece twice if the part of one ends in it and the part of the other begins."""


SMALL_LIMITS = Limits(written=MB // 4, memory=64 * MB, collectives=MB // 4, read_twice=1.3)
LARGE_LIMITS = Limits(written=2 * MB, memory=100 * MB, collectives=MB, read_twice=1.15)

SMALL: dict[str, Case] = {
    "dp2-tp2": (2, {}, 2, TENSOR),
    "tp2-dp2": (2, TENSOR, 2, SHARDED),
    "dp4sharded-pp2": (4, SHARDED, 2, PIPELINE),
    "tp2dp2-pp2dp2": (4, TENSOR | SHARDED, 4, PIPELINE | SHARDED),
    "tp2pp2-dp2": (4, BOTH, 2, SHARDED),
}
LARGE: dict[str, Case] = {
    "2: data, plain": (2, {}, 2, TENSOR),
    "2: data": (2, SHARDED, 2, TENSOR),
    "2: tensor": (2, TENSOR, 2, PIPELINE),
    "2: pipeline": (2, PIPELINE, 4, TENSOR | SHARDED),
    "4: data": (4, SHARDED, 2, SHARDED),
    "4: tensor": (4, TENSOR | SHARDED, 4, SHARDED),
    "4: pipeline": (4, PIPELINE | SHARDED, 4, TENSOR | SHARDED),
    "4: tensor, pipeline": (4, BOTH, 2, SHARDED),
    "8: data": (8, SHARDED, 4, BOTH),
    "8: tensor": (8, TENSOR | SHARDED, 8, SHARDED),
    "8: pipeline": (8, PIPELINE | SHARDED, 4, SHARDED),
    "8: tensor, pipeline": (8, BOTH | SHARDED, 4, TENSOR | SHARDED),
}


def small(ranks: int, settings: dict[str, Any]) -> Config:
    shape = {"hidden_size": 256, "vocab_size": 8192, "layers": "1+2R2+1", "micro_batch_size": 1}
    return tiny_config(world_size=ranks, **{"bf16": True, **shape, **settings})


def large(ranks: int, settings: dict[str, Any]) -> Config:
    file = Path(__file__).parents[2] / "examples" / "configs" / "pythia-160m.yaml"
    values = {"seq_length": 128, "micro_batch_size": 1, "global_batch_size": 8, **settings}
    return resolve(with_values(parse_args(["--config", str(file)]).config, values), world_size=ranks)


@pytest.mark.parametrize("name", SMALL)
def test_small_model(name: str, tmp_path: Path) -> None:
    ranks, settings, others, other_settings = SMALL[name]
    check(name, small(ranks, settings), ranks, small(others, other_settings), others, tmp_path)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_tied_embedding(bf16: bool, tmp_path: Path) -> None:
    """The two pipeline ranks that hold its copies divide the writing between them."""
    config = small(2, PIPELINE | {"untie_embeddings_and_output_weights": False, "bf16": bf16})
    saves = [save for save, _, _ in pool(2).run(counts.save_and_load, config, tmp_path)]
    check_saves(saves, SMALL_LIMITS, copied=False)
    check_plan(config, saves, size_of(saves[0].path))


@pytest.mark.skipif(os.environ.get("MESH_TEST_SCALE") != "1", reason="minutes; make test-scale")
@pytest.mark.parametrize("name", LARGE)
def test_160m(name: str, tmp_path: Path) -> None:
    ranks, settings, others, other_settings = LARGE[name]
    check(name, large(ranks, settings), ranks, large(others, other_settings), others, tmp_path)
    shutil.rmtree(tmp_path)  # pytest would retain it


def check(name: str, config: Config, ranks: int, other: Config, others: int, directory: Path) -> None:
    limits = LARGE_LIMITS if name in LARGE else SMALL_LIMITS
    results = pool(ranks).run(counts.save_and_load, config, directory, timeout=900)
    plain, background, loads = zip(*results, strict=True)
    total = size_of(plain[0].path)
    other_loads = pool(others).run(counts.load_only, other, background[0].path, timeout=900)
    print(f"\n{table_row(name, total, plain, background, loads, other_loads)}")
    check_saves(plain, limits, copied=False)
    check_saves(background, limits, copied=True)
    check_plan(config, plain, total)
    check_loads(config, loads, own_share=[save.written for save in plain], limits=limits)
    check_other_loads(other, other_loads, total, limits)


def size_of(checkpoint: Path) -> int:
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def check_saves(saves: Sequence[counts.Save], limits: Limits, *, copied: bool) -> None:
    total = size_of(saves[0].path)
    assert sum(save.written for save in saves) == total  # every file was written by exactly one rank
    for rank, save in enumerate(saves):
        assert save.written <= 1.15 * total / len(saves) + limits.written
        assert save.counts.memory <= 1.3 * save.written * copied + limits.memory
        assert save.counts.sent + save.counts.received <= limits.collectives
        assert not [name for name in save.counts.reads if name.endswith(".distcp")]  # not even for checksums
        if rank:
            assert save.counts.opened == 1


def check_plan(config: Config, saves: Sequence[counts.Save], total: int) -> None:
    """The planner's estimates equal the bytes on disk, apart from file headers and small files."""
    savings = [rank.saving for rank in make_plan(config, len(saves)).ranks]
    heads = 200_000
    largest = max(save.written for save in saves)
    assert max(saving.largest for saving in savings) == pytest.approx(largest, rel=0.02, abs=heads)
    assert sum(saving.total for saving in savings) == pytest.approx(total, rel=0.02, abs=heads)


def check_loads(config: Config, loads: Sequence[counts.Load], own_share: list[int], limits: Limits) -> None:
    """A rank reads only its main parameters and moments: 12 of the 14 bytes per parameter that it saved."""
    weights = 2 * max(rank.parameters for rank in make_plan(config, len(loads)).ranks)
    for load, share in zip(loads, own_share, strict=True):
        assert load.filled == load.overlapping + load.generators
        assert load.filled <= load.read <= load.filled + limits.written
        assert load.read <= 1.2 * 12 / 14 * share + limits.written
        assert load.counts.memory <= 1.3 * weights + limits.memory  # replicas gather the weights
        assert load.generators > 0
    assert sum(load.asked for load in loads) == 3 * distinct_parameters(config, len(loads))


def check_other_loads(config: Config, loads: Sequence[counts.Load], total: int, limits: Limits) -> None:
    """A rank reads only the stored pieces that it needs, each of them once.

    A piece is always read in full, so that its checksum can be verified. With two tensor-parallel ranks,
    which split rows or columns, both may need every piece.
    """
    for load in loads:
        assert load.filled == load.overlapping and load.generators == 0
        assert load.filled <= load.read <= load.filled + limits.written
    assert sum(load.asked for load in loads) == 3 * distinct_parameters(config, len(loads))
    factor = config.parallel.tensor_model_parallel_size
    needed = factor * 12 / 14 * total
    assert sum(load.read for load in loads) <= limits.read_twice * needed + len(loads) * limits.written


def distinct_parameters(config: Config, ranks: int) -> int:
    """Count the parameters of all ranks, without data-parallel replicas."""
    plan = make_plan(config, ranks)
    return config.parallel.tensor_model_parallel_size * sum(rank.parameters for rank in plan.ranks)


def table_row(
    name: str,
    total: int,
    plain: Sequence[counts.Save],
    background: Sequence[counts.Save],
    loads: Sequence[counts.Load],
    others: Sequence[counts.Load],
) -> str:
    """Format a row for ``make test-scale``, in MB, with the largest value of any rank."""
    share = total / len(plain)
    written = max(save.written for save in plain)
    memory = [max(x.counts.memory for x in kind) / MB for kind in (plain, background, loads)]
    sent = max(save.counts.sent + save.counts.received for save in (*plain, *background))
    read, other = max(load.read for load in loads), max(load.read for load in others)
    everything = sum(load.read for load in others)
    return (
        f"{name}: total {total / MB:.1f}, written {written / MB:.1f} ({written / share:.3f} of its part); "
        f"memory {memory[0]:.0f}, background {memory[1]:.0f}, loading {memory[2]:.0f}; "
        f"collectives {sent / MB:.3f}; read {read / MB:.1f}; on another layout of {len(others)} ranks "
        f"{other / MB:.1f}, together {everything / total:.2f} of total"
    )
