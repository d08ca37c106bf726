"""Test precision settings: which are rejected, and what happens without Transformer Engine."""

import importlib.util
import logging
import os
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.fusions import fused_layer_norm

from megatron_mesh.config.placement import placement
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import ParallelConfig, PrecisionConfig
from megatron_mesh.errors import UserError
from megatron_mesh.model import build_model, build_on_meta, implementation, layers
from megatron_mesh.model.implementation import TRANSFORMER_ENGINE, attention_backend, choose, has_fused_norms
from megatron_mesh.model.layers import ApexLayerNorm, LayerNorm
from megatron_mesh.model.transformer_config import section_config, transformer_config
from tests.helpers import tiny_config

FP8: dict[str, Any] = {"fp8_format": "hybrid", "bf16": True}
DELAYED = {**FP8, "fp8_recipe": "delayed"}
ENDS = {**FP8, "fp8_scope": "all", "first_last_layers_bf16": True}
GATHER = {**FP8, "fp8_param_gather": True, "use_distributed_optimizer": True}
BLOCKS = {
    **FP8,
    "fp8_recipe": "blockwise",
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "world_size": 2,
}

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"fp8_format": "e4m3"}, ["--fp8-format needs --bf16"]),
    ({**FP8, "transformer_impl": "local"}, ["--fp8-format", "--transformer-impl auto"]),
    ({"fp8_recipe": "blockwise"}, ["--fp8-recipe needs --fp8-format"]),
    ({"fp8_scope": "all"}, ["--fp8-scope needs --fp8-format"]),
    ({"fp8_param_gather": True}, ["--fp8-param-gather needs --fp8-format"]),
    ({**FP8, "fp8_param_gather": True}, ["needs --use-distributed-optimizer"]),
    ({**FP8, "num_layers_at_end_in_bf16": 2}, ["needs --first-last-layers-bf16"]),
    ({**FP8, "fp8_amax_history_len": 4}, ["needs --fp8-recipe delayed"]),
    ({**DELAYED, "fp8_amax_history_len": 0}, ["--fp8-amax-history-len"]),
    ({**FP8, "first_last_layers_bf16": True}, ["use --fp8-scope all"]),
    ({**ENDS, "num_layers_at_start_in_bf16": 2}, ["--num-layers-at-start-in-bf16 2", "1 layers", "prelude"]),
    ({**ENDS, "num_layers_at_end_in_bf16": 2}, ["--num-layers-at-end-in-bf16 2", "coda"]),
    ({**ENDS, "fp8_recipe": "delayed"}, ["--fp8-recipe delayed", "use --fp8-recipe tensorwise"]),
    ({**DELAYED, "fp8_amax_compute_algo": "most_recent"}, ["use max"]),
    ({**DELAYED, "recompute_granularity": "full"}, ["cannot recompute", "only core_attn"]),
    (
        {**DELAYED, "recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        ["cannot recompute", "only core_attn"],
    ),
    ({**FP8, "hidden_size": 40}, ["--hidden-size is 40", "multiple of 16", "32 or 48"]),
    ({**FP8, "ffn_hidden_size": 72}, ["--ffn-hidden-size is 72", "64 or 80"]),
    ({**FP8, "seq_length": 12}, ["--micro-batch-size x --seq-length is 24", "16 or 32"]),
    (
        {**FP8, "tensor_model_parallel_size": 4, "world_size": 4},
        ["--hidden-size / --tensor-model-parallel-size 4 is 8"],
    ),
    (
        {**FP8, "context_parallel_size": 2, "micro_batch_size": 1, "world_size": 2},
        ["--micro-batch-size x --seq-length / --context-parallel-size 2 is 8", "multiple of 16"],
    ),
    (
        {**BLOCKS, "hidden_size": 64},
        ["--hidden-size is 64", "blockwise FP8 with --sequence-parallel", "multiple of 128"],
    ),
    (
        {**BLOCKS, "hidden_size": 128},
        ["--seq-length / --tensor-model-parallel-size 2 is 16", "multiple of 128", "e.g. 128"],
    ),
    (
        {**ENDS, **GATHER, "pipeline_model_parallel_size": 2, "layers": "2+2R2+2", "world_size": 2},
        ["--fp8-param-gather with --first-last-layers-bf16"],
    ),
]


