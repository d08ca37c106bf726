"""The checkpoints in a directory: finds, describes, publishes and retires them.

A checkpoint is written under a temporary name. When it is complete it is renamed to ``SAVE/iter_0000020/``,
and then ``SAVE/latest_checkpointed_iteration.txt`` (Megatron-LM's file) is updated. Directories with a suffix
are being written or deleted, and no run reads them.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mesh.config.layout import counts_samples, last_step
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.config.settings import read_yaml, with_values
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import phases, strict_json
from megatron_mesh.runtime.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    LATEST_FILE,
    VALIDATION_FILE,
    checkpoint_step,
    replace_text,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
OLD_FORMAT_VERSION = 2
"""Can still be read. It has one checksum per file, and plain values in ``common.pt``."""
STATE_FILE = "state.json"

_UNFINISHED = (".partial", ".replaced", ".deleting")


@dataclass(frozen=True)
class Checkpoint:
    """The description of a complete checkpoint, without its tensors."""

    path: Path
    config: Config
    world_size: int
    train_state: dict[str, Any]
    """See ``TrainState.state_dict``."""
    updates: int = 0
    """How many updates Adam has counted. Not known for format 2 before its tensors are read."""
    weights_only: bool = False
    """Whether it lacks the optimizer's state."""
    format_version: int = FORMAT_VERSION

    def same_layout(self, config: Config, world_size: int) -> bool:
        """Return whether a run with ``config`` on ``world_size`` ranks has the saved run's rank layout."""
        names = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
        saved, ours = self.config.parallel, config.parallel
        same = all(getattr(saved, name) == getattr(ours, name) for name in names)
        return same and self.world_size == world_size

    def position(self, config: Config) -> tuple[int, int]:
        """Return the step and the number of consumed samples at which a run with ``config`` starts."""
        if config.checkpoint.finetune:
            return 0, 0
        step, samples = self.train_state["step"], self.train_state["consumed_samples"]
        if step >= last_step(config.training, step, samples):
            length = "--train-samples" if counts_samples(config.training) else "--train-iters"
            logger.info("%s is at step %d, the last one; raise %s to train longer", self.path, step, length)
        return step, samples


