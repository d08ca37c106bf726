"""Draw the schedule: when each rank computes which pass of which micro-batch."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from megatron_mesh.errors import UserError
from megatron_mesh.planner.plan import Plan
from megatron_mesh.planner.schedule import Span, Timeline

_MOST_RANKS = 16
_MOST_SPANS = 40  # per rank in each part of a long step; more would be unreadable
_ENDS = {"prelude": "#4e79a7", "coda": "#3f8f5f"}
_PALE = 0.42  # opacity of backwards
_CELL = 0.82  # height of a cell; the rest is the gap between ranks
_DIGIT = 0.0055  # width of a digit as a share of the figure's width

Window = tuple[float, float]


def save_schedule(plan: Plan, path: Path) -> None:
    """Write ``schedule_figure`` to a file; raises UserError if that fails."""
    try:
        schedule_figure(plan).savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--figure {path} cannot be written ({error}); choose another path that ends in .png"
        ) from None


def schedule_figure(plan: Plan) -> Figure:
    """Draw ranks from top to bottom and time from left to right, coloured by pass; backwards are pale.

    A long step is cut to its beginning and its end, and a long pipeline to its first ranks.
    """
    times = _in_percent(plan.timeline)
    ranks = min(len(times.spans), _MOST_RANKS)
    windows = _windows(times)
    figure = Figure(figsize=(15, 2.1 + 0.42 * ranks), layout="constrained")
    axes = figure.subplots(1, len(windows), sharey=True, squeeze=False)[0]
    colours = _colours([chunk.name for chunk in plan.pipeline.chunks[0]])
    for axis, window in zip(axes, windows, strict=True):
        digit = _DIGIT * len(windows) * (window[1] - window[0])
        _draw(axis, list(_visible(times, window, ranks)), list(colours.values()), digit)
        axis.set_xlim(window)
    _label(axes, ranks)
    figure.suptitle(_title(plan), fontsize=12)
    figure.legend(handles=_legend(colours), loc="outside lower center", ncols=len(colours) + 2, frameon=False)
    return figure


def _in_percent(times: Timeline) -> Timeline:
    scale = 100 / times.step_time
    return Timeline(
        tuple(tuple(Span(s.step, s.start * scale, s.end * scale) for s in spans) for spans in times.spans)
    )


def _windows(times: Timeline) -> list[Window]:
    """Return the time windows to draw: the whole step, or its beginning and its end."""
    last = times.spans[-1]
    if len(last) <= 2.2 * _MOST_SPANS:
        return [(0.0, 100.0)]
    width = last[_MOST_SPANS].end
    return [(0.0, width), (100.0 - width, 100.0)]


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Blue for the prelude, green for the coda, shades from orange to red for everything between."""
    middle = [name for name in names if name not in _ENDS]
    scale = colormaps["YlOrRd"]
    shades = {name: to_hex(scale(0.45 + 0.4 * i / max(1, len(middle) - 1))) for i, name in enumerate(middle)}
    return {name: _ENDS.get(name) or shades[name] for name in names}


def _visible(times: Timeline, window: Window, ranks: int) -> Iterator[tuple[int, Span]]:
    for rank, spans in enumerate(times.spans[:ranks]):
        yield from ((rank, span) for span in spans if span.end > window[0] and span.start < window[1])


def _draw(axes: Axes, spans: Sequence[tuple[int, Span]], colours: Sequence[str], digit: float) -> None:
    for backward in (False, True):
        chosen = [(rank, span) for rank, span in spans if span.step.backward is backward]
        cells = PolyCollection(
            [_rectangle(rank, span) for rank, span in chosen],
            facecolors=[colours[span.step.chunk] for _, span in chosen],
            edgecolors="white",
            linewidths=0.6,
            alpha=_PALE if backward else 1.0,
        )
        axes.add_collection(cells)
    for rank, span in spans:
        number = str(span.step.micro_batch + 1)
        if span.end - span.start > digit * (len(number) + 0.4):
            _write(axes, rank, span, number)


def _rectangle(rank: int, span: Span) -> list[tuple[float, float]]:
    low, high = rank - _CELL / 2, rank + _CELL / 2
    return [(span.start, low), (span.end, low), (span.end, high), (span.start, high)]


def _write(axes: Axes, rank: int, span: Span, number: str) -> None:
    axes.text(
        (span.start + span.end) / 2,
        rank,
        number,
        ha="center",
        va="center_baseline",
        fontsize=7,
        color="#202020" if span.step.backward else "white",
        clip_on=True,
    )


def _label(axes: Sequence[Axes], ranks: int) -> None:
    axes[0].set_ylim(ranks - 0.45, -0.55)
    axes[0].set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    names = ["time"] if len(axes) == 1 else ["time (beginning of a step)", "time (end of the step)"]
    for axis, name in zip(axes, names, strict=True):
        axis.xaxis.set_major_formatter(PercentFormatter(100))
        axis.set_xlabel(name)
        axis.tick_params(left=False)
        axis.set_facecolor("#f1f1f1")
        axis.spines[:].set_visible(False)


def _title(plan: Plan) -> str:
    model, stages = plan.config.model, plan.pipeline
    text = (
        f"{model.recurrence} {model.layers} on {stages.ranks} pipeline ranks, {stages.micro_batches} "
        f"micro-batches: ranks wait {plan.timeline.bubble_share:.1%} of the time"
    )
    hidden = stages.ranks - _MOST_RANKS
    return f"{text} ({hidden} more ranks not shown)" if hidden > 0 else text


def _legend(colours: Mapping[str, str]) -> list[Patch]:
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    grey = "#606060"
    return [
        *patches,
        Patch(color=grey, label="forward"),
        Patch(color=grey, alpha=_PALE, label="backward (pale)"),
    ]
