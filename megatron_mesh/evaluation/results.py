"""What is measured so far, in a file that outlives an interruption."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.engines import TRANSFORMERS
from megatron_mesh.evaluation.tasks import AVERAGED, TASKS
from megatron_mesh.runtime import strict_json
from megatron_mesh.runtime.files import replace_text

RESULTS_FILE = "results.json"
HUB = "hub"


def label(name: str, shots: int | None) -> str:
    """What a result is called."""
    return name if shots is None else f"{name}, {shots}-shot"


@dataclass(frozen=True)
class Result:
    """One task at one number of shots, or the perplexity of one text (``shots`` is None)."""

    name: str
    shots: int | None
    data: str
    """Where the documents come from: "hub", or the SHA-256 of local files."""
    metrics: dict[str, float]
    stderr: dict[str, float]
    documents: int
    seconds: float

    @property
    def label(self) -> str:
        """For people, and the key in the file."""
        return label(self.name, self.shots)


@dataclass(frozen=True)
class Skipped:
    """A task that was asked for and cannot be run."""

    name: str
    shots: int | None
    reason: str

    @property
    def label(self) -> str:
        """As that of a result."""
        return label(self.name, self.shots)


class TooLong(Exception):
    """An answer has more tokens than the model takes: the task cannot be run on this model."""

    def __init__(self, tokens: int, limit: int):
        super().__init__(f"an answer has {tokens} tokens, the model takes {limit}; --max-length allows more")


def refuse_long_answers(requests: Iterable[tuple[Any, Any, list[int]]], limit: int) -> None:
    """Raise TooLong if the answer of one of lm-eval's requests (key, context, answer) exceeds ``limit``."""
    longest = max(len(answer) for _, _, answer in requests)
    if longest > limit:
        raise TooLong(longest, limit)


@dataclass(frozen=True)
class Average:
    """Mean of the paper's measure over tasks at one number of shots."""

    value: float
    missing: list[str]
    """Those of the nine that are not in it: it is the paper's average if there are none."""


@dataclass
class Results:
    """The content of ``results.json``."""

    path: Path
    run: dict[str, Any]
    """What all results have in common: model, precision, limit, versions."""
    finished: dict[str, Result] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def holds(self, label: str, data: str) -> bool:
        """Whether this was measured already, on the same data.

        Raises:
            UserError: it was measured on other data.
        """
        done = self.finished.get(label)
        if done is not None and done.data != data:
            raise UserError(
                f"{self.path} holds {label} from other data than these ({_short(done.data)}, not "
                f"{_short(data)}); choose another --output-dir"
            )
        return done is not None

    def add(self, result: Result) -> None:
        """Take a result up and write the file."""
        self.finished[result.label] = result
        self.save()

    def averages(self) -> dict[int, Average]:
        """By number of shots; a number at which no task of the nine is finished is left out."""
        found = {}
        for shots in sorted({r.shots for r in self.finished.values() if r.shots is not None}):
            done = [r for r in self.finished.values() if r.shots == shots and r.name in AVERAGED]
            if done:
                value = math.fsum(r.metrics[TASKS[r.name].metric] for r in done) / len(done)
                missing = [name for name in AVERAGED if name not in {r.name for r in done}]
                found[shots] = Average(value, missing)
        return found

    def save(self) -> None:
        """Write the file at one stroke: there is always a whole one."""
        content = {
            "run": self.run,
            "finished": {label: asdict(result) for label, result in self.finished.items()},
            "averages": {f"{shots}-shot": asdict(average) for shots, average in self.averages().items()},
            "not_run": [asdict(skipped) for skipped in self.skipped],
        }
        replace_text(self.path, strict_json.dumps(content, indent=2) + "\n")


def open_results(directory: Path, run: Mapping[str, Any]) -> Results:
    """What was measured in ``directory`` so far, for the same ``run``; empty for a new directory.

    Raises:
        UserError: the directory holds results of another run, or cannot be read or written.
    """
    path = directory / RESULTS_FILE
    results = Results(path, dict(run))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else None
    except OSError as error:
        raise UserError(f"--output-dir {directory} cannot be used: {error}") from None
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
        raise UserError(f"{path} is not a file of results ({error}); choose another --output-dir") from None
    for name, value in results.run.items():
        if name != "path" and saved.get(name) != value:
            raise UserError(
                f"{path} holds results of another run ({name}: {_short(saved.get(name))} there, "
                f"{_short(value)} here); choose another --output-dir"
            )
    return results


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
