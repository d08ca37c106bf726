"""A resumed run continues like an uninterrupted one, on the same rank layout and on others."""

import numpy as np
import pytest

from tests.parallel import resume
from tests.parallel.layouts import LAYOUTS, model_of
from tests.parallel.pool import pool

MODEL = model_of("mesh", 2, tied=False)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["tp2", "pp4", "dp2-distopt", "pp2-dp2-overlap"])
def test_the_same_layout_continues_bitwise(layout: str, bf16: bool, tmp_path) -> None:
    processes, settings = LAYOUTS[layout]
    case = {**MODEL, **settings, "bf16": bf16}
    expected = pool(processes).run(resume.save_and_continue, tmp_path, case)
    assert pool(processes).run(resume.load_and_continue, tmp_path, case) == expected


@pytest.mark.parametrize("other", ["dp2-distopt", "tp2-sp-pp2"])
def test_another_layout_continues_alike(other: str, tmp_path) -> None:
    """The distributed optimizer has several buckets, and the number of ranks changes."""
    processes, settings = LAYOUTS["pp2-dp2-overlap"]
    expected = pool(processes).run(resume.save_and_continue, tmp_path, {**MODEL, **settings})[0]
    processes, settings = LAYOUTS[other]
    if "use_distributed_optimizer" not in settings:
        settings = {**settings, "use_distributed_optimizer": True}
    found = pool(processes).run(resume.load_and_continue, tmp_path, {**MODEL, **settings})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(("first", "second"), [("pp2", "pp2"), ("pp2-dp2-overlap", "tp2")])
def test_a_tied_embedding_continues_alike(first: str, second: str, tmp_path) -> None:
    """One end of the pipeline writes its weight, the other its moments."""
    model = {**model_of("mesh", 2, tied=True), "bf16": True}
    (ranks, settings), (other_ranks, other_settings) = LAYOUTS[first], LAYOUTS[second]
    expected = pool(ranks).run(resume.save_and_continue, tmp_path, {**model, **settings})
    found = pool(other_ranks).run(resume.load_and_continue, tmp_path, {**model, **other_settings})
    if first == second:
        assert found == expected
    else:
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-3)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("first", "second"), [("pp2-dp2-overlap", "tp2"), ("tp2-pp2", "dp2-distopt")])
def test_another_kind_of_optimizer_continues_alike(first: str, second: str, bf16: bool, tmp_path) -> None:
    """The run changes between the distributed and the plain optimizer, and between rank layouts."""
    (ranks, settings), (other_ranks, other_settings) = LAYOUTS[first], LAYOUTS[second]
    model = {**MODEL, "bf16": bf16}
    expected = pool(ranks).run(resume.save_and_continue, tmp_path, {**model, **settings})[0]
    found = pool(other_ranks).run(resume.load_and_continue, tmp_path, {**model, **other_settings})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3 if bf16 else 1e-5)
