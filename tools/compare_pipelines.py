#!/usr/bin/env python
"""The ring pipeline beside the loop on one stage, and beside a copy of the core per iteration.

python tools/compare_pipelines.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml \\
    --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4 \\
    --use-distributed-optimizer --gpus 8 32 128 512

prints a Markdown table; everything in it is computed from the settings (see inspect_config.py), with the same
global batch for all. It takes every setting of pretrain_mesh.py.
"""

import argparse
import sys
from collections.abc import Sequence

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.derived import layout
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error


def main(argv: Sequence[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="compare_pipelines.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[8, 32, 128, 512], help="sizes of the cluster (%(default)s)"
    )
    options, settings = parser.parse_known_args(argv)
    config = parse_args(settings, prog=parser.prog).config
    configs = [(gpus, _comparable(resolve(config, world_size=gpus))) for gpus in options.gpus]
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    from megatron_mesh.planner.compare import comparison_table

    print(comparison_table(configs))


def _comparable(config: Config) -> Config:
    """Refuse what has no ring, or cannot be dealt out as copies."""
    ranks, model = config.parallel.pipeline_model_parallel_size, config.model
    if ranks == 1 or not SCHEMES[model.recurrence].shared_core:
        raise UserError(
            "there is nothing to compare without a shared core and a pipeline; take a looped model and "
            "--pipeline-model-parallel-size above 1"
        )
    depth = layout(model).depth
    if depth % ranks:
        near = [n for n in range(2, depth + 1) if depth % n == 0]
        raise UserError(
            f"--pipeline-model-parallel-size {ranks} does not divide the {depth} unrolled layers, which the "
            f"copies need; take one of {', '.join(map(str, near))}"
        )
    return config


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
