"""The figures show what metrics.jsonl contains."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_mesh.errors import UserError
from megatron_mesh.metrics.figures import draw_run, loss_figure, read_metrics, router_figure

ROOT = Path(__file__).resolve().parents[3]
WRITE = [[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]
READ = [[0.25, 0.5, 0.25], [0.0, 0.05, 0.95]]


def train_row(step: int, loss: float, **more) -> dict:
    return {"kind": "train", "step": step, "loss": loss, **more}


def write_run(directory: Path, rows: list[dict], tail: str = "") -> Path:
    directory.mkdir(exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")
    return directory


@pytest.fixture
def run(tmp_path: Path) -> Path:
    router = {"write": WRITE, "read": READ, "write_entropy": [0.8, 0.9], "read_entropy": [1.0, 0.2]}
    rows = [
        train_row(1, 8.3),
        train_row(10, 6.0, router=router),
        {"kind": "valid", "step": 10, "loss": 6.5, "perplexity": 665.1},
    ]
    return write_run(tmp_path / "run", rows)


def test_a_repeated_step_counts_once_and_in_order(tmp_path: Path) -> None:
    rows = [train_row(10, 6.0), train_row(20, 5.0), train_row(30, 4.0), train_row(20, 5.5)]
    run = write_run(tmp_path, rows)
    assert [(row["step"], row["loss"]) for row in read_metrics(run)["train"]] == [
        (10, 6.0),
        (20, 5.5),
        (30, 4.0),
    ]


def test_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, [train_row(10, 6.0)], tail='{"kind": "train", "st')
    assert [row["step"] for row in read_metrics(run)["train"]] == [10]


@pytest.mark.parametrize("line", ["{broken", "[1, 2]", '{"kind": "train"}', "7"])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    run = write_run(tmp_path, [train_row(10, 6.0)], tail=f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(run)


def test_the_loss_figure_holds_both_curves(run: Path) -> None:
    (axes,) = loss_figure(read_metrics(run)).axes
    train, valid = axes.lines
    assert train.get_xydata().tolist() == [[1, 8.3], [10, 6.0]]
    assert valid.get_xydata().tolist() == [[10, 6.5]]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert "6.000" in labels[0]
    assert "6.500" in labels[1] and "665.1" in labels[1]


def test_the_router_figure_shows_every_weight(run: Path) -> None:
    figure = router_figure(read_metrics(run)["train"][-1])
    for axes, title, weights in zip(figure.axes[:2], ("write", "read"), (WRITE, READ), strict=True):
        assert axes.get_title() == title
        np.testing.assert_array_equal(axes.images[0].get_array(), weights)
        shown = {text.get_position(): float(text.get_text()) for text in axes.texts}
        assert shown == {(s, c): w for c, row in enumerate(weights) for s, w in enumerate(row)}
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["transition", "loop 1"]


def test_draw_run_writes_figures_with_something_on_them(run: Path, tmp_path: Path) -> None:
    paths = draw_run(run, tmp_path / "new/figures")
    assert [path.name for path in paths] == ["loss.png", "routers.png"]
    for path in paths:
        pixels = imread(path)
        assert min(pixels.shape[:2]) >= 300
        assert len(np.unique(pixels[..., :3] @ [1.0, 300.0, 90000.0])) > 20  # colours


def test_a_run_without_routers_has_a_loss_figure(tmp_path: Path) -> None:
    assert [path.name for path in draw_run(write_run(tmp_path, [train_row(1, 8.3)]), tmp_path)] == [
        "loss.png"
    ]


def test_a_run_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training step yet"):
        draw_run(write_run(tmp_path / "run", []), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_an_output_that_cannot_be_written_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written"):
        draw_run(run, tmp_path / "file")


def test_the_tool_names_a_missing_run(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/plot_run.py", "--run", str(tmp_path / "none")],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "none/metrics.jsonl does not exist" in done.stderr
    assert "Traceback" not in done.stderr