@pytest.mark.parametrize("settings, words", REFUSED)
def test_refused(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        tiny_config(**settings)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("settings", [{}, FP8, DELAYED, ENDS, GATHER, {**FP8, "recurrence": "base"}])
def test_resolving_twice_changes_nothing(settings: dict[str, Any]) -> None:
    config = tiny_config(**settings)
    assert resolve(config) == config


def test_resolving_fills_in_defaults() -> None:
    delayed = tiny_config(**DELAYED).precision
    assert (delayed.fp8_amax_history_len, delayed.fp8_amax_compute_algo) == (1024, "max")
    ends = tiny_config(**ENDS).precision
    assert (ends.num_layers_at_start_in_bf16, ends.num_layers_at_end_in_bf16) == (1, 1)
    assert tiny_config(**ENDS, num_layers_at_end_in_bf16=0).precision.num_layers_at_end_in_bf16 == 0


@pytest.mark.parametrize(
    "recurrence, layers, scope, contexts",
    [
        ("mesh", "1+2R3+1", "core", 3),
        ("mesh", "1+2R3+1", "all", 5),
        ("vanilla+mesh", "1+2+2+1", "core", 2),
        ("vanilla", "4", "core", 1),
    ],
)
def test_rows_of_the_amax_history(recurrence: str, layers: str, scope: str, contexts: int) -> None:
    """The history has one row for each FP8 context of each of the requested micro-batches."""
    settings = {**DELAYED, "fp8_scope": scope, "fp8_amax_history_len": 10}
    config = transformer_config(tiny_config(recurrence, layers, **settings), TRANSFORMER_ENGINE)
    assert config.fp8_amax_history_len == 10 * contexts


@pytest.mark.parametrize(
    "settings, always",
    [
        ({}, True),
        ({"bf16": True}, True),
        (FP8, False),
        ({**FP8, "fp8_recipe": "blockwise"}, True),
        (DELAYED, True),
        (GATHER, True),
    ],
)
def test_which_settings_cast_in_every_pass(settings: dict[str, Any], always: bool) -> None:
    """Those with ``disable_parameter_transpose_cache``. Without FP8 there is no cast to cache."""
    config = transformer_config(tiny_config(**settings), TRANSFORMER_ENGINE)
    assert config.disable_parameter_transpose_cache == always
    core = section_config(config, "core", range(2), 2)
    coda = section_config(config, "coda", range(1), 1)
    assert core.disable_parameter_transpose_cache == always
    assert coda.disable_parameter_transpose_cache and coda.fp8 is None and not coda.fp8_param
    assert (core.fp8, core.fp8_param) == (config.fp8, config.fp8_param)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bf16_layers_by_number_in_the_whole_network(ranks: int) -> None:
    """Megatron decides from each section's copy, whichever part of the section a pipeline rank holds."""
    settings = {**ENDS, "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 3}
    config = tiny_config("mesh", "4+6R2+5", ranks, pipeline_model_parallel_size=ranks, **settings)
    built = transformer_config(config, TRANSFORMER_ENGINE)
    in_bf16 = set()
    for rank in range(ranks):
        part = placement(config.model, config.parallel).part(rank)
        for name, held, total in (
            ("prelude", part.prelude, 4),
            ("core", part.core, 6),
            ("coda", part.coda, 5),
        ):
            section = section_config(built, name, held, total)
            section.num_layers = len(held)  # as Section does
            in_bf16 |= {(name, n) for n in held if is_first_last_bf16_layer(section, n)}
    assert in_bf16 == {("prelude", 0), ("prelude", 1), ("coda", 2), ("coda", 3), ("coda", 4)}


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without Transformer Engine and apex."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    implementation.why_no_transformer_engine.cache_clear()
    implementation._log_once.cache_clear()
    yield
    implementation.why_no_transformer_engine.cache_clear()


@pytest.mark.parametrize(
    "precision, words",
    [
        (
            PrecisionConfig(transformer_impl="transformer_engine"),
            ["-e '.[te]'", "--transformer-impl local"],
        ),
        (PrecisionConfig(fp8_format="e4m3"), ["--fp8-format", "-e '.[te]'"]),
        (PrecisionConfig(gradient_accumulation_fusion=True), ["apex", "-e '.[te]'", "remove the flag"]),
    ],
)
def test_the_error_names_what_is_missing(absent, precision: PrecisionConfig, words: list[str]) -> None:
    with pytest.raises(UserError) as refused:
        choose(precision, ParallelConfig())
    for word in words:
        assert word in str(refused.value)


def test_context_parallelism_needs_its_attention(absent) -> None:
    with pytest.raises(UserError, match=r"--context-parallel-size 2 .* not installed .* --sequence-parallel"):
        choose(PrecisionConfig(), ParallelConfig(context_parallel_size=2))


def test_auto_falls_back_and_logs_it_once(absent, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert [choose(PrecisionConfig(), ParallelConfig()) for _ in range(2)] == ["local", "local"]
    (line,) = [record.message for record in caplog.records if record.name == implementation.__name__]
    assert "not installed" in line and "AdamW" in line


def test_a_broken_installation_is_not_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    implementation.why_no_transformer_engine.cache_clear()
    try:
        with pytest.raises(UserError, match="there is no GPU; use --transformer-impl local"):
            choose(PrecisionConfig(transformer_impl="transformer_engine"), ParallelConfig())
        assert choose(PrecisionConfig(), ParallelConfig()) == choose(
            PrecisionConfig(transformer_impl="local"), ParallelConfig()
        )
        implementation.why_no_transformer_engine.cache_clear()
        monkeypatch.setattr(implementation.device, "has_gpu", lambda: True)
        for asked in ("auto", "transformer_engine"):
            words = (
                rf"--transformer-impl {asked}: .*libcudart.*reinstall.*uninstall.*--transformer-impl local"
            )
            with pytest.raises(UserError, match=words):
                choose(PrecisionConfig(transformer_impl=asked), ParallelConfig())
    finally:
        implementation.why_no_transformer_engine.cache_clear()


@pytest.mark.parametrize(
    ("setting", "variables", "chosen"),
    [
        ("auto", "", "auto"),
        ("fused", "", "fused"),
        ("auto", "NVTE_FLASH_ATTN=1", "auto"),
        ("auto", "NVTE_FLASH_ATTN=0 NVTE_UNFUSED_ATTN=0", "fused"),
        ("auto", "NVTE_FUSED_ATTN=0 NVTE_UNFUSED_ATTN=0", "flash"),
        ("auto", "NVTE_FLASH_ATTN=0 NVTE_FUSED_ATTN=0 NVTE_UNFUSED_ATTN=0", "local"),
        ("auto", "NVTE_FLASH_ATTN=0", "fused"),
        ("auto", "NVTE_FUSED_ATTN=0", "flash"),
        ("auto", "NVTE_UNFUSED_ATTN=0", "auto"),
        ("unfused", "NVTE_FLASH_ATTN=0", "unfused"),
    ],
)
def test_the_attention_backend_follows_from_setting_and_variables(
    monkeypatch: pytest.MonkeyPatch, setting: str, variables: str, chosen: str
) -> None:
    """It doesn't depend on the variables that an earlier model has left in the environment."""
    given = dict(variable.split("=") for variable in variables.split())
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert attention_backend(setting, te_layers=True, variables=given).name == chosen
    assert attention_backend(setting, te_layers=False, variables=given).name == setting
    assert "NVTE_FUSED_ATTN" not in os.environ


def test_a_variable_that_is_neither_0_nor_1() -> None:
    with pytest.raises(UserError, match=r"NVTE_FLASH_ATTN=no in the environment.*0 or 1"):
        attention_backend("auto", te_layers=True, variables={"NVTE_FLASH_ATTN": "no"})


def test_models_of_several_attentions_in_one_process() -> None:
    """Megatron-core would fail an assertion on the variables of the previous model."""
    for name in ("flash", "fused", "local", "auto"):
        model = build_on_meta(tiny_config(attention_backend=name))
        assert model.config.attention_backend.name == name


def test_an_attention_that_local_layers_lack() -> None:
    with pytest.raises(UserError, match="--attention-backend fused needs Transformer Engine's layers"):
        build_model(tiny_config(attention_backend="fused"))


def test_context_parallelism_needs_transformer_engines_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "why_no_transformer_engine", lambda: None)
    precision = PrecisionConfig(transformer_impl="transformer_engine", attention_backend="local")
    with pytest.raises(UserError, match="but --attention-backend is local"):
        choose(precision, ParallelConfig(context_parallel_size=2))


def test_fused_gradients_of_local_layers_beside_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(implementation, "why_no_transformer_engine", lambda: None)
    monkeypatch.setattr(implementation.device, "has_gpu", lambda: True)
    precision = PrecisionConfig(transformer_impl="local", gradient_accumulation_fusion=True)
    with pytest.raises(UserError, match=r"--transformer-impl is local, and apex's .* remove the flag"):
        choose(precision, ParallelConfig())


@pytest.mark.parametrize(
    "capability, cuda, recipe, words",
    [
        ((8, 0), "12.8", "tensorwise", "sm_80. has no FP8"),
        ((8, 9), "12.9", "blockwise", "no blockwise FP8; it needs sm_90"),
        ((9, 0), "12.8", "blockwise", "CUDA 12.8, .* needs 12.9"),
        ((9, 0), "12.8", "delayed", None),
        ((9, 0), "12.10", "blockwise", None),
    ],
)
def test_fp8_that_the_gpu_lacks(monkeypatch, capability, cuda: str, recipe: str, words: str | None) -> None:
    """Transformer Engine would only fail in the first forward."""
    monkeypatch.setattr(implementation, "why_no_transformer_engine", lambda: None)
    monkeypatch.setattr(implementation, "_log_once", lambda *said: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    precision = PrecisionConfig(fp8_format="hybrid", fp8_recipe=recipe)
    if words is None:
        assert choose(precision, ParallelConfig()) == TRANSFORMER_ENGINE
        return
    with pytest.raises(UserError, match=words):
        choose(precision, ParallelConfig())


def test_a_plan_for_another_machine_needs_no_transformer_engine(absent) -> None:
    """FP8 settings can be resolved, and the model counted, on a machine that can't build it."""
    config = tiny_config(**FP8)
    plain = {name: p.shape for name, p in build_on_meta(tiny_config(bf16=True)).named_parameters()}
    assert {name: p.shape for name, p in build_on_meta(config).named_parameters()} == plain
    with pytest.raises(UserError, match="--fp8-format needs Transformer Engine"):
        build_model(config)


def test_apex_norms_are_used_if_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the classes are checked, because their kernels need the GPU."""
    torchs = [type(m) for m in build_on_meta(tiny_config()).modules() if "Norm" in type(m).__name__]
    monkeypatch.setattr(fused_layer_norm, "HAVE_FUSED_LAYER_NORM", True)
    assert set(torchs) == {LayerNorm} and not has_fused_norms()
    monkeypatch.setattr(implementation, "has_fused_norms", lambda: True)
    monkeypatch.setattr(layers, "has_fused_norms", lambda: True)
    apexs = [m for m in build_on_meta(tiny_config(bf16=True)).modules() if "Norm" in type(m).__name__]
    assert [type(norm) for norm in apexs] == [ApexLayerNorm] * len(torchs)
    assert {p.dtype for norm in apexs for p in norm.parameters()} == {torch.bfloat16}
