"""Published results to compare with: the paper's (paper.json) and Pythia's (pythia.json).

Formats results as tables, and writes results.md, which compares them with published numbers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_mesh.evaluation.results import HUB, Result, Results
from megatron_mesh.evaluation.tasks import AVERAGED, SHOTS, TASKS
from megatron_mesh.metrics.tables import TextTable
from megatron_mesh.runtime.run_files import replace_text


@dataclass(frozen=True)
class PaperRow:
    """A model in the paper's table: perplexities, and average accuracies in percent."""

    size: str
    layers: str
    recurrence: str
    pile: float
    wikitext: float
    lambada_openai: float
    lambada_standard: float
    average_0: float
    average_5: float


def paper() -> tuple[str, list[PaperRow]]:
    """Return the citation, and the rows in the paper's order."""
    content = _read("paper.json")
    rows = [PaperRow(**dict(zip(content["columns"], row, strict=True))) for row in content["rows"]]
    return content["source"], rows


def pythia() -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the citation, and the metrics of each task by model and number of shots ("0" or "5")."""
    content = _read("pythia.json")
    return content["source"], content["models"]


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


REPORT_FILE = "results.md"

_THIS = "this model"
_METRICS_NOTE = (
    "In percent. acc compares the log-likelihoods of the choices, acc_norm divides them by the number of "
    "characters, acc_bytes by the number of UTF-8 bytes. * is the paper's metric, ± its standard error."
)


def write_markdown(results: Results) -> Path:
    """Write ``results.md`` next to ``results.json`` and return its path."""
    run = results.run
    lines = [
        f"# Evaluation of {run['path']}",
        "",
        f"lm-eval {run['lm_eval']}, precision {run['dtype']}, model sha256 {run['model'][:12]}.",
        "",
    ]
    if run["max_length"]:
        lines += [f"Sequence length {run['max_length']}, which may differ from that of training.", ""]
    if run["limit"]:
        lines += [
            f"**These numbers are not comparable: only the first {run['limit']} documents of each task were "
            "used.**",
            "",
        ]
    measured = [shots for shots in SHOTS if any(r.shots == shots for r in results.finished.values())]
    tables = [*result_tables(results), paper_table(results), *(pythia_table(results, n) for n in measured)]
    lines += [table.markdown() for table in tables]
    path = results.path.with_name(REPORT_FILE)
    replace_text(path, "\n".join(lines))
    return path


def result_tables(results: Results) -> list[TextTable]:
    """Return the tables of all results, and of the tasks that were not run. Empty tables are omitted."""
    tables = [_tasks(results), _averages(results), _perplexities(results), _not_run(results)]
    return [table for table in tables if table.rows]


def paper_table(results: Results) -> TextTable:
    """Compare this model with the paper's."""
    source, rows = paper()
    averages = results.averages()
    texts = [r for r in results.finished.values() if r.shots is None]
    ours = [
        _number(texts[-1].metrics, "token_perplexity") if texts else "",
        *(_of(results, task, 0, metric) for task, metric in _PERPLEXITIES.items()),
        *(
            f"{100 * averages[n].value:.2f}" if n in averages and not averages[n].missing else ""
            for n in SHOTS
        ),
    ]
    notes = [f"Source: {source}."]
    if texts:
        notes.append(f'The Pile column of {_THIS} is its perplexity per token on "{texts[-1].name}".')
    if any(average.missing for average in averages.values()):
        notes.append("Averages over fewer than the nine tasks are not shown, since the paper has none.")
    header = ["model", "Pile", "WikiText", "LAMBADA OpenAI", "LAMBADA standard", "0-shot", "5-shot"]
    cells = [
        [
            f"{row.size} {row.layers} {row.recurrence}",
            *(f"{value:.2f}" for value in (row.pile, row.wikitext, row.lambada_openai, row.lambada_standard)),
            *(f"{value:.2f}" for value in (row.average_0, row.average_5)),
        ]
        for row in rows
    ]
    title = "Compared with the paper: perplexities, and average accuracies over nine tasks"
    return TextTable(title, header, [[_THIS, *ours], *cells], notes=notes)


