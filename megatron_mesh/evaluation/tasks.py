"""Names of the engines that can run the evaluated model. This module imports neither of them.

Lists the tasks of the paper's tables, and the metric that the paper reports for each.

Finds lm-eval task files and their data in a directory, for machines without access to the hub.
"""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mesh.checkpoint.integrity import digest
from megatron_mesh.config.settings import load_yaml
from megatron_mesh.errors import UserError

TRANSFORMERS = "transformers"
VLLM = "vllm"
ENGINES = (TRANSFORMERS, VLLM)


def check_engine(engine: str, device: str | None) -> None:
    """Raise UserError if the engine is unknown or doesn't support ``--device``."""
    if engine not in ENGINES:
        raise UserError(f"--engine {engine} is unknown; choose from {', '.join(ENGINES)}")
    if engine == VLLM and device is not None:
        raise UserError(
            f"--device {device} is only for --engine transformers; leave it out: vLLM runs on the device "
            "that it was built for (choose a GPU with CUDA_VISIBLE_DEVICES)"
        )


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


@dataclass(frozen=True)
class LocalTask:
    """A task file whose data files exist."""

    file: Path
    config: dict[str, Any]
    """Content of the file, with the name of the official task and absolute paths."""
    data: str
    """SHA-256 over the task file and its data."""

    @property
    def has_examples(self) -> bool:
        """Whether the task has data for few-shot examples that are not its test data."""
        given = {name for name, value in self.config.items() if value}
        return (
            bool({"training_split", "fewshot_split"} & given) or {"validation_split", "test_split"} <= given
        )


def read_local_tasks(directory: Path) -> dict[str, LocalTask]:
    """Return the known tasks, by name, from all task files (.yaml) in ``directory`` and its subdirectories.

    A file belongs to the task NAME if its ``task`` is NAME or NAME_local. A data file may be at its path
    relative to ``directory``, or directly in ``directory``.

    Raises:
        UserError: there is no task file, or one of them is unusable.
    """
    if not directory.is_dir():
        raise UserError(f"--local-data {directory}: no such directory; create it or correct the path")
    found: dict[str, LocalTask] = {}
    for file in sorted(directory.rglob("*.yaml")):
        config = _read(file)
        name = str(config.get("task", "")).removesuffix("_local")
        if name not in TASKS:
            continue
        if name in found:
            raise UserError(f"{file} and {found[name].file} both define the task {name}; remove one of them")
        files: list[Path] = []
        settings = config.get("dataset_kwargs") or {}
        paths = _located(settings.get("data_files"), directory, file, files)
        config |= {"task": name, "dataset_kwargs": {**settings, "data_files": paths}}
        sha = hashlib.sha256(repr([digest(path) for path in (file, *files)]).encode()).hexdigest()
        found[name] = LocalTask(file, config, sha)
    if not found:
        raise UserError(
            f"--local-data {directory} contains no task file; put lm-eval task files (.yaml) there whose "
            f"task is one of {', '.join(TASKS)}, optionally with the suffix _local"
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        config = load_yaml(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the task file {file} ({' '.join(str(error).split())}); with --local-data it must "
            "be plain YAML without !function"
        ) from None
    return config if isinstance(config, dict) else {}


def _located(value: Any, directory: Path, file: Path, files: list[Path]) -> Any:
    """Return ``data_files`` with absolute paths, and append these paths to ``files``."""
    if isinstance(value, dict):
        return {split: _located(part, directory, file, files) for split, part in value.items()}
    if isinstance(value, list):
        return [_located(part, directory, file, files) for part in value]
    if not isinstance(value, str):
        raise UserError(f"{file} has no data_files in its dataset_kwargs; add them, --local-data needs them")
    tried = [directory / value, directory / Path(value).name]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise UserError(f"{file} needs the data file {value}, which is not in {directory}; copy it there")
    files.append(path)
    return str(path.resolve())
