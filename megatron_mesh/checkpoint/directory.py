"""The checkpoints in a directory: their names, which are whole, which a run starts from, which are deleted.

``SAVE/iter_0000020/`` gets its name when it is complete, and only then is it named in
``SAVE/latest_checkpointed_iteration.txt`` (Megatron-LM's file). Directories with a suffix are being written
or deleted. No run reads them.
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

from megatron_mesh.config.length import counts_samples, last_step
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.config.settings import with_values
from megatron_mesh.config.sources import read_yaml
from megatron_mesh.errors import UserError
from megatron_mesh.runtime import phases, strict_json
from megatron_mesh.runtime.files import replace_text
from megatron_mesh.runtime.run_files import (
    CHECKPOINTS,
    CONFIG_FILE,
    LATEST_FILE,
    VALIDATION_FILE,
    checkpoint_step,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
OLD_FORMAT_VERSION = 2
"""Still read. It has one checksum for each file, and plain values in ``common.pt``."""
STATE_FILE = "state.json"

_UNFINISHED = (".partial", ".replaced", ".deleting")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, without its tensors."""

    path: Path
    config: Config
    world_size: int
    train_state: dict[str, Any]
    """See ``TrainState.state_dict``."""
    updates: int = 0
    """How many updates Adam counts; of format 2 it is not known before the tensors are read."""
    weights_only: bool = False
    """Whether it lacks the optimizer's state."""
    format_version: int = FORMAT_VERSION

    def same_layout(self, config: Config, world_size: int) -> bool:
        """Whether each rank of a run of ``config`` stands where the same rank of the saved one stood."""
        names = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
        saved, ours = self.config.parallel, config.parallel
        same = all(getattr(saved, name) == getattr(ours, name) for name in names)
        return same and self.world_size == world_size

    def position(self, config: Config) -> tuple[int, int]:
        """Step and consumed samples at which a run of ``config`` starts."""
        if config.checkpoint.finetune:
            return 0, 0
        step, samples = self.train_state["step"], self.train_state["consumed_samples"]
        if step >= last_step(config.training, step, samples):
            length = "--train-samples" if counts_samples(config.training) else "--train-iters"
            logger.info("%s is at step %d: raise %s to train on", self.path, step, length)
        return step, samples


def saved_steps(directory: Path) -> dict[int, Path]:
    """Complete checkpoints by step, ascending."""
    if not directory.is_dir():
        return {}
    found = {checkpoint_step(path.name): path for path in directory.iterdir() if path.is_dir()}
    return {step: found[step] for step in sorted(step for step in found if step is not None)}


def newest_checkpoint(path: Path) -> Path:
    """The last checkpoint of the run in the directory ``path``, or ``path``, if it is one or holds none."""
    steps = {} if (path / STATE_FILE).is_file() else saved_steps(path)
    return list(steps.values())[-1] if steps else path


def candidates(settings: CheckpointConfig) -> list[Path]:
    """The checkpoints that a run may start from, best first; none for a new run.

    That is ``load`` itself, or else the newest in it and, with ``load_fallback``, those before.

    Raises:
        UserError: ``load`` holds no checkpoint and is not ``save``; or going on would write among the
            checkpoints of another run in ``save``.
    """
    save = Path(settings.save).resolve() if settings.save else None
    load = Path(settings.load).resolve() if settings.load else None
    if save and saved_steps(save) and (load != save or settings.finetune):
        raise UserError(
            f"--save {settings.save} already holds checkpoints, of another run; choose another directory, or "
            f"resume that run with --load {settings.save}"
        )
    if load is None:
        return []
    if (load / STATE_FILE).is_file():
        return [load]
    found = list(reversed(saved_steps(load).values()))
    if (not found or any(found[0].glob("mp_rank_*"))) and (load != save or settings.finetune):
        raise UserError(f"--load {settings.load}{_what_else(load)}")
    return found if settings.load_fallback else found[:1]


def _what_else(path: Path) -> str:
    """What ``path`` is if it is not a checkpoint, and what to do."""
    if path.is_file():
        return " is a file; give the directory of a run (its --save) or of one checkpoint (iter_...)"
    if not path.exists():
        return ": no checkpoint there (no such directory); check the directory"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return (
            f" is a Hugging Face model; tools/convert_from_hf.py --load {path} --save NEW makes a checkpoint "
            "of it, for --load NEW --finetune"
        )
    if any(path.glob(f"{CHECKPOINTS}/mp_rank_*")):
        return " holds a checkpoint of Megatron-LM, in a format of its own, which cannot be read"
    return ": no checkpoint there (no iter_...); check the directory"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what a checkpoint says of itself.

    Raises:
        UserError: it is incomplete or of another format.
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
            f"{path} has checkpoint format {version}, and this version reads {OLD_FORMAT_VERSION} and "
            f"{FORMAT_VERSION}; use the version of megatron_mesh that wrote it"
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
    """Add the validation loss of its own step to the complete checkpoint ``path``."""
    replace_text(path / VALIDATION_FILE, strict_json.dumps({"valid_loss": loss}))


def _validation(path: Path, train_state: dict[str, Any]) -> dict[str, Any]:
    """What ``write_validation`` has added to the state."""
    try:
        loss = json.loads((path / VALIDATION_FILE).read_text(encoding="utf-8"))["valid_loss"]
    except (OSError, ValueError, KeyError, TypeError):  # it is not part of what makes a checkpoint whole
        return {}
    return {"valid_loss": strict_json.number(loss), "valid_loss_step": train_state["step"]}


def publish(partial: Path, final: Path, step: int) -> list[Path]:
    """Give a complete checkpoint its name, then name it in the tracker file; each step is atomic.

    What a name stands for is on the disk before the name is: earlier checkpoints may be deleted after this.
    The ranks have already synchronized their files of tensors.

    Returns:
        The earlier checkpoint of this step, if there was one, renamed, for deletion.
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
    except OSError as error:  # the checkpoint is complete all the same, and runs look for its name
        logger.error("%s cannot name step %d: %s", tracker, step, error)
    return [replaced] if again else []


def restore_replaced(directory: Path) -> None:
    """Restore the names of checkpoints that were set aside for a replacement that was never published."""
    for path in directory.glob(f"{CHECKPOINTS}.replaced"):
        if not (final := path.with_suffix("")).exists():
            path.rename(final)


def retire_old(directory: Path, newest: int, keep_last: int | None, keep_every: int | None) -> Iterator[Path]:
    """Rename the checkpoints that are not to be kept, so that no name stands for half a checkpoint.

    Kept are the last ``keep_last`` up to step ``newest``, which was just written, and those of steps
    divisible by ``keep_every``.
    Checkpoints after ``newest`` are not counted: the run resumed before them because they were damaged.

    Yields:
        Each as soon as it is renamed, for deletion.
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
    """Rename the unfinished checkpoints that a killed run left, so that later saves can use their names.

    Returns:
        The renamed directories, for deletion.
    """
    leaving = []
    for path in directory.glob(CHECKPOINTS):
        if path.suffix not in _UNFINISHED:
            continue
        if path.suffix != ".deleting":
            renamed = path.with_name(f"{path.name}.{time.time_ns()}.deleting")
            try:
                path.rename(renamed)
            except OSError:  # a save of the same step makes room for itself
                continue
            path = renamed
        leaving.append(path)
    return leaving


def _sync(path: Path) -> None:
    """Make a file, or the names in a directory, last through a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
