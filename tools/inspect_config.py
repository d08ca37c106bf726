#!/usr/bin/env python
"""Plan a run from its settings alone, without GPU or data: memory, traffic, schedule, checkpoints.

python tools/inspect_config.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml \\
    --nodes 4 --gpus-per-node 8 --tensor-model-parallel-size 2 --sequence-parallel \\
    --pipeline-model-parallel-size 4 --use-distributed-optimizer --figure schedule.png
python tools/inspect_config.py --config examples/configs/pythia-6.9b-5+11R2+5.yaml --nodes 4 --suggest

Beside the options below it takes every setting of pretrain_mesh.py, as that does.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.pipes import closed_pipe_is_no_error

_SPEEDS = {
    "disk_gb_per_s": (5.0, "GB/s that the shared file system takes from all ranks together"),
    "rank_disk_gb_per_s": (0.4, "GB/s of a checkpoint that one rank writes, with checksums"),
}
_SUGGESTIONS = {
    "gpu_memory_gib": (76.0, "memory of a GPU that a run may use, in GiB"),
    "tflops": (400.0, "TFLOP/s that a GPU sustains in a layer (data sheet: 989)"),
    "node_gb_per_s": (300.0, "GB/s that a GPU sends within its node (data sheet: 450)"),
    "network_gb_per_s": (40.0, "GB/s that a GPU sends to other nodes (data sheet: 50)"),
}


def main(argv: Sequence[str]) -> None:
    """Print the plan of the layout that the settings name, or the layouts that fit."""
    parser = _parser()
    options, settings = parser.parse_known_args(argv)
    for name in ("nodes", "gpus_per_node", *_SPEEDS, *_SUGGESTIONS):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)} must be above 0")
    config = parse_args(settings, prog=parser.prog).config
    # Megatron-core takes seconds to import, and --help and mistakes do not need it.
    if options.suggest:
        _print_suggestions(config, options)
    else:
        _print_plan(config, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="inspect_config.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the cluster (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node (default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="write a picture of the schedule to this PNG file")
    _add_numbers(parser.add_argument_group("checkpoints", "for the time that a save takes"), _SPEEDS)
    group = parser.add_argument_group(
        "suggestions", "the defaults are for H100 SXM nodes with one 400 Gbit/s port for each GPU"
    )
    group.add_argument(
        "--suggest", action="store_true", help="rank the layouts that fit by a model of their speed"
    )
    _add_numbers(group, _SUGGESTIONS)
    return parser


def _add_numbers(group: argparse._ArgumentGroup, numbers: Mapping[str, tuple[float, str]]) -> None:
    for name, (default, text) in numbers.items():
        flag = f"--{name.replace('_', '-')}"
        group.add_argument(flag, type=float, default=default, help=f"{text} (default: %(default)s)")


def _print_plan(config: Config, options: argparse.Namespace) -> None:
    world_size = options.nodes * options.gpus_per_node
    config = resolve(config, world_size=world_size)
    from megatron_mesh.planner.dry_run import with_vocabulary
    from megatron_mesh.planner.figure import save_schedule
    from megatron_mesh.planner.report import make_plan
    from megatron_mesh.planner.saving import Disk
    from megatron_mesh.planner.text import plan_text

    # A vocabulary that the tokenizer names must fit the layout as well.
    plan = make_plan(resolve(with_vocabulary(config), world_size=world_size), world_size)
    disk = Disk(options.disk_gb_per_s, options.rank_disk_gb_per_s)
    print(plan_text(plan, disk, options.gpus_per_node))
    if options.figure is not None:
        save_schedule(plan, options.figure)
        print(f"\nwrote {options.figure}")


def _print_suggestions(config: Config, options: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_mesh.planner.dry_run import with_vocabulary
    from megatron_mesh.planner.speed import Hardware
    from megatron_mesh.planner.suggest import suggest
    from megatron_mesh.planner.text import suggestions_text

    hardware = Hardware(
        options.nodes, options.gpus_per_node, options.tflops, options.node_gb_per_s, options.network_gb_per_s
    )
    console = Console(stderr=True)
    with console.status("looking at layouts"):
        found = suggest(with_vocabulary(config), hardware, round(options.gpu_memory_gib * 2**30))
    print(suggestions_text(found, hardware, options.gpu_memory_gib))


if __name__ == "__main__":
    try:
        with closed_pipe_is_no_error():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
