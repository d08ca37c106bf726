"""Draw a run's metrics.jsonl: the loss curves, and the routers' mean write and read weights."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_mesh.errors import UserError
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import LOSS_FIGURE, METRICS_FILE, ROUTERS_FIGURE

Row = dict[str, Any]
"""A line of metrics.jsonl: ``kind``, ``step`` and the values of this kind."""


def read_metrics(run: Path) -> dict[str, list[Row]]:
    """Read the rows of each kind from ``run/metrics.jsonl``, ordered by step.

    An interrupted run repeats the steps after its last checkpoint, so the last row of a step counts.

    Raises:
        UserError: there is no such file, or one of its lines is not a row of metrics.
    """
    path = run / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the directory of a run that has a {METRICS_FILE}")
    rows: dict[str, dict[int, Row]] = {}
    text = path.read_text(encoding="utf-8", errors="replace")
    # The run is still writing what follows the last line break, or was killed while writing it.
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
            rows.setdefault(row["kind"], {})[row["step"]] = row
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number} is not a row of a run's metrics; the file may be damaged"
            ) from None
    return {kind: [steps[step] for step in sorted(steps)] for kind, steps in rows.items()}


def loss_figure(rows: dict[str, list[Row]]) -> Figure:
    """Plot training and validation loss, in nats per token, over steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="Loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    for kind, name, style in (("train", "training", "-"), ("valid", "validation", "o--")):
        if found := rows.get(kind):
            steps, losses = [row["step"] for row in found], [strict_json.number(row["loss"]) for row in found]
            last = f"{losses[-1]:.3f}"
            if kind == "valid":
                last += f" (perplexity {strict_json.number(found[-1]['perplexity']):.1f})"
            axes.plot(steps, losses, style, label=f"{name}: {last} at the end")
    _draw_sets(axes, rows.get("valid", []))
    axes.legend()
    return figure


def _draw_sets(axes: Any, rows: list[Row]) -> None:
    """Add a thin line for each validation set, over the steps at which it was measured."""
    for name in dict.fromkeys(name for row in rows for name in row.get("sets", {})):
        found = [row for row in rows if name in row.get("sets", {})]
        losses = [strict_json.number(row["sets"][name]) for row in found]
        axes.plot(
            [row["step"] for row in found], losses, ".:", linewidth=1, label=f"  {name}: {losses[-1]:.3f}"
        )


def router_figure(row: Row) -> Figure:
    """Draw the mean write and read weights of one step as two heat maps, cycles x slots.

    Args:
        row: a ``train`` row of a run with routers. ``row["router"]["write"]`` and ``["read"]`` are
            [K + 1 cycles][N slots], and the weights of a cycle add up to 1.
    """
    cycles, slots = len(row["router"]["write"]), len(row["router"]["write"][0])
    figure = Figure(figsize=(3 + 1.4 * slots, 1.8 + 0.7 * cycles), layout="constrained")
    figure.suptitle(f"Routers at step {row['step']:,}: mean weight per cycle and slot")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("write", "read"), strict=True):
        image = _heat_map(axes, row["router"][kind])
        axes.set(title=kind, xlabel="memory slot (0 starts as the embedding)")
    figure.axes[0].set_yticks(range(cycles), ["transition", *(f"loop {t + 1}" for t in range(cycles - 1))])
    figure.colorbar(image, ax=figure.axes, shrink=0.8)
    return figure


def _heat_map(axes: Axes, weights: list[list[float]]) -> Any:
    image = axes.imshow(weights, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(weights[0])))
    for cycle, row in enumerate(weights):
        for slot, weight in enumerate(row):
            colour = "white" if weight > 0.5 else "black"
            axes.text(slot, cycle, f"{weight:.2f}", ha="center", va="center", color=colour)
    return image


def draw_run(run: Path, output: Path) -> list[Path]:
    """Write ``loss.png`` and, for a run with routers, ``routers.png`` (its last logged step) to ``output``.

    Raises:
        UserError: the metrics cannot be read (see ``read_metrics``) or have no step yet, or a file cannot be
            written.
    """
    rows = read_metrics(run)
    if not rows.get("train"):
        raise UserError(f"{run / METRICS_FILE} has no training step yet; wait for the first logged step")
    figures = {LOSS_FIGURE: loss_figure(rows)}
    if "router" in rows["train"][-1]:
        figures[ROUTERS_FIGURE] = router_figure(rows["train"][-1])
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(output / name, dpi=150)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror}); choose another directory") from None
    return [output / name for name in figures]
