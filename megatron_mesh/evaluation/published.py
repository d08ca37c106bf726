"""The numbers that others published, to hold ours against (paper.json, pythia.json)."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class PaperRow:
    """A model of the paper: perplexities, and average accuracies in percent."""

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
    """The source, and the rows in the paper's order."""
    content = _read("paper.json")
    rows = [PaperRow(**dict(zip(content["columns"], row, strict=True))) for row in content["rows"]]
    return content["source"], rows


def pythia() -> tuple[str, dict[str, dict[str, Any]]]:
    """The source, and by model and number of shots ("0", "5") the measures of each task, as fractions."""
    content = _read("pythia.json")
    return content["source"], content["models"]


@cache
def _read(name: str) -> dict[str, Any]:
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))
