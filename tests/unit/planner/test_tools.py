"""Run inspect_config.py and compare_pipelines.py: plans, suggestions, figures, tables and errors."""

from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_mesh.errors import UserError
from tests.commands import tool

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ["--config", str(ROOT / "examples" / "configs" / "pythia-6.9b-5+11R2+5.yaml")]
RING = ["--tensor-model-parallel-size", "2", "--sequence-parallel", "--pipeline-model-parallel-size", "4"]
SHARDED = "--use-distributed-optimizer"


inspect_config = tool("inspect_config")
compare_pipelines = tool("compare_pipelines")


def test_plan_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figure = tmp_path / "schedule.png"
    inspect_config([*CONFIG, *RING, SHARDED, "--nodes", "4", "--figure", str(figure), "--disk-gb-per-s", "9"])
    text = capsys.readouterr().out
    assert "checkpoint      60.51 GiB" in text  # 14 bytes for each of 4,641,189,918 parameters
    assert "7.2 s at 9 GB/s for the file system" in text
    assert "32: tensor 2 x pipeline 4 x data 4" in text
    assert "128 per step and replica, of size 1" in text
    assert "606,656,542" in text  # rank 0: an eighth of the model, and the routers
    height, width, _ = imread(figure).shape
    assert width > 1000 and height > 200
    assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize("gibibytes,layouts", [(76, 10), (4.5, 1)])
def test_suggestions_fit_and_are_sorted(
    gibibytes: float, layouts: int, capsys: pytest.CaptureFixture
) -> None:
    inspect_config([*CONFIG, "--nodes", "4", "--suggest", "--gpu-memory-gib", str(gibibytes)])
    table = capsys.readouterr().out.split("\n\n")[1].splitlines()[1:]
    assert len(table) >= layouts
    seconds = [float(line.split(" s ")[0].split()[-1]) for line in table]
    memory = [float(line.split()[-2]) for line in table]
    assert seconds == sorted(seconds)
    assert max(memory) <= gibibytes


def test_the_first_suggestion_is_a_plan(capsys: pytest.CaptureFixture) -> None:
    """Planning a run with the suggested flags gives the suggested memory."""
    inspect_config([*CONFIG, "--suggest", "--gpu-memory-gib", "20"])
    parts = capsys.readouterr().out.split("\n\n")
    flags = parts[2].splitlines()[0].removeprefix("1: ").split()
    memory = parts[1].splitlines()[1].split()[-2]
    inspect_config([*CONFIG, *flags])
    plan = capsys.readouterr().out
    assert flags and f"{memory} GiB" in plan


def test_comparison(capsys: pytest.CaptureFixture) -> None:
    compare_pipelines([*CONFIG, *RING, SHARDED, "--gpus", "8", "32"])
    lines = capsys.readouterr().out.splitlines()
    rows = [dict(zip(_cells(lines[0]), _cells(line), strict=True)) for line in lines[2:]]
    assert [row["GPUs"] for row in rows] == ["8"] * 3 + ["32"] * 3
    for ring, stage, copies in (rows[:3], rows[3:]):
        parameters, waiting, sent = (
            [float(row[name].strip("%").replace(",", "")) for row in (ring, stage, copies)]
            for name in ("parameters, M", "waiting", "P2P, GiB")
        )
        assert parameters[0] < parameters[2] < parameters[1]
        assert waiting[1] > 5 * waiting[0]
        assert sent[0] == sent[2] == 4 * sent[1]  # the loop on one stage sends once, not in each of 4 passes
        assert float(copies["copies, GiB"]) > 0 == float(ring["copies, GiB"])


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--nodes", "0"], "--nodes 0 must be above 0"),
        (["--disk-gb-per-s", "0"], "--disk-gb-per-s 0.0 must be above 0"),
        (["--nodes", "3", "--pipeline-model-parallel-size", "5"], "does not divide the number of processes"),
        (
            ["--suggest", "--gpu-memory-gib", "1"],
            "no rank layout on 8 GPUs fits into 1.0 GiB per GPU",
        ),
        (["--suggest", "--global-batch-size", "3", "--gpus-per-node", "7"], "--global-batch-size 3"),
        (["--figure", "/nowhere/schedule.png"], "cannot be written"),
        (["--modes", "4"], "unknown setting --modes"),
    ],
)
def test_mistakes(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        inspect_config([*CONFIG, *arguments])


def test_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="has no ring to compare; use a looped model"):
        compare_pipelines(CONFIG)
    with pytest.raises(UserError, match="does not divide the 32 unrolled layers"):
        compare_pipelines([*CONFIG, "--pipeline-model-parallel-size", "5", "--gpus", "40"])
