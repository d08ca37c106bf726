#!/usr/bin/env python
"""Plan a run from its settings alone, without GPU or data: memory, traffic, schedule, checkpoints.

    python tools/inspect_config.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml \\
        --nodes 4 --gpus-per-node 8 --tensor-model-parallel-size 2 --sequence-parallel \\
        --pipeline-model-parallel-size 4 --use-distributed-optimizer --figure schedule.png
    python tools/inspect_config.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml \\
        --nodes 4 --suggest

Besides the options below, it takes every setting of pretrain_mesh.py.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_mesh import command
from megatron_mesh.errors import UserError

if TYPE_CHECKING:
    from megatron_mesh.config.schema import Config


@dataclass
class CheckpointOptions:
    """Write speeds, to estimate how long a save takes."""

    disk_gb_per_s: float = 5.0
    """GB/s that the shared file system takes from all ranks together."""
    rank_disk_gb_per_s: float = 0.4
    """GB/s that one rank writes to a checkpoint, with checksums."""


@dataclass
class SuggestionOptions:
    """Suggest rank layouts. The defaults are for H100 SXM nodes with one 400 Gbit/s port per GPU."""

    suggest: bool = False
    """List the rank layouts that fit, fastest first by a model of their speed."""
    gpu_memory_gib: float = 76.0
    """Memory of a GPU that the run may use, in GiB."""
    tflops: float = 400.0
    """TFLOP/s that a GPU sustains in a layer (data sheet: 989)."""
    node_gb_per_s: float = 300.0
    """GB/s that a GPU sends within its node (data sheet: 450)."""
    network_gb_per_s: float = 40.0
    """GB/s that a GPU sends to other nodes (data sheet: 50)."""


@dataclass
class Options:
    """Options of the plan."""

    checkpoint: CheckpointOptions
    suggestion: SuggestionOptions
    nodes: int = 1
    """Nodes of the cluster."""
    gpus_per_node: int = 8
    """GPUs of a node."""
    figure: Path | None = None
    """Write a picture of the schedule to this PNG file. (default: none)"""


def main(options: Options, settings: list[str]) -> None:
    """Print the plan of the rank layout in the settings, or suggest layouts."""
    for group in (options, options.checkpoint, options.suggestion):
        for each in fields(group):
            value = getattr(group, each.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise UserError(f"--{each.name.replace('_', '-')} {value} must be above 0")
    from megatron_mesh.arguments import parse_args

    config = parse_args(settings, prog="inspect_config.py").config
    if options.suggestion.suggest:
        _print_suggestions(config, options)
    else:
        _print_plan(config, options)


def _print_plan(config: "Config", options: Options) -> None:
    from megatron_mesh.config.resolve import resolve

    world_size = options.nodes * options.gpus_per_node
    config = resolve(config, world_size=world_size)
    # Megatron-core takes seconds to import, and mistakes in the settings don't need it.
    from megatron_mesh.planner.figure import save_schedule
    from megatron_mesh.planner.plan import make_plan
    from megatron_mesh.planner.rank_memory import Disk
    from megatron_mesh.planner.text import plan_text, with_vocabulary

    # If the tokenizer decides the vocabulary, that must fit the rank layout as well.
    plan = make_plan(resolve(with_vocabulary(config), world_size=world_size), world_size)
    disk = Disk(options.checkpoint.disk_gb_per_s, options.checkpoint.rank_disk_gb_per_s)
    print(plan_text(plan, disk, options.gpus_per_node))
    if options.figure is not None:
        save_schedule(plan, options.figure)
        print(f"\nwrote {options.figure}")


def _print_suggestions(config: "Config", options: Options) -> None:
    from rich.console import Console

    from megatron_mesh.planner.schedule import Hardware
    from megatron_mesh.planner.suggest import suggest
    from megatron_mesh.planner.text import suggestions_text, with_vocabulary

    given = options.suggestion
    hardware = Hardware(
        options.nodes, options.gpus_per_node, given.tflops, given.node_gb_per_s, given.network_gb_per_s
    )
    console = Console(stderr=True)
    with console.status("comparing rank layouts"):
        found = suggest(with_vocabulary(config), hardware, round(given.gpu_memory_gib * 2**30))
    print(suggestions_text(found, hardware, given.gpu_memory_gib))


if __name__ == "__main__":
    command.run(main)
