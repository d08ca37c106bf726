"""Published results to compare with: the paper's (paper.json) and Pythia's (pythia.json)."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


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
