"""Submit a run: check settings, write code, settings and batch script to ``RUN/slurm``, call sbatch."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import megatron_mesh
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import (
    BATCH_SCRIPT,
    CODE_FOLDER,
    CONFIG_FILE,
    JOBS_FILE,
    SITE_FILE,
    VERSION_FILE,
)
from megatron_mesh.slurm.commands import cancel_jobs, submit
from megatron_mesh.slurm.script import JobRequest, batch_script, slurm_directory
from megatron_mesh.slurm.site import Site

_SHELL_FILES = ("job.sh", "environment.sh", "task.sh")
_PACKAGE = Path(megatron_mesh.__file__).resolve().parent
_ROOT = _PACKAGE.parent
"""The clone, or the directory in which pip installed the package and ``pretrain_mesh.py``."""


def check_clone(started_from: Path) -> None:
    """Raise UserError if the tool belongs to one clone and the imported package to another.

    Args:
        started_from: the directory above the tool's own: a clone, or the package if the tool is installed.
    """
    if started_from not in (_ROOT, _PACKAGE):
        raise UserError(
            f"the tool is in {started_from}, but Python imported the package from {_ROOT} and would submit "
            f"that code; start {_ROOT}/tools/submit_slurm.py, or use a complete clone"
        )


def config_for_jobs(
    config: Config, run: Path, site: Site, nodes: int, directory: Path | None = None
) -> Config:
    """Complete and check the settings as the jobs will use them.

    Args:
        directory: working directory of the jobs; None means this process's.

    Raises:
        UserError: the settings don't fit ``nodes`` or each other, or would lose work on SLURM.
    """
    checkpoint = config.checkpoint
    load = checkpoint.load or str(run)
    if checkpoint.finetune and checkpoint.load is None:
        raise UserError("--finetune needs the directory of the checkpoint to start from; give it with --load")
    grace = checkpoint.exit_grace_seconds or float(site.save_seconds)
    ours: CheckpointConfig = replace(checkpoint, save=str(run), load=load, exit_grace_seconds=grace)
    logging = config.logging
    if logging.output_dir:  # absolute, since --status reads it from any directory
        output = Path(os.path.abspath((directory or Path.cwd()) / logging.output_dir))
        logging = replace(logging, output_dir=str(output))
    config = resolve(replace(config, checkpoint=ours, logging=logging), world_size=nodes * site.gpus_per_node)
    if not (config.data.data_path or config.data.train_data_path):
        raise UserError(
            "without training data the job would end at once; give --data-path or --train-data-path"
        )
    if checkpoint.save_interval is None:
        raise UserError(
            "--save-interval is not set, so the loss of a node would lose all training; set it to the number "
            "of steps that you can afford to repeat"
        )
    return config


def check_memory(config: Config, world_size: int, limit_gib: float | None) -> float:
    """The planner's estimate of the memory of the fullest rank, in GiB.

    Raises:
        UserError: it exceeds ``limit_gib``.
    """
    # Imported late: Megatron-core takes seconds, and --help and wrong options don't need it.
    from megatron_mesh.planner.dry_run import with_vocabulary
    from megatron_mesh.planner.plan import make_plan

    plan = make_plan(resolve(with_vocabulary(config), world_size=world_size), world_size)
    gib = max(rank.memory.total for rank in plan.ranks) / 2**30
    if limit_gib is not None and gib > limit_gib:
        raise UserError(
            f"the fullest rank needs about {gib:.1f} GiB, more than --gpu-memory-gib {limit_gib:g}; use more "
            "tensor or pipeline parallelism or recomputation; tools/inspect_config.py --suggest lists "
            "layouts that fit"
        )
    return gib


def check_not_submitted(run: Path) -> None:
    """Raise UserError if ``run`` was submitted before."""
    if slurm_directory(run).exists():
        raise UserError(
            f"{run} was submitted before; resume it with --requeue {run}, change its nodes or settings with "
            f"--change {run}, or start another run with another --save"
        )


def write_job_files(config: Config, run: Path, site: Site, script: str, *, with_code: bool = True) -> None:
    """Write the files of a job into the empty directory ``RUN/slurm``."""
    target = slurm_directory(run)
    if with_code:
        copy_code(target / CODE_FOLDER)
    for name in _SHELL_FILES:
        shutil.copy(Path(__file__).with_name(name), target)
    shutil.copy(site.path, target / SITE_FILE)
    (target / CONFIG_FILE).write_text(dump_config(config), encoding="utf-8")
    (target / VERSION_FILE).write_text(f"{_version()}\n", encoding="utf-8")
    (target / BATCH_SCRIPT).write_text(script, encoding="utf-8")


def write_and_submit(config: Config, run: Path, site: Site, request: JobRequest) -> list[str]:
    """Write ``RUN/slurm``, submit the jobs and return their numbers. On an error nothing is left behind.

    Raises:
        UserError: SLURM refuses the jobs, or the directory cannot be written.
    """
    script = batch_script(run, config.checkpoint.load, site, request)
    with new_directories(slurm_directory(run)):
        write_job_files(config, run, site, script)
        return submit_and_record(slurm_directory(run) / BATCH_SCRIPT, request.chain, lambda jobs: {run: jobs})


def submit_and_record(
    script: Path, chain: int, runs: Callable[[list[str]], dict[Path, list[str]]]
) -> list[str]:
    """Submit jobs and record them in their runs. Jobs that cannot be recorded are cancelled.

    Args:
        runs: returns the numbers to record for each run, given the submitted jobs.
    """
    jobs = submit(script, chain)
    try:
        for run, theirs in runs(jobs).items():
            record_jobs(run, theirs)
    except BaseException as error:  # Ctrl-C too
        cancel_jobs(jobs)
        if isinstance(error, OSError):
            raise write_error(script.parent, error) from None
        raise
    return jobs


def record_jobs(run: Path, jobs: Sequence[str]) -> None:
    """Append jobs to the run's list of jobs."""
    with (slurm_directory(run) / JOBS_FILE).open("a", encoding="utf-8") as file:
        file.writelines(f"{job}\n" for job in jobs)


