"""The step benchmark at toy size: what it builds and counts, and the arithmetic of its report."""

import json
import runpy
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_mesh.command import call
from megatron_mesh.config.layout import layout, padded_vocab_size
from megatron_mesh.config.settings import with_values
from megatron_mesh.config.sizes import non_embedding_parameters
from megatron_mesh.errors import UserError
from megatron_mesh.model import build_model, implementation
from megatron_mesh.planner.plan import make_plan
from megatron_mesh.runtime import profiling
from tests.helpers import one_process
from tests.parallel.watch import IN_HOST_MEMORY, Watch
from tools.bench import measure as clock
from tools.bench import steps
from tools.bench.measure import MemoryMeter, Times, measure_steps, timed_step
from tools.bench.report import COMPARED, PARTS, StepReport, VariantResult, ratios
from tools.bench.settings import SHAPES, StepSettings, complete, kind_of
from tools.bench.tables import as_markdown
from tools.bench.variants import batches_of, build_plain, build_variant, variant_config

S, B, H, LOOPS = 16, 2, 32, 3
TOY = StepSettings(
    variants=("plain", "base", "mesh"),
    shape="160m",
    bf16=False,
    layers=f"1+1R{LOOPS}+1",
    hidden_size=H,
    num_attention_heads=2,
    vocab_size=128,
    seq_length=S,
    micro_batch_size=B,
    num_micro_batches=3,
    steps=4,
    warmup=1,
    threads=1,
)


def command_line(settings: StepSettings) -> list[str]:
    """Spell ``settings`` as flags."""
    words = []
    for name, value in vars(settings).items():
        if value is None or value is False:
            continue
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
            continue
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Run the command and read what it writes."""
    output = tmp_path_factory.mktemp("bench") / "report.json"
    call(steps.main, command_line(replace(TOY, output=output)))
    return json.loads(output.read_text()) | {"markdown": output.with_suffix(".md").read_text()}


def test_report_has_all_times_and_derived_figures(report: dict) -> None:
    assert list(report["variants"]) == ["plain", "base", "mesh"]
    assert report["tokens_per_step"] == 3 * S * B
    assert report["threads"] == 1 and report["versions"]["torch"] == torch.__version__
    assert report["settings"]["layers"] == TOY.layers
    assert (
        set(report["parts"]) == {"layers", "memory", "optimizer"} and "Adam" in report["parts"]["optimizer"]
    )
    for variant in report["variants"].values():
        seconds = {part: np.array(times) for part, times in variant["seconds"].items()}
        seconds["step"] = sum(seconds.values())
        for part in PARTS:
            assert seconds[part].shape == (TOY.steps,) and (seconds[part] > 0).all()
            assert list(variant[part].values()) == pytest.approx(np.percentile(seconds[part], [50, 25, 75]))
        speed = variant["tokens_per_second"]
        assert speed == pytest.approx(96 / np.median(seconds["step"]))
        assert variant["model_tflops"] == pytest.approx(speed * variant["flops_per_token"] / 1e12)
        assert f"{speed:,.0f}" in report["markdown"]


def test_flops_are_those_of_matrices_and_causal_attention(report: dict) -> None:
    depth, vocabulary = 2 + LOOPS, 128
    base = 3 * (depth * (24 * H * H + 2 * S * H) + 2 * H * vocabulary)
    flops = {name: variant["flops_per_token"] for name, variant in report["variants"].items()}
    assert flops["plain"] == flops["base"] == base < flops["mesh"] < 1.2 * base


def test_ratios_are_within_a_round(report: dict) -> None:
    assert list(report["ratios"]) == ["base / plain", "mesh / plain", "mesh / base"]
    for pair, parts in report["ratios"].items():
        above, below = (
            np.array(report["variants"][name]["seconds"]["optimizer"]) for name in pair.split(" / ")
        )
        assert list(parts["optimizer"].values()) == pytest.approx(np.percentile(above / below, [50, 25, 75]))

    # A disturbance of whole rounds changes both medians, but must not change the ratio.
    disturbance = np.array([1.0, 9.0, 2.0, 5.0])
    results = {
        name: VariantResult(0, None, Times(list(factor * disturbance), [0.0] * 4, list(disturbance)))
        for name, factor in (("base", 2.0), ("mesh", 3.0))
    }
    spread = ratios(results)["mesh / base"]
    assert [spread[part].median for part in COMPARED] == pytest.approx([1.5, 1.0, 4 / 3])
    assert spread["step"].lower == spread["step"].upper == pytest.approx(4 / 3)


def test_parameters_and_saved_states(report: dict) -> None:
    variants = report["variants"]
    embeddings = 2 * 128 * H
    for name, scheme in (("plain", "vanilla"), ("base", "base"), ("mesh", "mesh")):
        model = variant_config(TOY, scheme).model
        assert variants[name]["parameters"] == non_embedding_parameters(model) + embeddings
    kept = {name: variant["kept_for_backward"] for name, variant in variants.items()}
    assert kept["plain"] == kept["base"]
    assert kept["mesh"]["states"] - kept["base"]["states"] == LOOPS + 1
    assert kept["mesh"]["state_bytes"] - kept["base"]["state_bytes"] == (LOOPS + 1) * S * B * H * 4


def test_parts_of_a_step_and_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only these ranges advance: 1 s clearing, 5 s forward-backward (with 2 s reduction), and
    4 s in the optimizer (with 1 s agreement of the ranks)."""
    now = 0.0

    class Part:
        """A variant whose ranges take fixed times."""

        def __init__(self, name: str):
            self.name = name

        def step(self, batches: list) -> None:
            with profiling.named("clear"):
                advance(1)
            with profiling.named("forward-backward"):
                advance(3)
                with profiling.named("communication"):
                    advance(2)
            with profiling.named("agreement"), profiling.named("ignored"):
                advance(1)
            with profiling.named("update"):
                advance(3)

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    turns: list[str] = []
    variants = [Part("a"), Part("b"), Part("c")]
    memory = MemoryMeter()
    times = measure_steps(
        variants, [], steps=8, warmup=2, memory=memory, on_step=lambda name, _: turns.append(name)
    )
    for name in "abc":
        assert times[name] == Times([3.0] * 8, [2.0] * 8, [5.0] * 8)
        assert times[name].step == [10.0] * 8
    rounds = [tuple(turns[i : i + 3]) for i in range(0, 30, 3)]
    assert len(turns) == 30 and all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(Counter(rounds)) > 2, "the order within a round must change"


