#!/usr/bin/env python
"""Train on SLURM: check a plan and submit it, look at runs, put one back in the queue, change or cancel it.

Submit. Besides the options below, it takes every setting of pretrain_mesh.py. --save is the run's directory,
on a file system that all nodes share:

  python tools/submit_slurm.py --site my_site.sh --nodes 4 --gpu-memory-gib 76 --save /scratch/me/run1 \\
      --config examples/configs/pythia-1.4b.yaml --data-path my_corpus_text_document \\
      --save-interval 500 --dry-run

Without --dry-run the code and the settings are copied to RUN/slurm, and the job is submitted. It saves
before its time is up and requeues itself until the run is done. Where users may not requeue, use a chain of
jobs. A sweep submits one array of jobs, with a run for each value in a directory of its own under --save:

  python tools/submit_slurm.py --site my_site.sh --nodes 4 --chain 5 --save /scratch/me/run1 ...
  python tools/submit_slurm.py --site my_site.sh --sweep seed=1,2,3 --save /scratch/me/sweep ...

Later (a sweep's directory stands for all of its runs):

  python tools/submit_slurm.py --status /scratch/me/run1 /scratch/me/sweep
  python tools/submit_slurm.py --follow /scratch/me/run1
  python tools/submit_slurm.py --requeue /scratch/me/run1
  python tools/submit_slurm.py --change /scratch/me/run1 --nodes 8 --lr 1e-4
  python tools/submit_slurm.py --cancel /scratch/me/run1
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
# The code that is submitted is this clone's, even if the environment has another one installed.
sys.path.insert(0, str(_ROOT))

from megatron_mesh.arguments import parse_args  # noqa: E402
from megatron_mesh.errors import UserError  # noqa: E402
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error  # noqa: E402
from megatron_mesh.slurm import actions, status  # noqa: E402
from megatron_mesh.slurm.actions import run_directory  # noqa: E402
from megatron_mesh.slurm.change import Wanted, make_change, plan_change  # noqa: E402
from megatron_mesh.slurm.commands import seconds_to_leave, tell_unused_options  # noqa: E402
from megatron_mesh.slurm.follow import follow  # noqa: E402
from megatron_mesh.slurm.script import Shape, array_script, batch_script, folder, save_note  # noqa: E402
from megatron_mesh.slurm.site import Site, read_site  # noqa: E402
from megatron_mesh.slurm.submission import (  # noqa: E402
    check_clone,
    check_memory,
    check_new,
    prepared,
    write_and_submit,
)
from megatron_mesh.slurm.sweep import elements, runs_in, write_and_submit_sweep  # noqa: E402

_FOR_NEW_RUNS = ("site", "nodes", "gpus_per_node", "time", "gpu_memory_gib", "sweep", "at_once", "dry_run")
_FOR_CHANGES = ("site", "nodes", "gpus_per_node", "time", "gpu_memory_gib", "dry_run")


def main(argv: Sequence[str]) -> None:
    """Do what the command line says."""
    parser = _parser()
    options, settings = parser.parse_known_args(argv)
    _check_options(options, settings)
    if options.status is not None:
        _show(_runs(options.status), options.json)
    elif options.follow is not None:
        with suppress(KeyboardInterrupt):
            for text in follow(_one_run(options.follow)):
                print(text, end="", flush=True)
    elif options.requeue is not None:
        _act(_runs(options.requeue), functools.partial(actions.requeue, chain=options.chain or 1))
    elif options.cancel is not None:
        _act(_runs(options.cancel), actions.cancel)
    elif options.change is not None:
        _change(options, settings, parser.prog)
    else:
        check_clone(_ROOT)
        _submit(options, settings, parser.prog)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit_slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("runs that have been submitted")
    later = group.add_mutually_exclusive_group()
    runs = functools.partial(later.add_argument, type=Path, metavar="RUN", nargs="+")
    runs("--status", help="show the state of a run, or a table for several")
    later.add_argument(
        "--follow", type=Path, metavar="RUN", help="print the log of its job until the job ends"
    )
    runs("--requeue", help="save, and put a run back in the queue")
    later.add_argument("--change", type=Path, metavar="RUN", help="give a run other nodes or settings")
    runs("--cancel", help="cancel the jobs of a run")
    group.add_argument("--json", action="store_true", help="with --status: a list of objects")
    group = parser.add_argument_group("a new run, or a change")
    group.add_argument("--site", type=Path, help="the site's choices: a copy of examples/slurm/site.sh")
    group.add_argument("--nodes", type=int, help="nodes of the job (default: 1)")
    group.add_argument("--gpus-per-node", type=int, help="GPUs of each (default: GPUS_PER_NODE of the site)")
    group.add_argument("--time", help="time limit of a job (default: TIME_LIMIT of the site)")
    group.add_argument("--gpu-memory-gib", type=float, help="refuse a plan that needs more of a GPU")
    group.add_argument("--chain", type=int, metavar="N", help="jobs that resume the run one after another")
    group.add_argument(
        "--sweep",
        action="append",
        metavar="NAME=V1,V2",
        help="one run for each value, as an array; several sweeps make the product",
    )
    group.add_argument(
        "--at-once", type=int, metavar="N", help="with --sweep: run at most N of them at a time"
    )
    group.add_argument(
        "--dry-run", action="store_true", help="print the batch script or the change; do nothing"
    )
    return parser


def _check_options(options: argparse.Namespace, settings: Sequence[str]) -> None:
    """Refuse numbers that are not above 0, and options that the command would ignore."""
    for name in ("chain", "nodes", "gpus_per_node", "gpu_memory_gib", "at_once"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"{_flag(name)} {value} must be above 0")
    for command in ("status", "follow", "requeue", "cancel", "change"):
        if getattr(options, command) is None:
            continue
        allowed = _FOR_CHANGES if command == "change" else ()
        given = [_flag(name) for name in _FOR_NEW_RUNS if getattr(options, name) and name not in allowed]
        given += [] if command == "change" else settings
        if options.chain is not None and command not in ("requeue", "change"):
            given.append("--chain")
        if given:
            raise UserError(f"{given[0]} is for a new run, not for --{command}; leave it out")
    if options.json and options.status is None:
        raise UserError("--json goes with --status")
    if options.at_once and not options.sweep:
        raise UserError("--at-once goes with --sweep")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _runs(paths: Sequence[Path]) -> list[Path]:
    return [run for path in paths for run in runs_in(run_directory(path))]


def _one_run(path: Path) -> Path:
    run, *others = _runs([path])
    if others:
        raise UserError(f"{path} is a sweep; name one of its runs, such as {run}")
    return run


def _act(runs: Sequence[Path], action: Callable[[Path], str]) -> None:
    """Do it for every run, whatever happens with the others; exit status 2 if it failed for one of them."""
    if len(runs) == 1:
        print(action(runs[0]))
        return
    failed = False
    for run in runs:
        try:
            print(action(run))
        except actions.AlreadyDone as done:
            print(done)
        except UserError as error:
            print(f"error: {run}: {error}", file=sys.stderr)
            failed = True
    if failed:
        sys.exit(2)


def _show(runs: Sequence[Path], as_json: bool) -> None:
    found = status.statuses(runs)
    if as_json:
        print(status.as_json(found))
    else:
        print(status.as_text(found[0]) if len(found) == 1 else status.as_table(found))


def _change(options: argparse.Namespace, settings: Sequence[str], prog: str) -> None:
    wanted = Wanted(
        settings, options.site, options.nodes, options.gpus_per_node, options.time, options.chain or 1
    )
    change = plan_change(_one_run(options.change), wanted, prog)
    gib = check_memory(change.config, change.shape.nodes * change.site.gpus_per_node, options.gpu_memory_gib)
    print(f"the fullest rank needs about {gib:.1f} GiB", file=sys.stderr)
    for line in change.differences:
        print(line)
    if not options.dry_run:
        tell_unused_options()
        print(make_change(change))


def _submit(options: argparse.Namespace, settings: Sequence[str], prog: str) -> None:
    if options.site is None:
        raise UserError("--site is missing; copy examples/slurm/site.sh, fill it in and give its path")
    site = read_site(options.site)
    site = replace(
        site,
        gpus_per_node=options.gpus_per_node or site.gpus_per_node,
        time_limit=options.time or site.time_limit,
    )
    config = parse_args(settings, prog=prog).config
    if config.checkpoint.save is None:
        raise UserError("--save is missing: the run's directory, on a file system that all nodes share")
    run = run_directory(Path(config.checkpoint.save))
    check_new(run)
    shape = Shape(options.nodes or 1, options.chain or 1)
    jobs = _sweep(options, settings, prog, run, site, shape) if options.sweep else None
    if jobs is None:
        config = prepared(config, run, site, shape.nodes)
        script = batch_script(run, config.checkpoint.load, site, shape)
        _tell_memory(check_memory(config, shape.nodes * site.gpus_per_node, options.gpu_memory_gib))
        if options.dry_run:
            print(script, end="")
            return
        _tell_before_submission(site)
        jobs = write_and_submit(config, run, site, shape)
    if jobs:
        print(f"submitted job {', '.join(jobs)}; {prog} --status {run} shows its state")


def _sweep(
    options: argparse.Namespace, settings: Sequence[str], prog: str, top: Path, site: Site, shape: Shape
) -> list[str]:
    """Submit a sweep; its arrays' numbers, or none after a dry run."""
    found = elements(options.sweep, settings, top, site, shape.nodes, prog)
    shape = replace(shape, code=folder(top) / "code")
    world = shape.nodes * site.gpus_per_node
    _tell_memory(max(check_memory(each.config, world, options.gpu_memory_gib) for each in found))
    if options.dry_run:
        for each in found:
            print(f"# {each.run}")
        print(array_script(top, len(found), site, shape, options.at_once))
        print("# Each run has a script of its own, which the array's script starts. That of the first is:")
        first = found[0]
        print(batch_script(first.run, first.config.checkpoint.load, site, shape), end="")
        return []
    _tell_before_submission(site)
    return write_and_submit_sweep(found, top, site, shape, options.at_once)


def _tell_memory(gib: float) -> None:
    print(f"the fullest rank needs about {gib:.1f} GiB", file=sys.stderr)


def _tell_before_submission(site: Site) -> None:
    tell_unused_options()
    note = save_note(site, seconds_to_leave(site.partition))
    if note:
        print(f"note: {note}", file=sys.stderr)


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
