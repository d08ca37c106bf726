"""Tasks from files: data and lm-eval task files in a directory, for machines without the hub."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mesh.checkpoint.integrity import digest
from megatron_mesh.config.yaml_file import load_yaml
from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.tasks import TASKS


@dataclass(frozen=True)
class LocalTask:
    """A task file whose data files were found."""

    file: Path
    config: dict[str, Any]
    """Its content, with the official task's name and absolute paths."""
    data: str
    """SHA-256 over the task file and its data."""

    @property
    def has_examples(self) -> bool:
        """Whether it names data to draw few-shot examples from, other than those it is tested on."""
        given = {name for name, value in self.config.items() if value}
        return (
            bool({"training_split", "fewshot_split"} & given) or {"validation_split", "test_split"} <= given
        )


def read_local_tasks(directory: Path) -> dict[str, LocalTask]:
    """The known tasks by name, from all task files (.yaml) in ``directory`` and below.

    A file is of the task NAME if its ``task`` is NAME or NAME_local. Data files are looked for under their
    path from ``directory``, then by their name alone in it.

    Raises:
        UserError: no task file is there, or one cannot be used.
    """
    if not directory.is_dir():
        raise UserError(f"--local-data {directory}: no such directory")
    found: dict[str, LocalTask] = {}
    for file in sorted(directory.rglob("*.yaml")):
        config = _read(file)
        name = str(config.get("task", "")).removesuffix("_local")
        if name not in TASKS:
            continue
        if name in found:
            raise UserError(f"{file} and {found[name].file} are both of the task {name}; remove one of them")
        files: list[Path] = []
        settings = config.get("dataset_kwargs") or {}
        paths = _located(settings.get("data_files"), directory, file, files)
        config |= {"task": name, "dataset_kwargs": {**settings, "data_files": paths}}
        sha = hashlib.sha256(repr([digest(path) for path in (file, *files)]).encode()).hexdigest()
        found[name] = LocalTask(file, config, sha)
    if not found:
        raise UserError(
            f"--local-data {directory}: no task file there; it needs lm-eval task files (.yaml) with a task "
            f"of {', '.join(TASKS)}, also with _local after the name"
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        config = load_yaml(file)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} cannot be read as a task file ({' '.join(str(error).split())}); with --local-data it is "
            "plain YAML, without !function"
        ) from None
    return config if isinstance(config, dict) else {}


def _located(value: Any, directory: Path, file: Path, files: list[Path]) -> Any:
    """``data_files`` with absolute paths in place of the names in it, which are added to ``files``."""
    if isinstance(value, dict):
        return {split: _located(part, directory, file, files) for split, part in value.items()}
    if isinstance(value, list):
        return [_located(part, directory, file, files) for part in value]
    if not isinstance(value, str):
        raise UserError(f"{file} names no data_files in its dataset_kwargs; with --local-data it has to")
    tried = [directory / value, directory / Path(value).name]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise UserError(f"{file} names the data file {value}, which is not in {directory}; put it there")
    files.append(path)
    return str(path.resolve())
