#!/usr/bin/env python
"""Where the ranks of a real pipeline wait, measured, beside what the planner says of the same run.

torchrun --nproc-per-node 2 tools/bench_pipeline.py --config examples/configs/pythia-160m.yaml \\
    --pipeline-model-parallel-size 2 --seq-length 128 --micro-batch-size 1 --global-batch-size 8

Takes every setting of pretrain_mesh.py; data are random. The bubble is the share of the ranks' time in which
they wait, 1 - busy / (ranks x step). All ranks must be on one node.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.environment import rank_from_environment, world_size_from_environment
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Measure and print three numbers."""
    parser = argparse.ArgumentParser(
        prog="bench_pipeline.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, default=10, help="measured steps (default: %(default)s)")
    options, settings = parser.parse_known_args(argv)
    world_size = world_size_from_environment()
    config = parse_args(settings, prog=parser.prog).config
    config = resolve(config, world_size=world_size)
    if config.parallel.pipeline_model_parallel_size == 1:
        raise UserError("there is no pipeline; give --pipeline-model-parallel-size and as many processes")
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    from megatron_mesh.bench.pipeline import measure_bubble
    from megatron_mesh.planner.dry_run import with_vocabulary
    from megatron_mesh.runtime.distributed import process_groups

    config = resolve(with_vocabulary(config), world_size=world_size)
    with process_groups(config):
        found = measure_bubble(config, options.steps)
    if rank_from_environment() == 0:
        print(
            f"bubble measured                        {found.measured:.1%}  (median of {options.steps} steps)"
        )
        print(f"bubble simulated with measured costs   {found.simulated:.1%}")
        print(f"bubble planned, with FLOPs as costs    {found.planned:.1%}")


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        if rank_from_environment() == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