def pythia_table(results: Results, shots: int) -> TextTable:
    """Compare this model with the Pythia suite, for one number of shots."""
    source, models = pythia()
    first = next(iter(models.values()))[str(shots)]
    columns = [(task, metric) for task, metrics in first.items() for metric in metrics]
    ours = [_THIS, *(_of(results, task, shots, metric) for task, metric in columns)]
    cells = [
        [name, *(_cell(metric, published[str(shots)][task][metric]) for task, metric in columns)]
        for name, published in models.items()
    ]
    header = ["model", *(f"{TASKS[task].label} {metric}" for task, metric in columns)]
    return TextTable(
        f"Compared with Pythia, {shots}-shot", header, [ours, *cells], notes=[f"Source: {source}."]
    )


_PERPLEXITIES = {
    "wikitext": "word_perplexity",
    "lambada_openai": "perplexity",
    "lambada_standard": "perplexity",
}


def _tasks(results: Results) -> TextTable:
    rows = []
    for result in _in_order(results):
        metric = TASKS[result.name].metric
        accuracies = [
            _number(result.metrics, name) + "*" * (name == metric)
            for name in ("acc", "acc_norm", "acc_bytes")
        ]
        rows.append(
            [
                TASKS[result.name].label,
                str(result.shots),
                f"{result.documents:,}",
                *accuracies,
                _number(result.stderr, metric),
            ]
        )
    notes = [_METRICS_NOTE]
    local = dict.fromkeys(TASKS[r.name].label for r in _in_order(results) if r.data != HUB)
    if local:
        notes.append(f"From local files, which may differ from the official data: {', '.join(local)}.")
    header = ["task", "shots", "documents", "acc", "acc_norm", "acc_bytes", "±"]
    return TextTable("Tasks", header, rows, notes=notes)


def _averages(results: Results) -> TextTable:
    rows = []
    for shots, average in results.averages().items():
        count = len(AVERAGED) - len(average.missing)
        name = f"average of the {count}"
        if average.missing:
            name = f"mean of {count} of the {len(AVERAGED)}, without {', '.join(average.missing)}"
        rows.append([str(shots), name, f"{100 * average.value:.2f}"])
    return TextTable("Averages of the paper's metric", ["shots", "tasks", "percent"], rows, 2)


def _perplexities(results: Results) -> TextTable:
    names = ("token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "perplexity")
    rows = []
    for result in results.finished.values():
        if result.shots is None or (result.shots == 0 and result.name in _PERPLEXITIES):
            label = result.name if result.shots is None else TASKS[result.name].label
            rows.append([label, *(_number(result.metrics, name) for name in names)])
    header = ["text", "per token", "per word", "per byte", "bits per byte", "last word"]
    return TextTable("Perplexity", header, rows)


def _not_run(results: Results) -> TextTable:
    by_reason: dict[tuple[int | None, str], list[str]] = {}
    for skipped in results.skipped:
        by_reason.setdefault((skipped.shots, skipped.reason), []).append(skipped.name)
    rows = [[str(shots), ", ".join(names), reason] for (shots, reason), names in by_reason.items()]
    return TextTable("Not run", ["shots", "tasks", "why"], rows, 3)


def _in_order(results: Results) -> list[Result]:
    order = list(TASKS)
    accuracies = [r for r in results.finished.values() if r.shots is not None and r.name in AVERAGED]
    return sorted(accuracies, key=lambda r: (r.shots or 0, order.index(r.name)))


def _of(results: Results, task: str, shots: int, metric: str) -> str:
    result = results.finished.get(f"{task}, {shots}-shot")
    return _number(result.metrics, metric) if result else ""


def _number(metrics: Mapping[str, float], name: str) -> str:
    return _cell(name, metrics[name]) if name in metrics else ""


def _cell(metric: str, value: float) -> str:
    if metric.startswith("acc"):
        return f"{100 * value:.2f}"
    if metric == "bits_per_byte":
        return f"{value:.4f}"
    return f"{value:,.2f}" if value < 1e5 else f"{value:.2e}"
