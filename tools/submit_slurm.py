#!/usr/bin/env python
"""Train on SLURM: check a plan and submit it, look at a run, put one back in the queue.

Submit; beside the options below it takes every setting of pretrain_mesh.py, and --save is the run's
directory, on a file system that all nodes share:

  python tools/submit_slurm.py --site my_site.sh --nodes 4 --gpu-memory-gib 76 --save /scratch/me/run1 \\
      --config examples/configs/pythia-1.4b-mesh.yaml --data-path my_corpus_text_document \\
      --save-interval 500 --dry-run

Without --dry-run the code and the settings are copied to RUN/slurm, and the job is submitted. It saves
before its time is up and requeues itself until the run is done. Where users may not requeue, a chain of jobs
does the same:

  python tools/submit_slurm.py --site my_site.sh --nodes 4 --chain 5 --save /scratch/me/run1 ...

Later:

  python tools/submit_slurm.py --status /scratch/me/run1
  python tools/submit_slurm.py --requeue /scratch/me/run1
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_mesh.arguments import parse_args
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error
from megatron_mesh.slurm.commands import seconds_to_leave
from megatron_mesh.slurm.site import read_site
from megatron_mesh.slurm.status import requeue, run_directory, status_text
from megatron_mesh.slurm.submission import (
    batch_script,
    check_memory,
    check_new,
    prepared,
    save_note,
    write_and_submit,
)


def main(argv: Sequence[str]) -> None:
    """Do what the command line says."""
    parser = _parser()
    options, settings = parser.parse_known_args(argv)
    if options.chain < 1:
        raise UserError(f"--chain {options.chain} must be above 0")
    for run in (options.status, options.requeue):
        if run is not None and settings:
            raise UserError(f"{settings[0]} is for a new run, and {run} has its settings; leave it out")
    if options.status is not None:
        print(status_text(run_directory(options.status)))
    elif options.requeue is not None:
        print(requeue(run_directory(options.requeue), options.chain))
    else:
        _submit(options, settings, parser.prog)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="submit_slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    later = parser.add_mutually_exclusive_group()
    later.add_argument("--status", type=Path, metavar="RUN", help="say how a run stands")
    later.add_argument("--requeue", type=Path, metavar="RUN", help="save, and put a run back in the queue")
    group = parser.add_argument_group("a new run")
    group.add_argument("--site", type=Path, help="the site's choices: a copy of examples/slurm/site.sh")
    group.add_argument("--nodes", type=int, default=1, help="nodes of the job (default: %(default)s)")
    group.add_argument("--gpus-per-node", type=int, help="GPUs of each (default: GPUS_PER_NODE of the site)")
    group.add_argument("--time", help="time limit of a job (default: TIME_LIMIT of the site)")
    group.add_argument("--gpu-memory-gib", type=float, help="refuse a plan that needs more of a GPU")
    group.add_argument(
        "--chain", type=int, default=1, metavar="N", help="jobs that go on with the run one after another"
    )
    group.add_argument("--dry-run", action="store_true", help="print the batch script, and do nothing")
    return parser


def _submit(options: argparse.Namespace, settings: Sequence[str], prog: str) -> None:
    if options.site is None:
        raise UserError("--site is missing; copy examples/slurm/site.sh, fill it in and give its path")
    for name in ("nodes", "gpus_per_node", "gpu_memory_gib"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
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
    config = prepared(config, run, site, options.nodes)
    script = batch_script(config, run, site, options.nodes, chained=options.chain > 1)
    gib = check_memory(config, options.nodes * site.gpus_per_node, options.gpu_memory_gib)
    print(f"the fullest rank needs about {gib:.1f} GiB", file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return
    note = save_note(site, seconds_to_leave(site.partition))
    jobs = write_and_submit(config, run, site, script, options.chain)
    if note:
        print(f"note: {note}", file=sys.stderr)
    print(f"submitted job {', '.join(map(str, jobs))}; {prog} --status {run} shows how it stands")


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
