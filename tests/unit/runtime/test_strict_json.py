"""Strict JSON in every file that we write (case 7 of everyday faults)."""

import io
import json
import math
import re
from pathlib import Path

import pytest

import megatron_mesh
from megatron_mesh.metrics.console import Record
from megatron_mesh.metrics.figures import loss_figure
from megatron_mesh.metrics.log import JsonLines
from megatron_mesh.runtime import strict_json

ROOT = Path(megatron_mesh.__file__).parents[1]


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    values = {"loss": math.nan, "grad_norm": math.inf, "lr": 0.5, "router": {"read": [[0.25, -math.inf]]}}
    sink.write(Record("skipped", 3, values))
    sink.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    router = {"read": [[0.25, None]]}
    assert row == {"kind": "skipped", "step": 3, "loss": None, "grad_norm": None, "lr": 0.5, "router": router}


@pytest.mark.parametrize("value", [{"a": (1, 2.5, None, True)}, "é", [{}], {"nested": [{"b": "NaN"}]}])
def test_the_rest_is_as_json_has_it(value: object) -> None:
    file = io.StringIO()
    strict_json.dump(value, file, indent=1)
    assert file.getvalue() == json.dumps(value, indent=1)
    assert strict_json.dumps(value, sort_keys=True) == json.dumps(value, sort_keys=True)


def test_figures_draw_a_validation_without_a_number() -> None:
    rows = [{"step": 1, "loss": 2.0, "perplexity": 7.4}, {"step": 2, "loss": None, "perplexity": None}]
    (axes,) = loss_figure({"train": rows[:1], "valid": rows}).axes
    assert math.isnan(axes.lines[1].get_ydata()[1]) and "nan at the end" not in axes.lines[0].get_label()


def test_nothing_else_writes_json() -> None:
    """Every writer goes through the one helper."""
    pattern = re.compile(r"(?<![_\w])json\.dumps?\b|from json import")
    places = [*(ROOT / "megatron_mesh").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    places += [*(ROOT / "examples").rglob("*.py"), ROOT / "pretrain_mesh.py"]
    users = {path.relative_to(ROOT).as_posix() for path in places if pattern.search(path.read_text())}
    assert users == {"megatron_mesh/runtime/strict_json.py"}
