"""A run's directory, made ready for its jobs: code, settings and batch script in ``RUN/slurm``."""

import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import megatron_mesh
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.errors import UserError
from megatron_mesh.slurm.commands import submit
from megatron_mesh.slurm.site import Site, seconds_of

SCRIPT, JOBS, STARTS = "job.sbatch", "jobs.txt", "starts.txt"
_SHELL_FILES = ("job.sh", "task.sh")
_ROOT = Path(megatron_mesh.__file__).resolve().parents[1]
_EXAMPLES = _ROOT / "examples/slurm"


def folder(run: Path) -> Path:
    """Where a run keeps what its jobs need."""
    return run / "slurm"


def prepared(config: Config, run: Path, site: Site, nodes: int) -> Config:
    """The settings as the jobs will have them.

    Raises:
        UserError: they do not fit ``nodes`` or each other, or would lose work on SLURM.
    """
    checkpoint = config.checkpoint
    load = checkpoint.load or str(run)
    if checkpoint.finetune and checkpoint.load is None:
        raise UserError("--finetune starts from a checkpoint's weights; give its directory with --load")
    grace = checkpoint.exit_grace_seconds or float(site.save_seconds)
    ours: CheckpointConfig = replace(checkpoint, save=str(run), load=load, exit_grace_seconds=grace)
    config = resolve(replace(config, checkpoint=ours), world_size=nodes * site.gpus_per_node)
    if not (config.data.data_path or config.data.train_data_path):
        raise UserError(
            "the job would end at once, without training data; give --data-path or --train-data-path"
        )
    if checkpoint.save_interval is None:
        raise UserError(
            "--save-interval is not set, so a lost node would lose everything; a save should come more often "
            "than you would mind to repeat"
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


def batch_script(config: Config, run: Path, site: Site, nodes: int, *, chained: bool) -> str:
    """The text of the batch script.

    Raises:
        UserError: the early warning takes all of the time, or ``run`` cannot stand in a script.
    """
    if not re.fullmatch(r"[\w./+,=@-]+", str(run)):
        raise UserError(f"--save {run}: SLURM's options take no blanks or special characters; rename it")
    if seconds_of(site.time_limit) <= site.warning_seconds:
        raise UserError(
            f"the time limit {site.time_limit} is used up by the early warning, which comes "
            f"{site.warning_seconds} s before (2 x SAVE_SECONDS + 60); raise --time"
        )
    options = [
        f"--job-name={run.name}",
        f"--nodes={nodes}",
        f"--ntasks-per-node={site.gpus_per_node}",
        f"--gpus-per-node={site.gpus_per_node}",
        f"--cpus-per-task={site.cpus_per_task}",
        f"--time={site.time_limit}",
        "--requeue",
        "--open-mode=append",
        f"--signal=B:USR1@{site.warning_seconds}",
        f"--output={folder(run)}/%j.log",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        *site.sbatch_options,
    ]
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options)]
    lines += [f"RUN={run}", "CODE=$RUN/slurm/code", "SITE=$RUN/slurm/site.sh"]
    lines += ['SETTINGS=(--config "$RUN/slurm/config.yaml")']
    if config.checkpoint.load != str(run):
        lines += [f"LOAD={shlex.quote(str(config.checkpoint.load))}"]
    if chained:
        lines += ["REQUEUE=no # the next job of the chain goes on"]
    return "\n".join([*lines, '. "$RUN/slurm/job.sh"', ""])


def check_new(run: Path) -> None:
    """Raise UserError if ``run`` has been submitted before."""
    if folder(run).exists():
        raise UserError(
            f"{run} was submitted before, with code and settings of its own; --requeue {run} goes on with "
            "it, another --save starts another run"
        )


def write_and_submit(config: Config, run: Path, site: Site, script: str, chain: int) -> list[int]:
    """Write ``RUN/slurm`` and submit; the jobs' numbers. A refused submission leaves nothing behind."""
    target = folder(run)
    target.mkdir(parents=True)
    try:
        _copy_code(target / "code")
        for name in _SHELL_FILES:
            shutil.copy(_EXAMPLES / name, target)
        shutil.copy(site.path, target / "site.sh")
        (target / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        (target / "version.txt").write_text(f"{_version()}\n", encoding="utf-8")
        (target / SCRIPT).write_text(script, encoding="utf-8")
        jobs = submit(target / SCRIPT, chain)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    note_jobs(run, jobs)
    return jobs


def note_jobs(run: Path, jobs: list[int]) -> None:
    """Add jobs to the list of those that the run has had."""
    with (folder(run) / JOBS).open("a", encoding="utf-8") as file:
        file.writelines(f"{job}\n" for job in jobs)


def save_note(site: Site, seconds: tuple[int, int]) -> str | None:
    """What to say if a save cannot end in what SLURM leaves a job; ``seconds``: at its end, at preemption."""
    kill_wait, grace = seconds
    if site.save_seconds <= kill_wait:
        return None
    preempted = f", {kill_wait + grace} s at preemption" if grace else ""
    return (
        f"a save takes up to {site.save_seconds} s, and SLURM leaves {kill_wait} s (KillWait){preempted}; "
        "where that is too little, only the checkpoints of --save-interval count, and those of the early "
        f"warning, {math.ceil(site.warning_seconds / 60)} minutes before the time limit"
    )


def _copy_code(target: Path) -> None:
    """The code as it is now, changes that are not committed included."""
    target.mkdir()
    shutil.copy(_ROOT / "pretrain_mesh.py", target)
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_ROOT / "megatron_mesh", target / "megatron_mesh", ignore=without)


def _version() -> str:
    """The commit, if this is a clone, or else the package's version."""
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return megatron_mesh.__version__
    return ended.stdout.strip() if ended.returncode == 0 else megatron_mesh.__version__
