"""Averages, tables, and published results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mesh.evaluation.report import (
    paper,
    paper_table,
    pythia,
    pythia_table,
    result_tables,
    write_markdown,
)
from megatron_mesh.evaluation.results import Result, Results, Skipped
from megatron_mesh.evaluation.tasks import AVERAGED, TASKS
from megatron_mesh.metrics.tables import TextTable


def of(name: str, shots: int | None, **metrics: float) -> Result:
    return Result(name, shots, "hub", metrics, {"acc_bytes": 0.01}, 100, 1.0)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Nine 0-shot tasks with the paper's metric at 0.1, 0.2, ... 0.9, two 5-shot tasks, and perplexities."""
    run = {
        "path": "here",
        "model": "f" * 64,
        "dtype": "auto",
        "limit": None,
        "max_length": None,
        "lm_eval": "0.4.13",
    }
    found = Results(tmp_path / "results.json", run)
    for number, name in enumerate(AVERAGED, start=1):
        other = {"acc": 0.99, "acc_norm": 0.98, "perplexity": 12.5}
        found.add(of(name, 0, **{**other, TASKS[name].metric: number / 10}))
    for name in ("piqa", "winogrande"):
        found.add(of(name, 5, **{"acc": 0.25, "acc_norm": 0.5, TASKS[name].metric: 0.25}))
    found.add(of("wikitext", 0, word_perplexity=30.5, byte_perplexity=1.9, bits_per_byte=0.93))
    found.add(of("text valid.jsonl", None, token_perplexity=11.25, word_perplexity=40, byte_perplexity=2))
    found.skipped = [Skipped("sciq", 5, "no | file")]
    return found


def test_averages_use_the_papers_metric(results: Results) -> None:
    averages = results.averages()
    assert averages[0].value == pytest.approx(0.5) and averages[0].missing == []
    assert averages[5].value == pytest.approx(0.25)
    assert averages[5].missing == [name for name in AVERAGED if name not in ("piqa", "winogrande")]


def test_a_partial_mean_is_never_called_the_average(results: Results) -> None:
    tables = {table.title: table for table in result_tables(results)}
    zero, five = tables["Averages of the paper's metric"].rows
    assert list(zero) == ["0", "average of the 9", "50.00"]
    assert five[1].startswith("mean of 2 of the 9, without hellaswag, arc_easy")
    row = paper_table(results).rows[0]
    assert list(row) == ["this model", "11.25", "30.50", "12.50", "12.50", "50.00", ""]


def test_all_three_accuracies_are_named(results: Results) -> None:
    table = result_tables(results)[0]
    assert list(table.header[3:6]) == ["acc", "acc_norm", "acc_bytes"]
    assert list(table.rows[0]) == ["PIQA", "0", "100", "99.00", "98.00", "10.00*", "1.00"]
    winogrande = next(row for row in table.rows if row[0] == "WinoGrande")
    assert list(winogrande[3:]) == ["80.00*", "98.00", "", ""]
    assert len(table.notes) == 1
    results.add(replace(of("piqa", 0, acc_bytes=0.1), data="0" * 64))
    assert result_tables(results)[0].notes[1].endswith("official data: PIQA.")


def test_what_was_not_run_is_grouped(results: Results) -> None:
    results.skipped = [Skipped("sciq", 5, "x"), Skipped("piqa", 5, "x"), Skipped("sciq", 0, "x")]
    assert result_tables(results)[-1].rows == [["5", "sciq, piqa", "x"], ["0", "sciq", "x"]]


def test_pythia_table(results: Results) -> None:
    table = pythia_table(results, 5)
    columns = dict(zip(table.header, zip(*table.rows, strict=True), strict=True))
    assert columns["model"][:2] == ("this model", "pythia-70m") and len(table.rows) == 8
    assert columns["PIQA acc_norm"][:2] == ("50.00", "56.91")
    assert columns["SciQ acc"][:2] == ("", "57.70")


def test_the_files(results: Results) -> None:
    path = write_markdown(results)
    text = path.read_text()
    for part in (
        "# Evaluation of here",
        "1.4B 4+8R2+4 mesh",
        "50.56",
        "pythia-6.9b",
        "no \\| file",
        "2510.07739",
    ):
        assert part in text
    assert "not comparable" not in text
    results.run["limit"] = 7
    assert "first 7 documents" in write_markdown(results).read_text()
    content = json.loads(results.path.read_text())
    assert content["averages"]["0-shot"] == {"value": pytest.approx(0.5), "missing": []}
    assert content["finished"]["piqa, 0-shot"]["metrics"]["acc_bytes"] == 0.1


def test_published_numbers_are_complete(shared_dir: Path) -> None:
    """They equal those in the files from which they were copied."""
    table = (shared_dir / "design/paper.md").read_text()
    _, rows = paper()
    for row in rows:
        for value in (row.pile, row.wikitext, row.lambada_openai, row.lambada_standard, row.average_0):
            assert f"{value:.2f}" in table
    assert len(rows) == 24
    reference = json.loads((shared_dir / "data/reference/pythia_v1_step143000.json").read_text())
    _, models = pythia()
    assert list(models) == list(reference)
    for name, by_shots in models.items():
        for shots, key in (("0", "zero-shot"), ("5", "five-shot")):
            for task, metrics in by_shots[shots].items():
                for metric, value in metrics.items():
                    theirs = reference[name][key][task]["ppl" if metric == "perplexity" else metric]
                    assert value == pytest.approx(theirs, abs=5e-4 if metric == "perplexity" else 5e-5)


def test_markdown_is_a_table() -> None:
    lines = TextTable("T", ["a", "b"], [["x", "1"]], notes=["n"]).markdown().splitlines()
    assert lines == ["## T", "", "| a | b |", "| --- | ---: |", "| x | 1 |", "", "n  "]