def saved_steps(directory: Path) -> dict[int, Path]:
    """Return the complete checkpoints by step, in ascending order."""
    if not directory.is_dir():
        return {}
    found = {checkpoint_step(path.name): path for path in directory.iterdir() if path.is_dir()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def newest_checkpoint(path: Path) -> Path:
    """Return the newest checkpoint in ``path``, or ``path`` itself if it is a checkpoint or has none."""
    steps = {} if (path / STATE_FILE).is_file() else saved_steps(path)
    return list(steps.values())[-1] if steps else path


def candidates(settings: CheckpointConfig) -> list[Path]:
    """Return the checkpoints that a run may load, in the order of preference; none for a new run.

    If ``load`` is a checkpoint, that is the only one. If it is a run's directory, the newest comes first and,
    with ``load_fallback``, the earlier ones follow.

    Raises:
        UserError: ``load`` holds no checkpoint and is not ``save``, or ``save`` holds the checkpoints of
            another run, among which this one would write.
    """
    save = Path(settings.save).resolve() if settings.save else None
    load = Path(settings.load).resolve() if settings.load else None
    if save and saved_steps(save) and (load != save or settings.finetune):
        raise UserError(
            f"--save {settings.save} already holds checkpoints of another run; choose another directory, or "
            f"resume that run with --load {settings.save}"
        )
    if load is None:
        return []
    if (load / STATE_FILE).is_file():
        return [load]
    found = list(reversed(saved_steps(load).values()))
    if (not found or any(found[0].glob("mp_rank_*"))) and (load != save or settings.finetune):
        raise UserError(f"--load {settings.load}{_describe_wrong_path(load)}")
    return found if settings.load_fallback else found[:1]


def _describe_wrong_path(path: Path) -> str:
    """Say what ``path`` is instead of a checkpoint, and what to do. Continues the sentence "--load PATH"."""
    if path.is_file():
        return " is a file; give the directory of a run (its --save) or of one checkpoint (iter_...)"
    if not path.exists():
        return " does not exist; give the directory of a run (its --save) or of one checkpoint (iter_...)"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return (
            f" is a Hugging Face model; convert it with tools/convert_from_hf.py --load {path} --save NEW, "
            "then give --load NEW --finetune"
        )
    if any(path.glob(f"{CHECKPOINTS}/mp_rank_*")):
        return " holds a checkpoint in Megatron-LM's own format, which cannot be read; give another one"
    return " holds no checkpoint (no iter_... directory); check the directory"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the description of a checkpoint.

    Raises:
        UserError: the checkpoint is incomplete or has an unknown format.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        version = state["format_version"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({error}); --load another one") from None
    if version not in (OLD_FORMAT_VERSION, FORMAT_VERSION):
        raise UserError(
            f"{path} has checkpoint format {version}, but this version of megatron_mesh reads only formats "
            f"{OLD_FORMAT_VERSION} and {FORMAT_VERSION}; use the version that wrote it"
        )
    config = with_values(Config(), read_yaml(path / CONFIG_FILE))
    return Checkpoint(
        path,
        config,
        state["world_size"],
        {**state["train_state"], **_validation(path, state["train_state"])},
        updates=state.get("updates", 0),
        weights_only=state.get("weights_only", False),
        format_version=version,
    )


def write_validation(path: Path, loss: float | None) -> None:
    """Add the validation loss of its step to the complete checkpoint ``path``."""
    replace_text(path / VALIDATION_FILE, strict_json.dumps({"valid_loss": loss}))


def _validation(path: Path, train_state: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of the train state that ``write_validation`` has added."""
    try:
        loss = json.loads((path / VALIDATION_FILE).read_text(encoding="utf-8"))["valid_loss"]
    except (OSError, ValueError, KeyError, TypeError):  # a checkpoint is complete without it
        return {}
    return {"valid_loss": strict_json.number(loss), "valid_loss_step": train_state["step"]}


def publish(partial: Path, final: Path, step: int) -> list[Path]:
    """Rename a complete checkpoint to its final name, then update the tracker file. Each step is atomic.

    Contents reach the disk before names do, so earlier checkpoints may be deleted afterwards. The ranks have
    already synchronized their tensor files.

    Returns:
        The earlier checkpoint of this step, renamed and ready to be deleted, if there was one.
    """
    for path in partial.iterdir():
        if not path.name.endswith(".distcp"):
            _sync(path)
    _sync(partial)
    replaced = final.with_name(f"{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    phases.enter("rename")
    again = final.exists()
    if again:
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        restore_replaced(final.parent)
        raise
    phases.enter("latest")
    tracker = final.parent / LATEST_FILE
    try:
        _sync(final.parent)
        replace_text(tracker, str(step))
    except OSError as error:  # runs look for the names of checkpoints and don't need this file
        logger.error("%s was not updated to step %d: %s; the checkpoint is complete", tracker, step, error)
    return [replaced] if again else []


def restore_replaced(directory: Path) -> None:
    """Undo the renaming of checkpoints whose replacements were never published."""
    for path in directory.glob(f"{CHECKPOINTS}.replaced"):
        if not (final := path.with_suffix("")).exists():
            path.rename(final)


def retire_old(directory: Path, newest: int, keep_last: int | None, keep_every: int | None) -> Iterator[Path]:
    """Rename old checkpoints before they are deleted, so no valid name ever belongs to a half-deleted one.

    The ``keep_last`` newest stay, up to step ``newest``, which was just written; so do steps divisible by
    ``keep_every``. Checkpoints after ``newest`` were skipped as damaged, so they must not displace good ones.

    Yields:
        Each renamed directory, ready to be deleted.
    """
    if keep_last is None:
        return
    written = [(step, path) for step, path in saved_steps(directory).items() if step <= newest]
    for step, path in written[:-keep_last]:
        if keep_every is None or step % keep_every:
            leaving = path.with_name(f"{path.name}.deleting")
            path.rename(leaving)
            yield leaving


def retire_unfinished(directory: Path) -> list[Path]:
    """Rename the unfinished checkpoints that a killed run left behind, so that saves can reuse their names.

    Returns:
        The renamed directories, ready to be deleted.
    """
    leaving = []
    for path in directory.glob(CHECKPOINTS):
        if path.suffix not in _UNFINISHED:
            continue
        if path.suffix != ".deleting":
            renamed = path.with_name(f"{path.name}.{time.time_ns()}.deleting")
            try:
                path.rename(renamed)
            except OSError:  # a save of the same step will empty it
                continue
            path = renamed
        leaving.append(path)
    return leaving


def _sync(path: Path) -> None:
    """Flush a file, or the names in a directory, to the disk, so that they survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
