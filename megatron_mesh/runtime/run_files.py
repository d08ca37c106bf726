"""Names of the files that a run writes. Code that reads or writes one of them takes its name from here.

Everything in this list is in ``--save``, unless ``--output-dir`` moves configuration, metrics and figures.
The other files inside a checkpoint belong to ``checkpoint/``::

    SAVE/iter_0000020/                        a complete checkpoint
        validation.json                       its validation loss, added later
    SAVE/latest_checkpointed_iteration.txt    step of the newest one (Megatron-LM's file)
    SAVE/config.yaml, config.1.yaml, ...      resolved settings, and those of earlier starts
    SAVE/metrics.jsonl, metrics.1.jsonl, ...  the numbers of the run, and those of earlier runs
    SAVE/wandb_run_id.txt                     id of the Weights & Biases run
    SAVE/loss.png, routers.png                figures, drawn by tools/plot_run.py
    SAVE/run_status.txt                       running, stopped, done or failed, for scripts
    SAVE/run_owner.txt                        the process or job that may write to SAVE
    SAVE/stop                                 created by the user: save and stop after this step
    SAVE/slurm/                               settings, code, scripts and logs of the run's SLURM jobs
    PREFIX/cache/                             index of the data set PREFIX, unless --data-cache-path is given

The shell script job.sh spells some of these names itself; a test compares them with this module.

Write text files atomically.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id.txt"
"""Lets a resumed run log to the same Weights & Biases run."""
LOSS_FIGURE = "loss.png"
ROUTERS_FIGURE = "routers.png"

STATUS_FILE = "run_status.txt"
"""The first line is one word for scripts. Further lines say why a run failed, one for each cause."""
OWNER_FILE = "run_owner.txt"
STOP_FILE = "stop"

SLURM_FOLDER = "slurm"
"""Holds the files below, ``config.yaml``, the shell scripts of the jobs, and their logs."""
CODE_FOLDER = "code"
BATCH_SCRIPT = "job.sbatch"
ARRAY_SCRIPT = "array.sbatch"
JOBS_FILE = "jobs.txt"
STARTS_FILE = "starts.txt"
SITE_FILE = "site.sh"
VERSION_FILE = "version.txt"

INDEX_CACHE_FOLDER = "cache"

LATEST_FILE = "latest_checkpointed_iteration.txt"
VALIDATION_FILE = "validation.json"
CHECKPOINTS = "iter_*"
"""Glob of the checkpoints in a directory, including those being written or deleted, which have a suffix."""
CHECKPOINT_PREFIX = CHECKPOINTS.removesuffix("*")


def checkpoint_path(save: Path, step: int) -> Path:
    """Return the directory of the checkpoint of ``step``."""
    return save / f"{CHECKPOINT_PREFIX}{step:07d}"


def checkpoint_step(name: str) -> int | None:
    """Return the step of the complete checkpoint called ``name``, or None for any other name."""
    found = re.fullmatch(rf"{CHECKPOINT_PREFIX}(\d{{7,}})", name)
    return int(found[1]) if found else None


def numbered(path: Path, number: int) -> Path:
    """Return the name under which an earlier file is kept: ``config.yaml`` becomes ``config.1.yaml``."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}")


def earlier_versions(path: Path) -> list[Path]:
    """Return the earlier files of this name (see ``numbered``), the oldest first."""
    found = path.parent.glob(f"{path.stem}.*{path.suffix}")
    return sorted(found, key=lambda earlier: int(earlier.name.split(".")[1]))


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically. Readers see the old text or the new one, even after a crash.

    Raises:
        OSError: the file cannot be written. The old text is still there.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
