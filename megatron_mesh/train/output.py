"""The directories that a run writes to: checks them, and writes configuration, metrics and summary."""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.config.layout import last_step
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import dump_config, flag, read_yaml
from megatron_mesh.errors import UserError
from megatron_mesh.metrics.log import Log, open_log
from megatron_mesh.metrics.meters import perplexity
from megatron_mesh.runtime.distributed import is_rank_zero
from megatron_mesh.runtime.failures import resumes
from megatron_mesh.runtime.owner_file import held_by_another, read_owner
from megatron_mesh.runtime.run_files import CONFIG_FILE, METRICS_FILE, OWNER_FILE, numbered, replace_text

logger = logging.getLogger(__name__)

_ROOM = 2**16
"""Bytes that must fit into each directory when the run starts."""


def check_writable(config: Config) -> None:
    """Create the directories in the settings, and check that they can be written.

    Every rank writes to --save and checks it. Only rank 0 writes to the others, so only rank 0 checks them.

    Raises:
        UserError: a directory cannot be written, or another run is writing to the output directory.
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
                file.write(bytes(_ROOM))  # an empty file would fit on a full disk
        except OSError as error:
            raise UserError(
                f"{name} {directory} cannot be written ({error.strerror}); choose another directory"
            ) from None


def _same(one: str, other: str | None) -> bool:
    return other is not None and os.path.realpath(one) == os.path.realpath(other)


def warn_if_nothing_is_saved(config: Config) -> None:
    """Warn about settings for saving without ``--save``. Runs with and without it may share a YAML file."""
    names = ("save_interval", "async_save", "keep_last", "exit_grace_seconds")
    idle = [flag(name) for name in names if getattr(config.checkpoint, name)]
    if config.checkpoint.save is None and idle:
        logger.warning(
            "no checkpoint will be saved: %s without --save; give a directory with --save", ", ".join(idle)
        )


def output_directory(config: Config) -> Path:
    """Create the directory for configuration and metrics: --output-dir, --save or runs/<scheme>-<time>."""
    chosen = config.logging.output_dir or config.checkpoint.save
    name = f"{config.model.recurrence}-{datetime.now():%Y%m%d-%H%M%S}"
    directory = Path(chosen) if chosen else Path("runs") / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def holds_same_run(directory: Path, config: Config, step: int) -> bool:
    """Return whether this start continues the run whose output is in ``directory``.

    It does if it resumes from a checkpoint, or if the earlier start ended before its first one. Call this
    before ``write_config``, which replaces the earlier start's configuration.

    Args:
        step: the step at which this start begins.
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

    If the file exists with other contents, those are moved to ``config.1.yaml``, ``config.2.yaml`` and so on.
    """
    path, text = directory / CONFIG_FILE, dump_config(config)
    try:
        if path.exists() and (earlier := path.read_text(encoding="utf-8")) != text:
            replace_text(free_name(path), earlier)
        replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free disk space or choose another --output-dir"
        ) from None


def free_name(path: Path) -> Path:
    """Return the first unused name for an earlier version of a file, such as ``config.1.yaml``."""
    return next(free for n in count(1) if not (free := numbered(path, n)).exists())


@contextmanager
def open_outputs(config: Config, state: TrainState) -> Iterator[Log]:
    """Write the configuration and open the run's log. Only rank 0 writes.

    A run that resumes, or restarts before its first checkpoint, appends to ``metrics.jsonl``. A new run first
    renames an existing file to ``metrics.1.jsonl``.
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
            f"the run's output cannot be written ({error}); free disk space or choose another --output-dir"
        ) from None
    with log:
        yield log


def position(config: Config, state: TrainState) -> dict[str, int]:
    """Return the position in the training data, in samples and tokens."""
    return {
        "consumed_samples": state.consumed_samples,
        "consumed_tokens": state.consumed_samples * config.model.seq_length,
    }


def run_summary(config: Config, state: TrainState, log: Log) -> dict[str, Any]:
    """Return the final report of a run: steps, time, losses, and the paths of its files."""
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