def test_a_measured_step_is_a_training_step() -> None:
    config = variant_config(TOY, "mesh")
    with one_process(config):
        variant = build_variant("mesh", config)
        before = {name: p.detach().clone() for name, p in variant.model.named_parameters()}
        times = measure_steps([variant], batches_of(TOY), steps=2, warmup=1, memory=MemoryMeter())
        moments = variant.optimizer.optimizer.state
        assert all(not torch.equal(p, before[name]) for name, p in variant.model.named_parameters())
        assert min(times["mesh"].communication) > 0, "the reduction must be timed by itself"
        assert {int(state["step"]) for state in moments.values()} == {3}


def test_only_the_agreement_waits_for_the_device_in_a_measured_step() -> None:
    config = variant_config(TOY, "mesh")
    with one_process(config):
        variant = build_variant("mesh", config)
        with Watch() as watch:
            timed_step(variant, batches_of(TOY), Times())
    waits = {where: n for where, n in watch.seen.waits.items() if where not in IN_HOST_MEMORY}
    assert waits.pop("bench/measure.py: timed_step") == 1  # before the step
    assert waits.pop("bench/measure.py: Stopwatch.seconds") == 5  # after it, once per range
    assert waits.pop("embeddings/rotary_pos_embedding.py: RotaryEmbedding.get_emb") == 1  # in the first step
    assert waits == {"train/vote.py: _count": 1}


