#!/usr/bin/env python
"""Train on SLURM: check a plan and submit it, look at runs, put one back in the queue, change or cancel it.

Submit. Besides the options below, it takes every setting of pretrain_mesh.py. --save is the run's directory,
on a file system that all nodes share:

    python tools/submit_slurm.py --site my_site.sh --nodes 4 --gpu-memory-gib 76 --save /scratch/me/run1 \\
        --config examples/configs/pythia-1.4b.yaml --data-path my_corpus_text_document \\
        --save-interval 500 --dry-run

Without --dry-run, the code and the settings are copied to RUN/slurm and the job is submitted. It saves before
its time is up and requeues itself until the run is done. If users may not requeue jobs, use a chain of jobs.
A sweep submits one array of jobs, with a run for each value in its own directory under --save:

    python tools/submit_slurm.py --site my_site.sh --nodes 4 --chain 5 --save /scratch/me/run1 ...
    python tools/submit_slurm.py --site my_site.sh --sweep seed=1,2,3 --save /scratch/me/sweep ...

Later (a sweep's directory stands for all of its runs):

    python tools/submit_slurm.py --status /scratch/me/run1 /scratch/me/sweep
    python tools/submit_slurm.py --follow /scratch/me/run1
    python tools/submit_slurm.py --requeue /scratch/me/run1
    python tools/submit_slurm.py --change /scratch/me/run1 --nodes 8 --lr 1e-4
    python tools/submit_slurm.py --cancel /scratch/me/run1
"""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

_ABOVE = Path(__file__).resolve().parents[1]
"""The clone, or the package if the tool is installed."""
if (_ABOVE / "megatron_mesh").is_dir():  # submit the clone's code even if another copy is installed
    sys.path.insert(0, str(_ABOVE))

from tyro.conf import UseAppendAction  # noqa: E402

from megatron_mesh import command  # noqa: E402
from megatron_mesh.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from megatron_mesh.slurm.script import JobRequest
    from megatron_mesh.slurm.site import Site

_PROG = "submit_slurm.py"
_FOR_CHANGES = ("site", "nodes", "gpus_per_node", "time", "gpu_memory_gib", "dry_run")


@dataclass
class RunOptions:
    """Runs that have been submitted. Give one of these, with a run's or a sweep's directory."""

    status: tuple[Path, ...] | None = None
    """Show the state of a run, or a table of several."""
    follow: Path | None = None
    """Print the log of the run's job until the job ends."""
    requeue: tuple[Path, ...] | None = None
    """Save, and put the runs back in the queue."""
    change: Path | None = None
    """Give the run other nodes or settings."""
    cancel: tuple[Path, ...] | None = None
    """Cancel the jobs of the runs."""
    json: bool = False
    """With --status: print a list of objects."""


@dataclass
class JobOptions:
    """A new run, or a change of one."""

    site: Path | None = None
    """The site's choices: your copy of examples/slurm/site.sh."""
    nodes: int | None = None
    """Nodes of the job. (default: 1)"""
    gpus_per_node: int | None = None
    """GPUs of a node. (default: GPUS_PER_NODE of the site)"""
    time: str | None = None
    """Time limit of a job. (default: TIME_LIMIT of the site)"""
    gpu_memory_gib: float | None = None
    """Refuse a plan that needs more memory per GPU than this. (default: no limit)"""
    chain: int | None = None
    """Number of jobs that resume the run one after another. (default: 1)"""
    sweep: Annotated[tuple[str, ...], UseAppendAction] = ()
    """NAME=V1,V2: one run for each value, as an array. Several --sweep run every combination."""
    at_once: int | None = None
    """With --sweep: run at most this many at a time. (default: all)"""
    dry_run: bool = False
    """Print the batch script or the change, and do nothing."""


@dataclass
class Options:
    """Options besides the settings of the run."""

    run: RunOptions = field(default_factory=RunOptions)
    job: JobOptions = field(default_factory=JobOptions)


def main(options: Options, settings: list[str]) -> None:
    """Act on submitted runs, or submit a new one."""
    _check_options(options.run, options.job, settings)
    from megatron_mesh.slurm import actions
    from megatron_mesh.slurm.follow import follow
    from megatron_mesh.slurm.submission import check_clone

    run, job = options.run, options.job
    if run.status is not None:
        _show(_runs(run.status), run.json)
    elif run.follow is not None:
        with suppress(KeyboardInterrupt):
            for text in follow(_one_run(run.follow)):
                print(text, end="", flush=True)
    elif run.requeue is not None:
        _act(_runs(run.requeue), functools.partial(actions.requeue, chain=job.chain or 1))
    elif run.cancel is not None:
        _act(_runs(run.cancel), actions.cancel)
    elif run.change is not None:
        _change(run.change, job, settings)
    else:
        check_clone(_ABOVE)
        _submit(job, settings)


def _check_options(run: RunOptions, job: JobOptions, settings: Sequence[str]) -> None:
    """Refuse numbers that are not above 0, and options that the command would ignore."""
    for name in ("chain", "nodes", "gpus_per_node", "gpu_memory_gib", "at_once"):
        value = getattr(job, name)
        if value is not None and not value > 0:
            raise UserError(f"{_flag(name)} {value} must be above 0")
    actions = ("status", "follow", "requeue", "cancel", "change")
    commands = [name for name in actions if getattr(run, name) is not None]
    if len(commands) > 1:
        raise UserError(f"{' and '.join(map(_flag, commands))} cannot be combined; give one of them")
    for command_name in commands:
        if getattr(run, command_name) == ():
            raise UserError(f"{_flag(command_name)} needs at least one run's directory")
        allowed = {"change": (*_FOR_CHANGES, "chain"), "requeue": ("chain",)}.get(command_name, ())
        given = [_flag(name) for name, value in vars(job).items() if value and name not in allowed]
        given += [] if command_name == "change" else settings
        if given:
            raise UserError(f"{given[0]} is for a new run, not for {_flag(command_name)}; leave it out")
    if run.json and run.status is None:
        raise UserError("--json goes with --status")
    if job.at_once and not job.sweep:
        raise UserError("--at-once goes with --sweep")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _runs(paths: Sequence[Path]) -> list[Path]:
    from megatron_mesh.slurm.actions import run_directory
    from megatron_mesh.slurm.submission import runs_in

    return [run for path in paths for run in runs_in(run_directory(path))]


