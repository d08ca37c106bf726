"""Lists the tasks of the paper's tables, and the metric that the paper reports for each."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mesh.errors import UserError

SHOTS = (0, 5)
"""Numbers of examples in the prompt, as in the paper."""


@dataclass(frozen=True)
class Task:
    """A task of lm-eval."""

    name: str
    """Name in lm-eval."""
    label: str
    """Name in reports."""
    metric: str
    """The paper's metric, by its name in lm-eval.

    ``acc`` compares log-likelihoods of the choices, ``acc_norm`` divides them by the number of characters,
    ``acc_bytes`` by the number of UTF-8 bytes.
    """
    averaged: bool = True
    """Whether it is one of the nine tasks of the paper's average. Others are only run without examples."""

    @property
    def normalised(self) -> bool:
        """Whether log-likelihoods are divided by the length of the choices."""
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


def choose_tasks(names: Sequence[str] | None) -> list[Task]:
    """Return the tasks with these names, or all tasks, in the order of ``TASKS``.

    Raises:
        UserError: a name is unknown.
    """
    for name in names or ():
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise UserError(f"--tasks {name}: unknown task{hint}; choose from {', '.join(TASKS)}")
    return [task for task in TASKS.values() if names is None or task.name in names]
