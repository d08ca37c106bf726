"""Compare training steps of recurrence schemes, a plain Megatron-core GPT and a loop of Hugging Face layers.

    python -m tools.bench.steps --shape 1.4b --output results.json
    python -m tools.bench.steps --variants base base-compiled mesh mesh-compiled --profile traces

All models live in one process and take turns, one step each. The tables show speed, memory, where the time of
a step goes and what each model saves for its backward pass, as medians and quartiles, and the project's
targets.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from megatron_mesh import command
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import at_least
from megatron_mesh.config.sizes import flops_per_token
from megatron_mesh.errors import UserError
from megatron_mesh.model.implementation import choose, describe_implementation
from megatron_mesh.runtime import device, profiling, strict_json
from megatron_mesh.runtime.distributed import process_groups
from megatron_mesh.runtime.environment import world_size_from_environment
from megatron_mesh.runtime.failures import explain_out_of_memory
from tools.bench.measure import MemoryMeter, Times, measure_steps, saved_for_backward, write_traces
from tools.bench.report import StepReport, VariantResult, check_output_file, report_as_json
from tools.bench.settings import StepSettings, complete, kind_of
from tools.bench.tables import as_markdown, as_tables
from tools.bench.variants import batches_of, build_variant, variant_config, why_skipped

logger = logging.getLogger("megatron_mesh.bench")  # below the logger that command.run shows


def main(settings: StepSettings) -> None:
    """Measure, print the tables and write the files."""
    report = compare_steps(settings)
    Console().print(as_tables(report))
    if settings.output is not None:
        settings.output.write_text(
            strict_json.dumps(report_as_json(report), indent=1) + "\n", encoding="utf-8"
        )
        tables = settings.output.with_suffix(".md")
        tables.write_text(as_markdown(report), encoding="utf-8")
        print(f"wrote {settings.output} and {tables}")


def compare_steps(settings: StepSettings) -> StepReport:
    """Measure every variant that can run on this machine.

    Raises:
        UserError: settings that don't fit each other or the machine, before anything is built.
        OutOfMemory: with remedies.
    """
    settings = complete(settings, device.has_gpu())
    check_settings(settings)
    assert settings.variants is not None
    skipped = {
        name: reason for name in settings.variants if (reason := why_skipped(name, settings.fp8_recipe))
    }
    for name, reason in skipped.items():
        logger.info("skipping %s: %s", name, reason)
    configs = {n: variant_config(settings, n) for n in settings.variants if n not in skipped}
    if not configs:
        reasons = "; ".join(skipped.values())
        raise UserError(f"--variants: none of them can run here ({reasons}); choose others")
    (chosen,) = {choose(config.precision, config.parallel) for config in configs.values()}
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with process_groups(next(iter(configs.values()))), explain_out_of_memory(lambda: _remedies(settings)):
        return StepReport(settings, _measured(settings, configs), skipped, describe_implementation(chosen))


def _measured(settings: StepSettings, configs: dict[str, Config]) -> dict[str, VariantResult]:
    """Build all variants, measure them in turn, and trace them."""
    _start_libraries(torch.bfloat16 if settings.bf16 else torch.float32)
    memory, batches = MemoryMeter(), batches_of(settings)
    variants, saved = [], {}
    for name, config in configs.items():
        with memory.charged(name):
            variant = build_variant(name, config, settings.eager_attention)
            countable = kind_of(name).has_countable_states
            saved[name] = saved_for_backward(variant, batches[0]) if countable else None
        variants.append(variant)
    marking = profiling.marking() if settings.nvtx else nullcontext()
    with marking, _progress(len(variants) * (settings.warmup + settings.steps)) as on_step:
        times = measure_steps(
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
            "times of %s are too long: the device was full, so the allocator freed its cache within measured "
            "steps; try: %s",
            ", ".join(short),
            "; ".join(_remedies(settings)),
        )
    if settings.profile is not None:
        for path in write_traces(variants, batches, settings.profile):
            logger.info("wrote %s", path)
    return {
        variant.name: VariantResult(
            parameters=sum(p.numel() for p in variant.model.parameters()),
            saved=saved[variant.name],
            times=times[variant.name],
            flops_per_token=flops_per_token(variant.config.model),
            peak_bytes=memory.peak(variant.name),
            retries=memory.retries(variant.name),
            peak_flops=device.peak_flops(kind_of(variant.name).fp8) if settings.bf16 else None,
        )
        for variant in variants
    }


def _start_libraries(dtype: torch.dtype) -> None:
    """Let matrix libraries allocate their workspaces now, so that no variant is charged for them."""
    x = torch.ones(16, 16, dtype=dtype, device=device.device(), requires_grad=True)
    torch.nn.functional.linear(x, x, x[0]).sum().backward()


def _remedies(settings: StepSettings) -> list[str]:
    """List what reduces memory when all variants share one device."""
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
        "in training also --tensor-model-parallel-size, which this one-process benchmark doesn't have",
    ]


def check_settings(settings: StepSettings) -> None:
    """Refuse mistakes that ``resolve`` cannot see.

    Raises:
        UserError: naming the flag and the remedy.
    """
    at_least(1, settings, "steps", "num_micro_batches", "micro_batch_size", "threads")
    at_least(0, settings, "warmup")
    names = settings.variants or ()
    if not names or len(set(names)) < len(names):
        raise UserError("--variants needs at least one name, and each name once; for example plain base mesh")
    for name in names:
        kind_of(name)
    if (processes := world_size_from_environment()) > 1:
        raise UserError(
            f"the benchmark runs in one process, but {processes} were started; use plain python or "
            "srun --ntasks 1"
        )
    if settings.output is not None:
        _check_outputs(settings.output)
    if settings.profile is not None:
        _make_directory(settings.profile)


def _check_outputs(output: Path) -> None:
    """Check that the JSON file and the tables can be written without replacing anything else."""
    check_output_file(output)
    tables = output.with_suffix(".md")
    if tables == output:
        raise UserError(f"--output {output} is reserved for the tables; name the JSON file, ending in .json")
    if tables.exists() and not output.exists():
        raise UserError(
            f"--output {output}: the tables would replace {tables}, which no earlier run wrote; "
            "choose another name"
        )


def _make_directory(profile: Path) -> None:
    try:
        profile.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--profile {profile} cannot be created ({error.strerror}); name another directory"
        ) from None


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str, Times], None]]:
    """Yield a callback for finished steps: it shows a bar on a terminal, and prints lines elsewhere."""
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


if __name__ == "__main__":
    command.run(main, show_progress=True, if_interrupted="interrupted: nothing was written")
