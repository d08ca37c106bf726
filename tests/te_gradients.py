"""Gradients of models of Transformer Engine's layers, fused against unfused: on the stand-in and on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_mesh.config.schema import Config
from megatron_mesh.data import Batch
from megatron_mesh.model import layers_te
from megatron_mesh.parallel import Stage, build_stage
from megatron_mesh.train.step import run_batch
from tests.helpers import relative_error, tiny_config

FP8 = {"fp8_format": "hybrid", "bf16": True}
EVERYWHERE = {**FP8, "fp8_scope": "all"}


def configure(layers: str = "1+1R2+1", world_size: int = 1, **settings: Any) -> Config:
    """A tiny model; two micro-batches per step."""
    settings = {"transformer_impl": "transformer_engine", "global_batch_size": 4, **settings}
    return tiny_config("mesh", layers, world_size, **settings)


def batches(step: int) -> Iterator[Batch]:
    """Micro-batches [2, 16] of tokens, the same for every run."""
    generator = torch.Generator().manual_seed(step)
    while True:
        ids = torch.randint(96, (2, 17), generator=generator)
        positions = torch.arange(16).expand(2, 16)
        yield Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 16), positions)


def train_step(stage: Stage, config: Config, step: int) -> dict[str, torch.Tensor]:
    """The gradients of a step, after which every weight changes by a tenth."""
    stage.zero_grad_buffer()
    run_batch(stage, batches(step), config.training)
    parameters = dict(stage.modules[0].named_parameters())
    gradients = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.mul_(0.9)
    return gradients


def evaluate(stage: Stage, config: Config) -> None:
    """Forward passes without gradients."""
    stage.train(False)
    with torch.no_grad():
        run_batch(stage, batches(99), config.training, forward_only=True)
    stage.train()


def phases(config: Config, *, naive: bool = False, short: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of steps at every moment that could matter (``short``: without evaluation and resume)."""
    stage = build(config, naive)
    found = {name: train_step(stage, config, step) for step, name in enumerate(("first", "later"), 1)}
    if short:
        return found
    evaluate(stage, config)
    found["after evaluation"] = train_step(stage, config, 3)
    resumed = build(config, naive)
    weights = {n: v for n, v in stage.modules[0].state_dict().items() if not n.endswith("_extra_state")}
    resumed.modules[0].load_state_dict(weights)
    found["resumed"] = train_step(resumed, config, 4)
    return found


def build(config: Config, naive: bool) -> Stage:
    """The rank's share; ``naive``: with Megatron's handling of the flag."""
    stage = build_stage(config)
    if naive:
        for module in linears(stage).values():
            module.disable_parameter_transpose_cache = False
        for chunk in stage.chunks:
            vars(chunk).pop("modules_with_is_first_microbatch", None)
    return stage


def linears(stage: Stage) -> dict[str, Any]:
    """Transformer Engine's linear modules by name."""
    return {n: m for n, m in stage.modules[0].named_modules() if hasattr(m, "is_first_microbatch")}


@contextmanager
def stock_wrappers() -> Iterator[None]:
    """Megatron's wrappers as they are."""
    ours = layers_te._RefreshesCast.forward
    del layers_te._RefreshesCast.forward
    try:
        yield
    finally:
        layers_te._RefreshesCast.forward = ours


def worst(fused: dict[str, Any], unfused: dict[str, Any]) -> dict[str, float]:
    """By phase, the largest relative error of a parameter's gradient."""
    return {p: max(relative_error(fused[p][n], unfused[p][n]) for n in unfused[p]) for p in unfused}


def gradients(always_cast: dict[str, Any]) -> dict[str, Any]:
    """Fused against unfused, for K = 1, 2, 3, with and without FP8, ours and Megatron's handling.

    Args:
        always_cast: settings of FP8 for the reference, in which a stale cast would be seen.
    """
    found = {}
    for loops in (1, 2, 3):
        layers = f"1+1R{loops}+1"
        for label, fp8, reference in (("no FP8", {}, {}), ("FP8", EVERYWHERE, always_cast)):
            unfused = phases(configure(layers, **reference))
            config = configure(layers, gradient_accumulation_fusion=True, **fp8)
            found[f"ours, K={loops}, {label}"] = worst(phases(config), unfused)
            with stock_wrappers():
                found[f"naive, K={loops}, {label}"] = worst(phases(config, naive=True), unfused)
    full = {"recompute_granularity": "full"}
    unfused = phases(configure(**always_cast, **full))
    config = configure(gradient_accumulation_fusion=True, **EVERYWHERE, **full)
    found["ours, K=2, FP8, recomputed"] = worst(phases(config), unfused)
    return found
