"""The directories that a run writes to, and the configuration that it leaves there."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from megatron_mesh.checkpoint.state import TrainState
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.length import last_step
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import flag
from megatron_mesh.config.sources import read_yaml
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.distributed import is_rank_zero
from megatron_mesh.runtime.failures import resumes
from megatron_mesh.runtime.files import replace_text
from megatron_mesh.runtime.logging import Log, open_log
from megatron_mesh.runtime.owner_file import held_by_another, read_owner
from megatron_mesh.runtime.run_files import CONFIG_FILE, METRICS_FILE, OWNER_FILE, numbered
from megatron_mesh.train.metrics import perplexity

logger = logging.getLogger(__name__)

_ROOM = 2**16
"""Bytes that must fit into a directory at the start."""


def check_writable(config: Config) -> None:
    """Make the directories that the settings name, and raise UserError where one cannot be written.

    Refuse an output directory that belongs to another run which is still at work, too.

    Every rank writes to --save; rank 0 alone writes to the others, so it alone checks them.
    """
    directories = {
        "--save": config.checkpoint.save,
        "--output-dir": config.logging.output_dir,
        "--tensorboard-dir": config.logging.tensorboard_dir,
    }
    output = config.logging.output_dir
    apart = output and is_rank_zero() and not _same(output, config.checkpoint.save)
    if output and apart and held_by_another(Path(output), None):
        owner = read_owner(Path(output) / OWNER_FILE)
        raise UserError(f"--output-dir {output} belongs to {owner}; choose another directory")
    for name, directory in directories.items():
        if directory is None or not (name == "--save" or is_rank_zero()):
            continue
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as file:
                file.write(bytes(_ROOM))  # a full disk still takes an empty file
        except OSError as error:
            raise UserError(
                f"{name} {directory} cannot be written ({error.strerror}); choose another"
            ) from None


def _same(one: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(one) == os.path.realpath(other)


def warn_if_nothing_is_saved(config: Config) -> None:
    """Warn if there are settings for saving but no ``--save``: one YAML file may serve both kinds of run."""
    names = ("save_interval", "async_save", "keep_last", "exit_grace_seconds")
    idle = [flag(name) for name in names if getattr(config.checkpoint, name)]
    if config.checkpoint.save is None and idle:
        logger.warning(
            "nothing is saved: %s without --save; give the directory for checkpoints", ", ".join(idle)
        )


def output_directory(config: Config) -> Path:
    """Make the directory of configuration and metrics: --output-dir, or --save, or runs/<scheme>-<time>."""
    chosen = config.logging.output_dir or config.checkpoint.save
    name = f"{config.model.recurrence}-{datetime.now():%Y%m%d-%H%M%S}"
    directory = Path(chosen) if chosen else Path("runs") / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def holds_same_run(directory: Path, config: Config, step: int) -> bool:
    """Whether a run of ``config`` that starts at ``step`` continues the one whose output is in ``directory``.

    It does if it resumes, or if the earlier start ended before its first checkpoint. This reads the earlier
    start's configuration, so call it before ``write_config``.
    """
    settings = config.checkpoint
    if step or not resumes(settings.save, settings.load, settings.finetune):
        return step > 0
    assert settings.save is not None
    try:
        save = read_yaml(directory / CONFIG_FILE).get("save")
    except UserError:
        return False
    return save is not None and os.path.realpath(save) == os.path.realpath(settings.save)


def write_config(config: Config, directory: Path) -> None:
    """Write ``config.yaml``, with which ``--config`` starts the same run again.

    A different one that is there already is kept as ``config.1.yaml``, ``config.2.yaml`` and so on.
    """
    path, text = directory / CONFIG_FILE, dump_config(config)
    try:
        if path.exists() and (earlier := path.read_text(encoding="utf-8")) != text:
            replace_text(free_name(path), earlier)
        replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free the disk, or choose another directory"
        ) from None


def free_name(path: Path) -> Path:
    """Return the first unused name for an earlier version of a file, such as ``config.1.yaml``."""
    return next(free for n in count(1) if not (free := numbered(path, n)).exists())


@contextmanager
def open_outputs(config: Config, state: TrainState) -> Iterator[Log]:
    """The run's log, with its configuration and metrics in the output directory; rank 0 alone writes.

    A run that resumes adds to ``metrics.jsonl``, and so does one that was restarted before its first
    checkpoint. A new run keeps another's as ``metrics.1.jsonl``.
    """
    if not is_rank_zero():
        yield Log()
        return
    try:
        directory = output_directory(config)
        same_run = holds_same_run(directory, config, state.step)
        write_config(config, directory)
        metrics = directory / METRICS_FILE
        if not same_run and metrics.exists():
            metrics.rename(free_name(metrics))
        last = last_step(config.training, state.step, state.consumed_samples)
        log = open_log(config, directory, state.step, last, same_run=same_run)
    except OSError as error:
        raise UserError(
            f"the run's output cannot be written ({error}); free the disk or choose another --output-dir"
        ) from None
    with log:
        yield log


def position(config: Config, state: TrainState) -> dict[str, int]:
    """How far the training data were read."""
    return {
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_samples * config.model.seq_length,
    }


def summary(config: Config, state: TrainState, log: Log) -> dict[str, Any]:
    """What a finished run reports: how far, how long, how good, and where things are."""
    values: dict[str, Any] = {
        "steps": state.step,
        "tokens": state.consumed_samples * config.model.seq_length,
        "seconds": log.seconds,
        "train_loss": state.train_loss,
    }
    if state.train_loss_step not in (None, state.step):
        values["train_loss_step"] = state.train_loss_step
    if state.valid_loss is not None:
        values |= {"valid_loss": state.valid_loss, "valid_perplexity": perplexity(state.valid_loss)}
    if state.valid_loss_step not in (None, state.step):
        values["valid_loss_step"] = state.valid_loss_step
    if config.checkpoint.save:
        values["checkpoints"] = config.checkpoint.save
    if log.directory:
        values |= {"metrics": str(log.directory / METRICS_FILE), "config": str(log.directory / CONFIG_FILE)}
    return values
