"""Test that in bfloat16 a rank layout differs from one process only by rounding, as a plain GPT does."""

import pytest

from tests.parallel.layouts import LAYOUTS, gradient_errors, model_of
from tests.parallel.pool import pool
from tests.parallel.training import train

STEPS = 4
PARTS = ("embedding", "prelude", "core", "recurrence", "coda", "final_layernorm", "output_layer")


def _errors(scheme: str, layout: str, reference) -> tuple[dict[str, float], float]:
    """Return the largest relative error of the gradients in each part after a step, and of the losses."""
    model = {**model_of(scheme, 2, tied=False), "bf16": True}
    directory, one = reference(**model)
    processes, settings = LAYOUTS[layout]
    outcomes = pool(processes).run(train, directory, {**model, **settings}, STEPS)
    losses = [abs(a - b) / b for o in outcomes for a, b in zip(o.losses, one.losses[:STEPS], strict=True)]
    errors = gradient_errors(outcomes, one)
    by_part = {part: max((e for n, e in errors.items() if part in n), default=0.0) for part in PARTS}
    by_part["layers"] = max(e for name, e in errors.items() if ".layers." in name)
    return by_part, max(losses)


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2", "tp2-pp2", "pp2-dp2-overlap"])
def test_bfloat16_agrees_as_well_as_a_plain_gpt(layout: str, reference) -> None:
    (plain, plain_loss), (mesh, mesh_loss) = (
        _errors(scheme, layout, reference) for scheme in ("vanilla", "mesh")
    )
    print(f"{layout}: plain {plain} {plain_loss}, mesh {mesh} {mesh_loss}")
    # A bfloat16 number is off by up to 2^-9, and a gradient is a sum of many. Without tensor parallelism, the
    # plain model's sums don't depend on the layout. Its error is then 0, and we allow 2^-6.
    yardstick = 3 * max(plain["layers"], 2**-6)
    for part, error in mesh.items():
        assert error <= yardstick, part
    assert mesh_loss <= 3 * plain_loss + 1e-4
