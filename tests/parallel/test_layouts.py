"""Every rank layout trains like one process."""

import os

import pytest

from megatron_mesh.recurrence import SCHEMES
from tests.parallel.layouts import LAYOUTS, RECOMPUTE, assert_equal, model_of, supports
from tests.parallel.pool import pool
from tests.parallel.training import train

# (scheme, loops, tied embedding, recompute, layout)
Case = tuple[str, int, bool, str, str]

CHOSEN: list[Case] = [
    *(("mesh", 2, False, "none", layout) for layout in LAYOUTS),
    *((scheme, 2, False, "none", "pp2") for scheme in SCHEMES if scheme != "mesh"),
    ("mesh", 1, False, "none", "pp4"),
    ("mesh", 3, False, "full", "pp2"),
    ("mesh", 3, False, "full", "dp2-overlap"),
    ("mesh", 3, True, "selective", "tp2-sp-pp2"),
    ("mesh", 1, True, "full", "tp2"),
    ("base", 3, True, "none", "pp2-dp2-overlap"),
    ("static", 2, False, "none", "tp2"),
    ("dynamic", 2, False, "selective", "tp2-pp2"),
    ("vanilla+mesh", 2, True, "none", "pp2"),
    ("vanilla", 2, True, "full", "tp2-pp2"),
    ("static", 2, False, "none", "dp2-gather"),
]


def pairwise() -> list[Case]:
    """Build cases in which every pair of values of any two factors occurs."""
    from allpairspy import AllPairs

    factors = [list(SCHEMES), [1, 2, 3], [False, True], list(RECOMPUTE), list(LAYOUTS)]
    return [case for case in map(tuple, AllPairs(factors)) if supports(case[0], case[4])]


CASES = pairwise() if os.environ.get("MESH_TEST_ALL") else CHOSEN


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_trains_as_one_process(case: Case, reference) -> None:
    scheme, loops, tied, recompute, layout = case
    directory, one = reference(**model_of(scheme, loops, tied))
    processes, settings = LAYOUTS[layout]
    settings = {**model_of(scheme, loops, tied), **RECOMPUTE[recompute], **settings}
    assert_equal(pool(processes).run(train, directory, settings), one)


@pytest.mark.parametrize(
    ("scheme", "processes", "settings"),
    [
        (
            "vanilla",
            4,
            {
                "micro_batch_size": 1,
                "pipeline_model_parallel_size": 2,
                "num_virtual_stages_per_pipeline_rank": 2,
                "overlap_grad_reduce": True,
            },
        ),
        (
            "mesh",
            2,
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "0,1/3,0/1,0"},
        ),
    ],
    ids=["vanilla-with-virtual-stages", "placed-by-hand"],
)
def test_settings_of_one_kind_of_pipeline(scheme: str, processes: int, settings: dict, reference) -> None:
    model = model_of(scheme, 2, tied=False)
    directory, one = reference(**model)
    assert_equal(pool(processes).run(train, directory, {**model, **settings}), one)


def test_a_rank_that_holds_only_padding_of_the_vocabulary(reference) -> None:
    """None of this rank's logits contributes to the loss."""
    model = {**model_of("mesh", 2, tied=False), "make_vocab_size_divisible_by": 256}
    directory, one = reference(**model)
    processes, settings = LAYOUTS["tp2"]
    assert_equal(pool(processes).run(train, directory, {**model, **settings}), one)


def test_a_batch_size_that_grows(reference) -> None:
    """Steps of 2, 3 and 4 micro-batches go through a ring of two ranks in groups of 2, 3 and 2."""
    ramp = {"train_iters": None, "train_samples": 100, "rampup_batch_size": [4, 2, 8]}
    model = {**model_of("mesh", 2, tied=False), **ramp}
    directory, one = reference(**model)
    assert_equal(pool(2).run(train, directory, {**model, "pipeline_model_parallel_size": 2}), one)