def test_plain_is_megatron_core_itself_and_computes_what_vanilla_does() -> None:
    config = with_values(variant_config(TOY, "plain"), {"scale_embeddings": False})
    (batch,) = batches_of(replace(TOY, num_micro_batches=1))
    with one_process(config):
        plain, vanilla = build_plain(config), build_model(config)
        assert type(plain) is GPTModel and type(plain.decoder) is TransformerBlock
        assert len(plain.decoder.layers) == LOOPS + 2
        logits = [m(batch.tokens, batch.position_ids, None) for m in (plain, vanilla)]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"variants": ("base", "mash")}, "--variants mash: no such variant"),
        ({"variants": ("eager-fp8",)}, "the eager loop has no FP8; remove -fp8"),
        ({"variants": ("mesh-fp8",)}, "none of them can run here .*(Transformer Engine|there is no GPU)"),
        ({"profile": Path(__file__) / "traces"}, "cannot be created .*; name another directory"),
        ({"variants": ("base", "base")}, "each name once"),
        ({"layers": "12"}, "--layers 12 is a plain depth"),
        ({"steps": 0}, "--steps 0 is out of range"),
        ({"num_attention_heads": 5}, "not divisible by --num-attention-heads"),
        ({"output": Path("absent/report.json")}, "report.json cannot be written"),
        ({"output": Path("report.md")}, "is reserved for the tables"),
        ({"output": Path(__file__).parents[3] / "README.json"}, "README.md, which no earlier run wrote"),
    ],
)
def test_mistakes_are_reported_before_anything_is_built(
    changes: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.bench.steps.build_variant", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match=message):
        call(steps.main, command_line(replace(TOY, **changes)))


def test_missing_fused_gradients_are_reported_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "why_no_transformer_engine", lambda: "it is gone")
    monkeypatch.setattr(implementation, "has_fused_gradients", lambda: False)
    monkeypatch.setattr("tools.bench.steps.build_variant", lambda *_: pytest.fail("built"))
    with pytest.raises(UserError, match="--gradient-accumulation-fusion needs Transformer Engine or apex"):
        call(steps.main, command_line(replace(TOY, gradient_accumulation_fusion=True)))


def test_tables_name_the_settings() -> None:
    def first_line(**changes: object) -> str:
        return as_markdown(StepReport(replace(TOY, **changes), {}, {})).splitlines()[0]

    assert "fp32, 4 steps" in first_line()
    chosen = {"recompute_granularity": "full", "gradient_accumulation_fusion": True}
    expected = (
        "fp32, recomputation full, weight gradients fused, FP8 tensorwise (core), eager with sdpa attention, "
    )
    assert expected in first_line(variants=("eager", "base-fp8"), **chosen)


def test_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match="runs in one process, but 4 were started"):
        call(steps.main, command_line(TOY))


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tools.bench.variants.build_variant", interrupt)
    monkeypatch.setattr(sys, "argv", ["steps.py", *command_line(TOY)])
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(steps.__file__, run_name="__main__")
    assert ending.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted: nothing was written\n")


@pytest.mark.parametrize("name", SHAPES)
def test_all_variants_of_a_shape_fit_an_h200_together(name: str) -> None:
    """By the planner's count. The margin is for CUDA's context, library workspaces and fragmentation."""
    settings = complete(StepSettings(shape=name), gpu=True)
    held, activations = 0, 0
    for variant in settings.variants or ():
        memory = make_plan(variant_config(settings, variant), 1).ranks[0].memory
        eager = variant == "eager"
        # Eager: float32 weights, gradients and moments. Autocast and an unfused loss save 2.5 times as much.
        held += memory.gradients * 4 if eager else memory.total - memory.activations
        activations = max(activations, int(memory.activations * (2.5 if eager else 1)))
    assert held + activations < 135e9, "must fit the 150e9 bytes that torch sees"


def test_names_of_variants() -> None:
    kind = kind_of("anchor-emb-fp8-compiled")
    assert (kind.scheme, kind.fp8, kind.compiled) == ("anchor-emb", True, True)
    kind = kind_of("vanilla+mesh")
    assert (kind.scheme, kind.fp8, kind.compiled) == ("vanilla+mesh", False, False)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_run(name: str, gpu: bool) -> None:
    settings = complete(StepSettings(shape=name), gpu)
    assert settings.variants and settings.bf16 is gpu
    for variant in settings.variants:
        model = variant_config(settings, variant).model
        assert layout(model).depth == layout(variant_config(settings, "base").model).depth
        assert model.hidden_size == SHAPES[name].hidden_size and padded_vocab_size(model) == 50304
    chosen = replace(settings, micro_batch_size=3, variants=("mesh",))
    assert complete(chosen, gpu) == chosen


def test_compiled_layers_are_the_layers() -> None:
    config = variant_config(TOY, "base-compiled")
    with one_process(config):
        plain, compiled = (build_variant(name, config) for name in ("base", "base-compiled"))
    assert len(list(compiled.layers)) == layout(config.model).unique_layers
    assert all(layer._compiled_call_impl is not None for layer in compiled.layers)
    assert all(layer._compiled_call_impl is None for layer in plain.layers)
