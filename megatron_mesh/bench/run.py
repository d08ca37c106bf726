"""A benchmark from settings to results."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from megatron_mesh.bench.kept import kept_for_backward
from megatron_mesh.bench.report import Result
from megatron_mesh.bench.settings import PLAIN, Settings
from megatron_mesh.bench.timing import Times, measure
from megatron_mesh.bench.variants import batches_of, build_variant, variant_config
from megatron_mesh.config.ranges import at_least
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES
from megatron_mesh.runtime.distributed import process_groups


def run(settings: Settings) -> dict[str, Result]:
    """Measure every variant; results are in the order of ``settings.variants``. One process.

    Raises:
        UserError: settings that do not fit, before anything is built.
    """
    check(settings)
    configs = {name: variant_config(settings, name) for name in settings.variants}
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with process_groups(configs[settings.variants[0]]):
        variants = [build_variant(name, config) for name, config in configs.items()]
        parameters = {v.name: sum(p.numel() for p in v.stage.modules[0].parameters()) for v in variants}
        batches = batches_of(settings)
        kept = {variant.name: kept_for_backward(variant, batches[0]) for variant in variants}
        with _progress(len(variants) * (settings.warmup + settings.steps)) as on_step:
            times = measure(
                variants,
                batches,
                steps=settings.steps,
                warmup=settings.warmup,
                seed=settings.seed,
                on_step=on_step,
            )
    return {name: Result(parameters[name], kept[name], times[name]) for name in configs}


def check(settings: Settings) -> None:
    """Refuse what ``resolve`` does not see."""
    at_least(1, settings, "steps", "num_micro_batches", "micro_batch_size", "threads")
    at_least(0, settings, "warmup")
    names = settings.variants
    if not names or len(set(names)) < len(names):
        raise UserError("--variants needs at least one name, and each name once; for example plain base mesh")
    for name in names:
        if name not in (PLAIN, *SCHEMES):
            raise UserError(f"--variants {name}: no such variant; there are {PLAIN}, {', '.join(SCHEMES)}")
    if settings.output is not None:
        _check_writable(settings.output)


def _check_writable(output: Path) -> None:
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output} cannot be written; name a file in a directory that exists")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, Times], None]]:
    """Call the result after each step: a bar on a terminal, a line each elsewhere."""
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def on_step(name: str, times: Times) -> None:
            text = f"{name} {times.forward_backward[-1]:.3f} + {times.optimizer[-1]:.3f} s"
            bar.update(task, advance=1, description=text)
            if not console.is_terminal:
                done = bar.tasks[task].completed
                print(f"step {done:.0f}/{total}: {text}", file=sys.stderr, flush=True)

        yield on_step
