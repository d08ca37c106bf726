"""A run's directory, made ready for its jobs: code, settings and batch script in ``RUN/slurm``."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import megatron_mesh
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.errors import UserError
from megatron_mesh.slurm.commands import submit, cancel_jobs
from megatron_mesh.slurm.script import SCRIPT, JobRequest, batch_script, slurm_directory
from megatron_mesh.slurm.site import Site

JOBS, STARTS, SETTINGS_FILE, SITE_FILE = "jobs.txt", "starts.txt", "config.yaml", "site.sh"
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


def config_for_jobs(config: Config, run: Path, site: Site, nodes: int, directory: Path | None = None) -> Config:
    """The settings as the jobs will have them.

    Args:
        directory: working directory of the jobs; None is this process's.

    Raises:
        UserError: they do not fit ``nodes`` or each other, or would lose work on SLURM.
    """
    checkpoint = config.checkpoint
    load = checkpoint.load or str(run)
    if checkpoint.finetune and checkpoint.load is None:
        raise UserError("--finetune starts from a checkpoint's weights; give its directory with --load")
    grace = checkpoint.exit_grace_seconds or float(site.save_seconds)
    ours: CheckpointConfig = replace(checkpoint, save=str(run), load=load, exit_grace_seconds=grace)
    logging = config.logging
    if logging.output_dir:  # --status reads it from anywhere
        output = Path(os.path.abspath((directory or Path.cwd()) / logging.output_dir))
        logging = replace(logging, output_dir=str(output))
    config = resolve(replace(config, checkpoint=ours, logging=logging), world_size=nodes * site.gpus_per_node)
    if not (config.data.data_path or config.data.train_data_path):
        raise UserError(
            "the job would end at once, without training data; give --data-path or --train-data-path"
        )
    if checkpoint.save_interval is None:
        raise UserError(
            "--save-interval is not set, so a lost node would lose everything; save as often as you are "
            "willing to repeat the steps in between"
        )
    return config


def check_memory(config: Config, world_size: int, limit_gib: float | None) -> float:
    """GiB that the fullest rank needs, by the planner.

    Raises:
        UserError: it is more than ``limit_gib``.
    """
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    from megatron_mesh.planner.dry_run import with_vocabulary
    from megatron_mesh.planner.report import make_plan

    plan = make_plan(resolve(with_vocabulary(config), world_size=world_size), world_size)
    gib = max(rank.memory.total for rank in plan.ranks) / 2**30
    if limit_gib is not None and gib > limit_gib:
        raise UserError(
            f"the fullest rank needs about {gib:.1f} GiB of {limit_gib:g}; more tensor or pipeline "
            "parallelism, or recomputation, needs less: tools/inspect_config.py --suggest lists what fits"
        )
    return gib


def check_not_submitted(run: Path) -> None:
    """Raise UserError if ``run`` has been submitted before."""
    if slurm_directory(run).exists():
        raise UserError(
            f"{run} was submitted before, with code and settings of its own; --requeue {run} resumes it, "
            f"--change {run} changes its nodes or settings, another --save starts another run"
        )


def write_job_files(config: Config, run: Path, site: Site, script: str, *, with_code: bool = True) -> None:
    """Write the files of ``RUN/slurm``, an empty directory."""
    target = slurm_directory(run)
    if with_code:
        copy_code(target / "code")
    for name in _SHELL_FILES:
        shutil.copy(Path(__file__).with_name(name), target)
    shutil.copy(site.path, target / SITE_FILE)
    (target / SETTINGS_FILE).write_text(dump_config(config), encoding="utf-8")
    (target / "version.txt").write_text(f"{_version()}\n", encoding="utf-8")
    (target / SCRIPT).write_text(script, encoding="utf-8")


def write_and_submit(config: Config, run: Path, site: Site, request: JobRequest) -> list[str]:
    """Write ``RUN/slurm`` and submit; the jobs' numbers.

    Raises:
        UserError: SLURM refuses, or the directory cannot be written. Then nothing is left behind.
    """
    script = batch_script(run, config.checkpoint.load, site, request)
    with new_directories(slurm_directory(run)):
        write_job_files(config, run, site, script)
        return submit_and_record(slurm_directory(run) / SCRIPT, request.chain, lambda jobs: {run: jobs})


def submit_and_record(
    script: Path, chain: int, runs: Callable[[list[str]], dict[Path, list[str]]]
) -> list[str]:
    """Submit, and add the jobs to the lists of their runs; jobs that cannot be noted are cancelled."""
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
    """Add jobs to the list of those that the run has had."""
    with (slurm_directory(run) / JOBS).open("a", encoding="utf-8") as file:
        file.writelines(f"{job}\n" for job in jobs)


@contextmanager
def new_directories(*targets: Path) -> Iterator[None]:
    """Make directories, and remove them with all that they hold, and new ones above them, if the body fails.

    Raises:
        UserError: the disk is full, a directory cannot be written, or somebody else has just made it.
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
            with suppress(OSError):  # others may have put something there
                path.rmdir()
        if isinstance(error, OSError):
            raise write_error(targets[0], error) from None
        raise


def write_error(target: Path, error: OSError) -> UserError:
    """The error for a directory that cannot be written."""
    return UserError(
        f"{error.filename or target} cannot be written ({error.strerror}); nothing was submitted; "
        "fix that or choose another --save"
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
