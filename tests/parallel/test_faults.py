"""The comparison with one process catches planted faults."""

import pytest

from tests.parallel import faults
from tests.parallel.layouts import LAYOUTS, TOLERANCE, assert_equal, gradient_errors, model_of
from tests.parallel.pool import pool
from tests.parallel.training import train


@pytest.mark.parametrize(
    ("fault", "layout", "damaged"),
    [
        (faults.early_reduction, "pp2-dp2-overlap", "decoder.core."),
        (faults.unsummed_routers, "tp2", "decoder.recurrence."),
        (faults.read_before_write, "pp2", "decoder.recurrence."),
        (faults.lost_leaf_gradient, "pp2", "decoder.prelude."),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_planted_fault_is_caught(fault, layout, damaged, reference) -> None:
    model = model_of("mesh", 2, tied=False)
    directory, one = reference(**model)
    processes, settings = LAYOUTS[layout]
    outcomes = pool(processes).run(train, directory, {**model, **settings}, 10, fault)
    with pytest.raises(AssertionError, match="gradients differ"):
        assert_equal(outcomes, one)
    wrong = {name for name, error in gradient_errors(outcomes, one).items() if error > TOLERANCE}
    assert any(name.startswith(damaged) for name in wrong)