def _one_run(path: Path) -> Path:
    run, *others = _runs([path])
    if others:
        raise UserError(f"{path} is a sweep; name one of its runs, such as {run}")
    return run


def _act(runs: Sequence[Path], action: Callable[[Path], str]) -> None:
    """Do it for every run, even if it fails for others; then the exit status is 2."""
    from megatron_mesh.slurm import actions

    if len(runs) == 1:
        print(action(runs[0]))
        return
    failed = False
    for run in runs:
        try:
            print(action(run))
        except actions.RunAlreadyDone as done:
            print(done)
        except UserError as error:
            print(f"error: {run}: {error}", file=sys.stderr)
            failed = True
    if failed:
        sys.exit(2)


def _show(runs: Sequence[Path], as_json: bool) -> None:
    from megatron_mesh.slurm import status

    found = status.read_statuses(runs)
    if as_json:
        print(status.as_json(found))
    else:
        print(status.as_text(found[0]) if len(found) == 1 else status.as_table(found))


def _change(run: Path, options: JobOptions, settings: Sequence[str]) -> None:
    from megatron_mesh.slurm.actions import ChangeRequest, apply_change, plan_change
    from megatron_mesh.slurm.commands import warn_about_unused_options
    from megatron_mesh.slurm.submission import check_memory

    wanted = ChangeRequest(
        settings, options.site, options.nodes, options.gpus_per_node, options.time, options.chain or 1
    )
    change = plan_change(_one_run(run), wanted, _PROG)
    gib = check_memory(
        change.config, change.request.nodes * change.site.gpus_per_node, options.gpu_memory_gib
    )
    print(f"the fullest rank needs about {gib:.1f} GiB", file=sys.stderr)
    for line in change.differences:
        print(line)
    if not options.dry_run:
        warn_about_unused_options()
        print(apply_change(change))


def _submit(options: JobOptions, settings: Sequence[str]) -> None:
    from megatron_mesh.arguments import parse_args
    from megatron_mesh.slurm.actions import run_directory
    from megatron_mesh.slurm.script import JobRequest, batch_script
    from megatron_mesh.slurm.site import TEMPLATE, read_site
    from megatron_mesh.slurm.submission import (
        check_memory,
        check_not_submitted,
        config_for_jobs,
        write_and_submit,
    )

    if options.site is None:
        raise UserError(f"--site is missing; copy {TEMPLATE}, fill it in and give the copy's path")
    site = read_site(options.site)
    site = replace(
        site,
        gpus_per_node=options.gpus_per_node or site.gpus_per_node,
        time_limit=options.time or site.time_limit,
    )
    config = parse_args(settings, prog=_PROG).config
    if config.checkpoint.save is None:
        raise UserError("--save is missing: the run's directory, on a file system that all nodes share")
    run = run_directory(Path(config.checkpoint.save))
    check_not_submitted(run)
    request = JobRequest(options.nodes or 1, options.chain or 1)
    jobs = _sweep(options, settings, run, site, request) if options.sweep else None
    if jobs is None:
        config = config_for_jobs(config, run, site, request.nodes)
        script = batch_script(run, config.checkpoint.load, site, request)
        _print_memory(check_memory(config, request.nodes * site.gpus_per_node, options.gpu_memory_gib))
        if options.dry_run:
            print(script, end="")
            return
        _print_notes(site)
        jobs = write_and_submit(config, run, site, request)
    if jobs:
        print(f"submitted job {', '.join(jobs)}; {_PROG} --status {run} shows its state")


def _sweep(
    options: JobOptions, settings: Sequence[str], top: Path, site: "Site", request: "JobRequest"
) -> list[str]:
    """Submit a sweep; return its arrays' numbers, or none after a dry run."""
    from megatron_mesh.runtime.run_files import CODE_FOLDER
    from megatron_mesh.slurm.script import array_script, batch_script, slurm_directory
    from megatron_mesh.slurm.submission import check_memory, expand_sweep, write_and_submit_sweep

    found = expand_sweep(options.sweep, settings, top, site, request.nodes, _PROG)
    request = replace(request, code=slurm_directory(top) / CODE_FOLDER)
    world = request.nodes * site.gpus_per_node
    _print_memory(max(check_memory(each.config, world, options.gpu_memory_gib) for each in found))
    if options.dry_run:
        for each in found:
            print(f"# {each.run}")
        print(array_script(top, len(found), site, request, options.at_once))
        print("# The array's script starts the script of each run. This is the first run's:")
        first = found[0]
        print(batch_script(first.run, first.config.checkpoint.load, site, request), end="")
        return []
    _print_notes(site)
    return write_and_submit_sweep(found, top, site, request, options.at_once)


def _print_memory(gib: float) -> None:
    print(f"the fullest rank needs about {gib:.1f} GiB", file=sys.stderr)


def _print_notes(site: "Site") -> None:
    from megatron_mesh.slurm.commands import kill_wait_and_grace, warn_about_unused_options
    from megatron_mesh.slurm.script import slow_save_note

    warn_about_unused_options()
    note = slow_save_note(site, kill_wait_and_grace(site.partition))
    if note:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    command.run(main)
