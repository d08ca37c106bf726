"""The rank layouts under test, and how closely they must agree with one process."""

from typing import Any

import numpy as np

from tests.parallel.training import Outcome

# name -> (processes, settings)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    # Under tensor parallelism a micro-batch takes hundreds of collectives, so two micro-batches are enough.
    "tp2": (2, {"tensor_model_parallel_size": 2, "micro_batch_size": 4}),
    "tp2-sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 4}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "tp2-pp2": (
        4,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 4},
    ),
    "tp2-sp-pp2": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2},
    ),
    "dp2": (2, {"micro_batch_size": 1}),
    "dp2-distopt": (2, {"micro_batch_size": 1, "use_distributed_optimizer": True}),
    "dp2-gather": (
        2,
        {
            "micro_batch_size": 1,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "ddp_bucket_size": 3000,
        },
    ),
    "tp2-dp2-distopt": (
        4,
        {"micro_batch_size": 1, "tensor_model_parallel_size": 2, "use_distributed_optimizer": True},
    ),
    "pp3-group": (
        3,
        {
            "micro_batch_size": 1,
            "pipeline_model_parallel_size": 3,
            "microbatch_group_size_per_virtual_stage": 4,
        },
    ),
    "pp2-blocking": (2, {"pipeline_model_parallel_size": 2, "overlap_p2p_communication": False}),
    "dp2-overlap": (2, {"micro_batch_size": 1, "overlap_grad_reduce": True, "ddp_bucket_size": 3000}),
    "pp2-dp2-overlap": (
        4,
        {
            "micro_batch_size": 1,
            "pipeline_model_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
            "ddp_bucket_size": 3000,
        },
    ),
}

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    "full": {"recompute_granularity": "full"},
}

TOLERANCE = 1e-5


def model_of(scheme: str, loops: int, tied: bool) -> dict[str, Any]:
    """Return model settings with sections that no pipeline divides evenly."""
    if scheme == "vanilla":
        layers = "4"
    elif scheme == "vanilla+mesh":
        layers = "+".join(["1", *["2"] * loops, "1"])
    else:
        layers = f"1+3R{loops}+1"
    return {"recurrence": scheme, "layers": layers, "untie_embeddings_and_output_weights": not tied}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def merged(outcomes: list[Outcome]) -> dict[str, np.ndarray]:
    """Merge the gradients of all ranks, by name."""
    return {name: grad for outcome in outcomes for name, grad in outcome.gradients.items()}


def supports(scheme: str, layout: str) -> bool:
    """Whether a layout is valid for a scheme: vanilla has only 4 layers, and no passes to group."""
    return scheme != "vanilla" or layout != "pp3-group"


def gradient_errors(outcomes: list[Outcome], one: Outcome) -> dict[str, float]:
    """Return the largest relative error of each gradient, over all ranks that hold it."""
    assert set(merged(outcomes)) == set(one.gradients)
    errors = dict.fromkeys(one.gradients, 0.0)
    for outcome in outcomes:
        for name, grad in outcome.gradients.items():
            errors[name] = max(errors[name], relative(grad, one.gradients[name]))
    return errors


def assert_equal(outcomes: list[Outcome], one: Outcome) -> None:
    """Assert that losses, gradient norms and all gradients equal those of one process."""
    errors = gradient_errors(outcomes, one)
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"gradients differ: {wrong}"
    for outcome in outcomes:
        np.testing.assert_allclose(outcome.losses, one.losses, rtol=TOLERANCE)
        np.testing.assert_allclose(outcome.grad_norms, one.grad_norms, rtol=TOLERANCE)
        for name, weight in outcome.weights.items():
            # Adam divides by the root of tiny second moments, which magnifies differences.
            np.testing.assert_allclose(weight, one.weights[name], rtol=1e-4, atol=1e-5, err_msg=name)
