"""A benchmark from settings to results."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from rich.console import Console
from rich.progress import Progress

from megatron_mesh.bench.kept import kept_for_backward
from megatron_mesh.bench.memory import MemoryMeter
from megatron_mesh.bench.output import check_tables, check_writable, make_directory
from megatron_mesh.bench.profile import write_traces
from megatron_mesh.bench.report import Report, Result
from megatron_mesh.bench.settings import Settings, complete
from megatron_mesh.bench.timing import Times, measure
from megatron_mesh.bench.variants import (
    batches_of,
    build_variant,
    kind_of,
    variant_config,
    why_skipped,
)
from megatron_mesh.config.ranges import at_least
from megatron_mesh.config.schema import Config
from megatron_mesh.errors import UserError
from megatron_mesh.model import flops_per_token
from megatron_mesh.model.implementation import choose, parts
from megatron_mesh.runtime import device, ranges
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.runtime.environment import world_size_from_environment
from megatron_mesh.runtime.memory import explain_out_of_memory

logger = logging.getLogger(__name__)


def run(settings: Settings) -> Report:
    """Measure every variant that can run here. One process.

    Raises:
        UserError: settings that do not fit, before anything is built.
        OutOfMemory: with what helps.
    """
    settings = complete(settings, device.has_gpu())
    check(settings)
    assert settings.variants is not None
    skipped = {
        name: reason for name in settings.variants if (reason := why_skipped(name, settings.fp8_recipe))
    }
    for name, reason in skipped.items():
        logger.info("%s is left out: %s", name, reason)
    configs = {n: variant_config(settings, n) for n in settings.variants if n not in skipped}
    if not configs:
        raise UserError(f"--variants: none of them can run here ({'; '.join(skipped.values())}); name others")
    (chosen,) = {choose(config.precision, config.parallel) for config in configs.values()}
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with process_groups(next(iter(configs.values()))), explain_out_of_memory(lambda: _remedies(settings)):
        return Report(settings, _measured(settings, configs), skipped, parts(chosen))


def _measured(settings: Settings, configs: dict[str, Config]) -> dict[str, Result]:
    """Build all variants, let them take turns, and trace them."""
    _start_libraries(torch.bfloat16 if settings.bf16 else torch.float32)
    memory, batches = MemoryMeter(), batches_of(settings)
    variants, kept = [], {}
    for name, config in configs.items():
        with memory.charged(name):
            variant = build_variant(name, config, settings.eager_attention)
            kept[name] = kept_for_backward(variant, batches[0]) if kind_of(name).keeps_states else None
        variants.append(variant)
    marking = ranges.marking() if settings.nvtx else nullcontext()
    with marking, _progress(len(variants) * (settings.warmup + settings.steps)) as on_step:
        times = measure(
            variants,
            batches,
            steps=settings.steps,
            warmup=settings.warmup,
            memory=memory,
            seed=settings.seed,
            on_step=on_step,
        )
    if short := [name for name in configs if memory.retries(name)]:
        logger.warning(
            "memory was full in measured steps of %s and had to be given back first, which takes time: %s",
            ", ".join(short),
            "; ".join(_remedies(settings)),
        )
    if settings.profile is not None:
        for path in write_traces(variants, batches, settings.profile):
            logger.info("wrote %s", path)
    return {
        variant.name: Result(
            parameters=sum(p.numel() for p in variant.model.parameters()),
            kept=kept[variant.name],
            times=times[variant.name],
            flops_per_token=flops_per_token(variant.config.model),
            peak_bytes=memory.peak(variant.name),
            retries=memory.retries(variant.name),
            peak_flops=device.peak_flops(kind_of(variant.name).fp8) if settings.bf16 else None,
        )
        for variant in variants
    }


def _start_libraries(dtype: torch.dtype) -> None:
    """Those for matrices take workspaces when they are first used, which are no variant's memory."""
    x = torch.ones(16, 16, dtype=dtype, device=device.device(), requires_grad=True)
    torch.nn.functional.linear(x, x, x[0]).sum().backward()


def _remedies(settings: Settings) -> list[str]:
    """What helps where all variants share one device."""
    assert settings.variants is not None and settings.micro_batch_size is not None
    found = []
    if len(settings.variants) > 2:
        found.append("compare fewer at a time (--variants base mesh)")
    if settings.micro_batch_size > 1:
        found.append(f"--micro-batch-size {settings.micro_batch_size // 2}")
    if settings.recompute_granularity != "full":
        found.append("--recompute-granularity full")
    return [
        *found,
        "a smaller --shape, fewer --layers or a shorter --seq-length",
        "in training also --tensor-model-parallel-size, which this benchmark of one process has not",
    ]


def check(settings: Settings) -> None:
    """Refuse what ``resolve`` does not see."""
    at_least(1, settings, "steps", "num_micro_batches", "micro_batch_size", "threads")
    at_least(0, settings, "warmup")
    names = settings.variants or ()
    if not names or len(set(names)) < len(names):
        raise UserError("--variants needs at least one name, and each name once; for example plain base mesh")
    for name in names:
        kind_of(name)
    if (processes := world_size_from_environment()) > 1:
        raise UserError(
            f"the benchmark is one process, and this is one of {processes}; start it with plain "
            "python, or with srun --ntasks 1"
        )
    if settings.output is not None:
        check_writable(settings.output)
        check_tables(settings.output)
    if settings.profile is not None:
        make_directory(settings.profile)


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
