#!/usr/bin/env python
"""Compare the ring with running the whole loop on one stage, and with a copy of the core for each loop.

    python tools/compare_pipelines.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml \\
        --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 4 \\
        --use-distributed-optimizer --gpus 8 32 128 512

Prints a Markdown table. The numbers are computed from the settings, as in inspect_config.py, with the same
global batch for all three pipelines. Accepts all settings of pretrain_mesh.py.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_mesh import command
from megatron_mesh.errors import UserError

if TYPE_CHECKING:
    from megatron_mesh.config.schema import Config


@dataclass(frozen=True)
class Options:
    """Options besides the settings of pretrain_mesh.py."""

    gpus: tuple[int, ...] = (8, 32, 128, 512)
    """Numbers of GPUs to compare."""


def main(options: Options, settings: list[str]) -> None:
    """Print the table."""
    from megatron_mesh.arguments import parse_args
    from megatron_mesh.config.resolve import resolve

    config = parse_args(settings).config
    configs = [(gpus, _comparable(resolve(config, world_size=gpus))) for gpus in options.gpus]
    # Importing Megatron-core takes seconds, so mistakes in the settings are reported before it.
    from megatron_mesh.planner.compare import comparison_table

    print(comparison_table(configs))


def _comparable(config: "Config") -> "Config":
    """Refuse a run that has no ring, or whose unrolled layers cannot be split evenly for the copies."""
    from megatron_mesh.config.layout import layout
    from megatron_mesh.recurrence import SCHEMES

    ranks, model = config.parallel.pipeline_model_parallel_size, config.model
    if ranks == 1 or not SCHEMES[model.recurrence].shared_core:
        raise UserError(
            f"--recurrence {model.recurrence} with --pipeline-model-parallel-size {ranks} has no ring to "
            "compare; use a looped model and a pipeline of at least 2 ranks"
        )
    depth = layout(model).depth
    if depth % ranks:
        near = [n for n in range(2, depth + 1) if depth % n == 0]
        raise UserError(
            f"--pipeline-model-parallel-size {ranks} does not divide the {depth} unrolled layers, which the "
            f"copies need; use one of {', '.join(map(str, near))}"
        )
    return config


if __name__ == "__main__":
    command.run(main)
