"""Collects results in results.json, from which an interrupted evaluation resumes."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.tasks import AVERAGED, TASKS, TRANSFORMERS
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.run_files import replace_text

RESULTS_FILE = "results.json"
HUB = "hub"


def label(name: str, shots: int | None) -> str:
    """Return the label of a result: the key in results.json."""
    return name if shots is None else f"{name}, {shots}-shot"


@dataclass(frozen=True)
class Result:
    """Result of one task with one number of shots, or the perplexity of one text (``shots`` is None)."""

    name: str
    shots: int | None
    data: str
    """Source of the documents: "hub", or the SHA-256 of local files."""
    metrics: dict[str, float]
    stderr: dict[str, float]
    documents: int
    seconds: float

    @property
    def label(self) -> str:
        """The key in results.json."""
        return label(self.name, self.shots)


@dataclass(frozen=True)
class Skipped:
    """A requested task that cannot be run."""

    name: str
    shots: int | None
    reason: str

    @property
    def label(self) -> str:
        """The label that the result would have."""
        return label(self.name, self.shots)


class AnswerTooLong(Exception):
    """An answer has more tokens than the model accepts, so the task cannot be run on this model."""

    def __init__(self, tokens: int, limit: int):
        super().__init__(
            f"an answer has {tokens} tokens, but the model accepts {limit}; increase --max-length"
        )


def check_answer_lengths(requests: Iterable[tuple[Any, Any, list[int]]], limit: int) -> None:
    """Raise AnswerTooLong if an answer in lm-eval's requests (key, context, answer) exceeds ``limit``."""
    longest = max(len(answer) for _, _, answer in requests)
    if longest > limit:
        raise AnswerTooLong(longest, limit)


@dataclass(frozen=True)
class Average:
    """Mean over tasks of the paper's metric, for one number of shots."""

    value: float
    missing: list[str]
    """Tasks that are missing from the paper's nine. If none is missing, this is the paper's average."""


@dataclass
class Results:
    """Contents of ``results.json``."""

    path: Path
    run: dict[str, Any]
    """What all results share: model, precision, limit, versions."""
    finished: dict[str, Result] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def holds(self, label: str, data: str) -> bool:
        """Whether there already is a result with this label, for the same data.

        Raises:
            UserError: there is one for different data.
        """
        done = self.finished.get(label)
        if done is not None and done.data != data:
            raise UserError(
                f"{self.path} contains {label} for different data ({_short(done.data)} there, {_short(data)} "
                "here); choose another --output-dir"
            )
        return done is not None

    def add(self, result: Result) -> None:
        """Add a result and write the file."""
        self.finished[result.label] = result
        self.save()

    def averages(self) -> dict[int, Average]:
        """Return averages by number of shots, where at least one of the nine tasks is finished."""
        found = {}
        for shots in sorted({r.shots for r in self.finished.values() if r.shots is not None}):
            done = [r for r in self.finished.values() if r.shots == shots and r.name in AVERAGED]
            if done:
                value = math.fsum(r.metrics[TASKS[r.name].metric] for r in done) / len(done)
                missing = [name for name in AVERAGED if name not in {r.name for r in done}]
                found[shots] = Average(value, missing)
        return found

    def save(self) -> None:
        """Write the file atomically."""
        content = {
            "run": self.run,
            "finished": {label: asdict(result) for label, result in self.finished.items()},
            "averages": {f"{shots}-shot": asdict(average) for shots, average in self.averages().items()},
            "not_run": [asdict(skipped) for skipped in self.skipped],
        }
        replace_text(self.path, strict_json.dumps(content, indent=2) + "\n")


def open_results(directory: Path, run: Mapping[str, Any]) -> Results:
    """Read the results in ``directory``, which is created if needed.

    Raises:
        UserError: the directory contains results of a different ``run``, or cannot be read or written.
    """
    path = directory / RESULTS_FILE
    results = Results(path, dict(run))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else None
    except OSError as error:
        raise UserError(f"cannot use --output-dir {directory} ({error}); choose another") from None
    if text is None:
        return results
    try:
        content = json.loads(text)
        saved, finished = {"engine": TRANSFORMERS, **content["run"]}, content["finished"]
        for values in finished.values():
            for kind in ("metrics", "stderr"):
                values[kind] = {name: strict_json.number(value) for name, value in values[kind].items()}
        results.finished = {label: Result(**values) for label, values in finished.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the results in {path} ({error}); choose another --output-dir") from None
    for name, value in results.run.items():
        if name != "path" and saved.get(name) != value:
            raise UserError(
                f"{path} contains results of a different run ({name}: {_short(saved.get(name))} there, "
                f"{_short(value)} here); choose another --output-dir"
            )
    return results


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
