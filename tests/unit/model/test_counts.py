"""Compare parameters, FLOPs and memory of real modules with the paper, our formulas and torch's counters."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.layout import layout
from megatron_mesh.config.presets import PAPER_SCHEMES
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.sizes import forward_flops_per_token, non_embedding_parameters
from megatron_mesh.model import build_model, build_on_meta
from megatron_mesh.model.build import count_parameters
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.planner.text import dry_run_text
from megatron_mesh.recurrence import SCHEMES
from tests.helpers import tiny_config

PRESETS = sorted((Path(__file__).parents[3] / "examples" / "configs").glob("pythia-*.yaml"))


def preset(path: Path, scheme: str) -> Config:
    return resolve(parse_args(["--config", str(path), "--recurrence", scheme]).config)


def counted(name: str, scheme: str) -> dict[str, int]:
    path = next(p for p in PRESETS if p.stem == name)
    return count_parameters(build_on_meta(preset(path, scheme)))


def without_embeddings(counts: dict[str, int]) -> int:
    return sum(n for part, n in counts.items() if part not in ("embedding", "output projection"))


def test_the_papers_counts_to_the_unit() -> None:
    assert without_embeddings(counted("pythia-1.4b", "vanilla")) == 1_208_602_624
    assert without_embeddings(counted("pythia-1.4b", "base")) == 805_736_448
    mesh = counted("pythia-1.4b", "mesh")
    assert without_embeddings(mesh) == 805_797_918
    assert mesh["recurrence"] == 61_470
    assert mesh["embedding"] == mesh["output projection"] == 50_304 * 2048


@pytest.mark.parametrize("scheme", PAPER_SCHEMES)
@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_matches_the_formula(path: Path, scheme: str) -> None:
    config = preset(path, scheme)
    model = build_on_meta(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    counts = count_parameters(model)
    assert without_embeddings(counts) == non_embedding_parameters(config.model)
    h, layers = config.model.hidden_size, layout(config.model)
    own = counts.get("recurrence", 0)
    assert without_embeddings(counts) == layers.unique_layers * (12 * h * h + 13 * h) + 2 * h + own


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensor_parallel_shards_add_up(scheme: str) -> None:
    config = tiny_config(scheme)
    whole = count_parameters(build_on_meta(config))
    config.parallel.tensor_model_parallel_size = 2
    half = count_parameters(build_on_meta(config, tp_rank=1))
    assert half["embedding"] * 2 == whole["embedding"]
    assert whole.total() / 2 < half.total() < whole.total()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_flops_equal_torchs_counter(scheme: str) -> None:
    config = tiny_config(scheme, "1+2R2+1")
    model, seq = build_model(config), config.model.seq_length
    tokens = torch.zeros(2, seq, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens, None, None)
    # The counter sees only matrix products, and counts all attention scores instead of the causal half.
    h, layers = config.model.hidden_size, layout(config.model)
    slots = config.model.mesh_slots or 0
    attention = layers.depth * 2 * seq * h
    elementwise = SCHEMES[scheme].forward_flops(h, layers.loops, slots)
    if SCHEMES[scheme].uses_memory:
        elementwise -= (layers.loops + 1) * 2 * 2 * h * slots
    elif scheme == "dynamic":
        elementwise -= layers.loops * 2 * 3 * h
    ours = forward_flops_per_token(config.model) + attention - elementwise
    assert counter.get_total_flops() == ours * tokens.numel()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_backward_costs_two_forwards(scheme: str) -> None:
    config = tiny_config(scheme, "1+2R2+1")
    model = build_model(config)
    tokens = torch.zeros(2, config.model.seq_length, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = model(tokens, None, None, labels=tokens)
        forward = counter.get_total_flops()
        losses.sum().backward()
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("modules", [None, ["core_attn"], ["mlp"], ["core_attn", "mlp"]])
@pytest.mark.parametrize("scheme", ["vanilla", "base", "static", "mesh"])
def test_activation_estimate(scheme: str, modules: list[str] | None, bf16: bool) -> None:
    """The estimate is within 5 % of the bytes that autograd really saves."""
    selective = {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}
    config = tiny_config(
        scheme, "2+2R2+2", hidden_size=64, seq_length=64, vocab_size=128, bf16=bf16, **selective
    )
    model = build_model(config)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    tokens = torch.zeros(config.training.micro_batch_size, 64, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(tokens, None, None, labels=tokens)
        real = sum(storage.nbytes() for address, storage in saved.items() if address not in parameters)
    assert loss.shape == tokens.shape
    assert abs(make_plan(config, 1).ranks[0].memory.activations / real - 1) < 0.05


def test_plan_of_a_preset() -> None:
    path = next(p for p in PRESETS if p.stem == "pythia-1.4b")
    config = resolve(
        parse_args(["--config", str(path), "--tensor-model-parallel-size", "2"]).config, world_size=8
    )
    plan = dry_run_text(config, world_size=8)
    for part in (
        "805,797,918",
        "61,470",
        "4+8R2+4 (unrolled: 24 layers, 16",
        "tensor 2 x pipeline 1 x data 4",
        "2,097,152",
        "13.19 GiB; at most 1.65 GiB per rank",
    ):
        assert part in plan, plan
