"""Compare the stand-in with Transformer Engine's sources. They are parsed, not imported, which needs no GPU.

The stand-in's modules ignore arguments that they don't know. So we also compare the arguments that
Megatron-core's wrappers pass with the sources.
"""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from megatron.core.extensions import transformer_engine as wrappers

from megatron_mesh.checkpoint import fp8_state

STAND_IN = Path(__file__).resolve().parents[2] / "te_stand_in" / "transformer_engine"
ATTENTION = "pytorch/attention/dot_product_attention/dot_product_attention.py"
SOURCES = {
    "Linear": ("pytorch/linear.py", "pytorch/module/linear.py"),
    "LayerNormLinear": ("pytorch/linear.py", "pytorch/module/layernorm_linear.py"),
    "LayerNorm": ("pytorch/norm.py", "pytorch/module/layernorm.py"),
    "DotProductAttention": ("pytorch/attention.py", ATTENTION),
    "fp8_autocast": ("pytorch/fp8.py", "pytorch/quantization.py"),
    "fp8_model_init": ("pytorch/fp8.py", "pytorch/quantization.py"),
    "FP8GlobalStateManager.is_fp8_enabled": ("pytorch/fp8.py", "pytorch/quantization.py"),
    "checkpoint": ("pytorch/distributed.py", "pytorch/distributed.py"),
}
"""Name -> (file in the stand-in, file in Transformer Engine 2.11)."""
RECIPES = ("Float8CurrentScaling", "Float8BlockScaling", "DelayedScaling")
WRAPPERS = {
    "TELinear": "Linear",
    "TELayerNormColumnParallelLinear": "LayerNormLinear",
    "TEDotProductAttention": "DotProductAttention",
}


@pytest.fixture(scope="module")
def real() -> Path:
    """The folder of the installed package."""
    found = importlib.util.find_spec("transformer_engine")
    if found is None or found.origin is None:
        pytest.skip("Transformer Engine is not installed")
    return Path(found.origin).parent


@cache
def definitions(file: Path) -> dict[str, Any]:
    """Find functions, classes and methods by their qualified names."""
    found: dict[str, Any] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{m.name}": m for m in node.body if isinstance(m, ast.FunctionDef)}
    return found


def parameters(file: Path, name: str) -> dict[str, Any]:
    """Find a function's named parameters, with the source of each default or Ellipsis if there is none."""
    arguments = definitions(file)[name].args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {each.arg: ast.unparse(default) if default else ... for each, default in pairs}


@pytest.mark.parametrize("name", SOURCES)
def test_transformer_engine_accepts_what_the_stand_in_accepts(real: Path, name: str) -> None:
    """Names and defaults must agree, except for positional inputs of ``forward``."""
    ours, theirs = STAND_IN / SOURCES[name][0], real / SOURCES[name][1]
    is_class = isinstance(definitions(ours)[name], ast.ClassDef)
    for method in (f"{name}.__init__", f"{name}.forward") if is_class else (name,):
        if method not in definitions(ours):
            continue
        taken, there = parameters(ours, method), parameters(theirs, method)
        for parameter, default in taken.items():
            if default is ... and method.endswith("forward"):
                continue
            assert parameter in there, (method, parameter)
            assert default in (..., there[parameter]), (method, parameter, there[parameter])


@pytest.mark.parametrize("name", WRAPPERS)
def test_transformer_engine_accepts_what_megatrons_wrappers_pass(real: Path, name: str) -> None:
    wrapper = definitions(Path(wrappers.__file__))[f"{name}.__init__"]
    calls = [node for node in ast.walk(wrapper) if isinstance(node, ast.Call)]
    (call,) = (node for node in calls if ast.unparse(node.func) == "super().__init__")
    given = {keyword.arg for keyword in call.keywords if keyword.arg}
    assert given and given <= set(parameters(real / SOURCES[WRAPPERS[name]][1], f"{WRAPPERS[name]}.__init__"))


def test_recipes_have_the_settings_of_the_stand_in(real: Path) -> None:
    there = definitions(real / "common/recipe/__init__.py")
    ours = definitions(STAND_IN / "common/recipe.py")
    for name in RECIPES:
        fields = {n.target.id for n in there[name].body if isinstance(n, ast.AnnAssign)}
        settings = {n.target.id for n in ours[name].body if isinstance(n, ast.AnnAssign)}
        if f"{name}.__init__" in ours:
            settings = set(parameters(STAND_IN / "common/recipe.py", f"{name}.__init__")) - {"self"}
        assert settings and settings <= fields, name


def test_the_extra_state_has_the_entries_that_checkpoints_store(real: Path) -> None:
    base = definitions(real / "pytorch/module/base.py")
    for method in ("get_extra_state", "set_extra_state"):
        text = ast.unparse(base[f"TransformerEngineBaseModule.{method}"])
        for key in ("recipe", "extra_fp8_variables", *fp8_state._TENSORS):
            assert f"state['{key}']" in text, (method, key)
    text = (real / "pytorch/module/base.py").read_text(encoding="utf-8")
    assert 'self.fp8_meta["num_gemms"]' in text and 'self.fp8_meta["fp8_checkpoint"]' in text
