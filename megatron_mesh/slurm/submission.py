"""Submit a run: check settings, write code, settings and batch script to ``RUN/slurm``, call sbatch.

Sweeps: one run for each combination of values of some settings, submitted as one job array.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import megatron_mesh
from megatron_mesh.arguments import parse_args
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import CheckpointConfig, Config
from megatron_mesh.config.settings import SETTINGS, dump_config, flag, unknown_setting
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import (
    ARRAY_SCRIPT,
    BATCH_SCRIPT,
    CODE_FOLDER,
    CONFIG_FILE,
    JOBS_FILE,
    SITE_FILE,
    SLURM_FOLDER,
    VERSION_FILE,
)
from megatron_mesh.slurm.commands import cancel_jobs, submit
from megatron_mesh.slurm.script import JobRequest, array_script, batch_script, slurm_directory
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
    from megatron_mesh.planner.plan import make_plan
    from megatron_mesh.planner.text import with_vocabulary

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


_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True)
class Element:
    """One run of a sweep."""

    run: Path
    config: Config


def expand_sweep(
    sweeps: Sequence[str], settings: Sequence[str], top: Path, site: Site, nodes: int, prog: str
) -> list[Element]:
    """The runs of a sweep, each in ``top/NAME=VALUE``, or ``top/NAME=VALUE_NAME=VALUE`` for two settings.

    Args:
        sweeps: texts like ``seed=1,2,3``; several make the product.
        settings: the settings' flags that all runs share.

    Raises:
        UserError: a sweep does not have this form, or the settings of a run are refused.
    """
    axes = [_axis(text) for text in sweeps]
    names = [name for name, _ in axes]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--sweep {name} is given twice; list all values at once: --sweep {name}=1,2,3")
    found = []
    for values in product(*(values for _, values in axes)):
        choice = dict(zip(names, values, strict=True))
        label = "_".join(f"{name}={value}" for name, value in choice.items())
        flags = [word for name, value in choice.items() for word in _flags(name, value)]
        config = _separate_outputs(parse_args([*settings, *flags], prog=prog).config, label, names)
        run = top / label
        try:
            found.append(Element(run, config_for_jobs(config, run, site, nodes)))
        except UserError as error:
            raise UserError(f"{label}: {error}") from None
    return found


def _separate_outputs(config: Config, label: str, names: Sequence[str]) -> Config:
    """Add the run's label to directories and names that runs would share, unless these are swept."""
    logging = config.logging
    outputs: dict[str, Any] = {
        "output_dir": logging.output_dir and str(Path(logging.output_dir, label)),
        "tensorboard_dir": logging.tensorboard_dir and str(Path(logging.tensorboard_dir, label)),
        "wandb_exp_name": logging.wandb_exp_name and f"{logging.wandb_exp_name}-{label}",
    }
    outputs = {name: value for name, value in outputs.items() if name not in names}
    return replace(config, logging=replace(logging, **outputs))


def _axis(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    options = values.split(",")
    if not equals or not all(options):
        raise UserError(f"--sweep {text} is not NAME=VALUE,VALUE; write for example --sweep seed=1,2,3")
    if name not in SETTINGS:
        raise unknown_setting(name, SETTINGS, flag)
    if name == "save":
        raise UserError("--sweep save is not possible; each run gets its own directory under --save")
    for value in options:
        if "/" in value or value.startswith(".") or options.count(value) > 1:
            raise UserError(
                f"--sweep {text}: {value!r} cannot name a run's directory; it has a slash, starts with a dot "
                "or is given twice"
            )
    return name, options


def _flags(name: str, value: str) -> list[str]:
    if SETTINGS[name].type is not bool:
        return [flag(name), value]
    if value not in _BOOLEANS:
        raise UserError(f"--sweep {name}={value}: not a boolean; write true or false")
    return [flag(name if _BOOLEANS[value] else f"no_{name}")]


def write_and_submit_sweep(
    found: Sequence[Element], top: Path, site: Site, request: JobRequest, at_once: int | None
) -> list[str]:
    """Write every run's files, submit an array (or a chain of arrays) and return the arrays' numbers.

    The runs share one copy of the code in ``top/slurm/code``, which is ``request.code``. ``top/slurm/N``
    links to the ``RUN/slurm`` of element N. On an error nothing is left behind.

    Raises:
        UserError: SLURM refuses the array, or the directory cannot be written.
    """
    target = slurm_directory(top)
    scripts = [batch_script(each.run, each.config.checkpoint.load, site, request) for each in found]
    with new_directories(target, *(slurm_directory(each.run) for each in found)):
        copy_code(target / CODE_FOLDER)
        for index, (each, script) in enumerate(zip(found, scripts, strict=True)):
            write_job_files(each.config, each.run, site, script, with_code=False)
            (target / str(index)).symlink_to(Path("..", each.run.name, SLURM_FOLDER))
        script = array_script(top, len(found), site, request, at_once)
        (target / ARRAY_SCRIPT).write_text(script, encoding="utf-8")
        return submit_and_record(
            target / ARRAY_SCRIPT,
            request.chain,
            lambda arrays: {
                each.run: [f"{array}_{index}" for array in arrays] for index, each in enumerate(found)
            },
        )


def runs_in(path: Path) -> list[Path]:
    """The runs in a sweep's directory, in the order of the array; for any other path the path itself."""
    if not (slurm_directory(path) / ARRAY_SCRIPT).is_file():
        return [path]
    links = [
        link
        for link in slurm_directory(path).iterdir()
        if link.name.isdecimal() and (link / BATCH_SCRIPT).is_file()
    ]
    return [path / link.readlink().parent.name for link in sorted(links, key=lambda link: int(link.name))]