@contextmanager
def new_directories(*targets: Path) -> Iterator[None]:
    """Create directories; if the body fails, remove them, their contents and parents created for them.

    Raises:
        UserError: the disk is full, a directory cannot be written, or another process has just created it.
    """
    made: list[Path] = []
    try:
        for target in targets:
            for path in (*reversed(target.parents), target):
                if path == target or not path.exists():
                    path.mkdir(exist_ok=path != target)
                    made.append(path)
        yield
    except BaseException as error:
        for path in reversed(made):
            if path in targets:
                shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):  # another process may have put something there
                path.rmdir()
        if isinstance(error, OSError):
            raise write_error(targets[0], error) from None
        raise


def write_error(target: Path, error: OSError) -> UserError:
    """The error for a run's directory that cannot be written."""
    return UserError(
        f"{error.filename or target} cannot be written ({error.strerror}); nothing was submitted; "
        "free space or fix permissions, or choose another --save"
    )


def copy_code(target: Path) -> None:
    """Copy the package and ``pretrain_mesh.py`` as they are now, including uncommitted changes."""
    target.mkdir()
    shutil.copy(_ROOT / "pretrain_mesh.py", target)
    for path in sorted(_PACKAGE.rglob("*")):  # not copytree, which collects many errors into one
        copy = target / path.relative_to(_ROOT)
        if "__pycache__" in path.parts:
            continue
        if path.is_dir():
            copy.mkdir()
        else:
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)


def _version() -> str:
    """The commit if this is a clone, otherwise the package's version."""
    if not (_ROOT / ".git").exists():  # an environment inside some other repository is not a clone of ours
        return megatron_mesh.__version__
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return megatron_mesh.__version__
    return ended.stdout.strip() if ended.returncode == 0 else megatron_mesh.__version__
