"""The tasks of the paper's tables, and the measure that each is reported in."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mesh.errors import UserError

SHOTS = (0, 5)
"""Examples in the prompt: the paper's two columns."""


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, under lm-eval's name."""

    name: str
    label: str
    metric: str
    """The paper's measure, in lm-eval's words: ``acc_norm`` divides log-likelihoods by the characters of a
    choice, ``acc_bytes`` by its UTF-8 bytes, ``acc`` by nothing."""
    averaged: bool = True
    """Whether it is one of the nine of the paper's average; the others are run without examples alone."""

    @property
    def normalised(self) -> bool:
        """Whether it is a choice between texts whose length matters."""
        return self.metric == "acc_bytes"


TASKS = {
    task.name: task
    for task in (
        Task("piqa", "PIQA", "acc_bytes"),
        Task("hellaswag", "HellaSwag", "acc_bytes"),
        Task("arc_easy", "ARC easy", "acc_bytes"),
        Task("arc_challenge", "ARC challenge", "acc_bytes"),
        Task("sciq", "SciQ", "acc_bytes"),
        Task("lambada_openai", "LAMBADA OpenAI", "acc"),
        Task("lambada_standard", "LAMBADA standard", "acc"),
        Task("winogrande", "WinoGrande", "acc"),
        Task("mmlu_continuation", "MMLU continuation", "acc"),
        Task("wikitext", "WikiText", "word_perplexity", averaged=False),
    )
}
AVERAGED = [task.name for task in TASKS.values() if task.averaged]


def choose(names: Sequence[str] | None) -> list[Task]:
    """The tasks named, or all of them, in the order of ``TASKS``.

    Raises:
        UserError: a name is not known; the message has the nearest.
    """
    for name in names or ():
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--tasks {name}: no such task{hint} There are {', '.join(TASKS)}.")
    return [task for task in TASKS.values() if names is None or task.name in names]
