#!/usr/bin/env python
"""Plan a run from its settings alone: memory, traffic, schedule and checkpoints.

    python tools/inspect_config.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml \\
        --nodes 4 --gpus-per-node 8 --tensor-model-parallel-size 2 --sequence-parallel \\
        --pipeline-model-parallel-size 4 --use-distributed-optimizer --figure schedule.png
    python tools/inspect_config.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml \\
        --nodes 4 --suggest

This needs no GPU and no data. Accepts all settings of pretrain_mesh.py besides the options below.
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
    """Write speed of the shared file system, for all ranks together."""
    rank_disk_gb_per_s: float = 0.4
    """Speed at which one rank writes a checkpoint, checksums included."""


@dataclass
class SuggestionOptions:
    """Suggest rank layouts. The defaults are for H100 SXM nodes with one 400 Gbit/s port per GPU."""

    suggest: bool = False
    """List the rank layouts that fit, in the order of their estimated step times."""
    gpu_memory_gib: float = 76.0
    """Memory that the run may use on each GPU."""
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
    """Number of nodes."""
    gpus_per_node: int = 8
    """Number of GPUs in each node."""
    figure: Path | None = None
    """Write a picture of the schedule to this PNG file. (default: none)"""


def main(options: Options, settings: list[str]) -> None:
    """Print the plan of the rank layout that the settings describe, or suggest rank layouts."""
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
    # Importing Megatron-core takes seconds, so mistakes in the settings are reported before it.
    from megatron_mesh.planner.figure import save_schedule
    from megatron_mesh.planner.plan import make_plan
    from megatron_mesh.planner.rank_memory import Disk
    from megatron_mesh.planner.text import plan_text, with_vocabulary

    # If the tokenizer determines the size of the vocabulary, check that it fits the rank layout too.
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
