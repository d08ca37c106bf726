"""Lay a step report out as tables, for a terminal and as Markdown."""

from collections.abc import Iterator, Mapping

from rich.console import Group

from megatron_mesh.metrics.tables import TextTable
from megatron_mesh.runtime import device
from tools.bench.report import COMPARED, PARTS, Spread, StepReport, VariantResult, ratios, targets
from tools.bench.settings import COMPILED, EAGER, FP8, StepSettings, kind_of


def as_tables(report: StepReport) -> Group:
    """Render the report for a terminal."""
    return Group(*(table.rich() for table in _tables(report)), _describe(report.settings))


def as_markdown(report: StepReport) -> str:
    """Render the report as Markdown."""
    return "\n".join([_describe(report.settings), "", *(table.markdown() for table in _tables(report))])


def _describe(settings: StepSettings) -> str:
    """Describe the run in one line."""
    s = settings
    kinds = [kind_of(name) for name in s.variants or ()]
    choices = [
        f", recomputation {s.recompute_granularity}" if s.recompute_granularity else "",
        ", weight gradients fused" if s.gradient_accumulation_fusion else "",
        f", FP8 {s.fp8_recipe} ({s.fp8_scope})" if any(kind.fp8 for kind in kinds) else "",
        f", eager with {s.eager_attention} attention" if any(k.scheme == EAGER for k in kinds) else "",
    ]
    return (
        f"{s.layers}, hidden {s.hidden_size}, vocabulary {s.vocab_size:,}; {s.num_micro_batches} "
        f"micro-batches of {s.micro_batch_size} x {s.seq_length} tokens, {'bf16' if s.bf16 else 'fp32'}"
        f"{''.join(choices)}, {s.steps} steps of each in turn; {device.describe()}"
    )


def _tables(report: StepReport) -> Iterator[TextTable]:
    results = report.results
    yield _rates(report)
    yield TextTable(
        "seconds per step: median (quartiles)",
        ["variant", *(part.replace("_", "-") for part in PARTS)],
        [
            [name, *(str(Spread.of(getattr(result.times, part))) for part in PARTS)]
            for name, result in results.items()
        ],
    )
    shown = {pair: parts for pair, parts in ratios(results).items() if _is_shown(pair, results)}
    yield TextTable(
        "ratios of times of the same round: median (quartiles)",
        ["ratio", *(part.replace("_", "-") for part in COMPARED)],
        [[pair, *(str(parts[part]) for part in COMPARED)] for pair, parts in shown.items()],
    )
    yield _saved(results)
    yield _targets(report)
    if report.skipped:
        yield TextTable("skipped", ["variant", "reason"], [[*row] for row in report.skipped.items()])


def _is_shown(pair: str, results: Mapping[str, VariantResult]) -> bool:
    """Show ratios to the first variant, to base, and of suffixed variants to plain ones. JSON has all."""
    above, below = pair.split(" / ")
    suffixed = (f"{below}{FP8}", f"{below}{COMPILED}", f"{below}{FP8}{COMPILED}")
    return below in (next(iter(results)), "base") or above in suffixed


def _rates(report: StepReport) -> TextTable:
    rows = []
    for name, result in report.results.items():
        rates = result.rates(report.settings.tokens_per_step)
        share, peak = rates["share_of_peak"], result.peak_bytes
        rows.append(
            [
                name,
                f"{result.parameters:,}",
                f"{rates['tokens_per_second']:,.0f}",
                f"{rates['model_tflops']:.3g}",
                "-" if share is None else f"{share:.1%}",
                "-" if peak is None else f"{peak / 2**30:.2f}",
            ]
        )
    header = ["variant", "parameters", "tokens/s", "model TFLOP/s", "of peak", "peak GiB"]
    return TextTable("speed and memory", header, rows)


def _saved(results: Mapping[str, VariantResult]) -> TextTable:
    rows = [
        [name, str(saved.states), *(f"{n / 2**20:.3f}" for n in (saved.state_bytes, saved.total_bytes))]
        for name, result in results.items()
        if (saved := result.saved)
    ]
    header = ["variant", "states [S, B, H]", "MiB of states", "MiB in all"]
    return TextTable("saved for backward by one micro-batch, without parameters", header, rows)


def _targets(report: StepReport) -> TextTable:
    rows = [
        [
            target.what,
            f"{target.bound} {target.limit:g}",
            "-" if target.measured is None else f"{target.measured:.3f}",
            target.verdict,
        ]
        for target in targets(report)
    ]
    return TextTable("targets for one H200 in bf16", ["figure", "target", "here", "verdict"], rows)
