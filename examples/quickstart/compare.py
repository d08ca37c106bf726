#!/usr/bin/env python
"""Compare recurrence schemes on the quickstart's data: equal compute, equal training, several seeds.

    make quickstart
    python examples/quickstart/compare.py --seeds 1 2 3

Trains every scheme with every seed, then writes compare.md and compare.png. The looped models have the
quickstart's layers. vanilla is the plain model of the same depth, so it has more parameters. Finished runs
are skipped, and an interrupted one resumes.
"""

import statistics
from dataclasses import dataclass
from pathlib import Path

from run import HERE, ROOT
from steps import Step, from_here, run_all

from megatron_mesh import command
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.run_files import CONFIG_FILE, checkpoint_path


@dataclass
class Options:
    """Options of the comparison."""

    data_dir: Path = Path("runs/quickstart")
    """Directory of a finished quickstart, for its data and tokenizer."""
    output_dir: Path = Path("runs/compare")
    """Directory for the runs, the table and the figure."""
    config: Path = HERE / "quickstart.yaml"
    """Settings of every run."""
    schemes: tuple[str, ...] = ("vanilla", "base", "anchor", "mesh")
    """Recurrence schemes to compare."""
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the initial weights and of the order of the data."""
    steps: int = 600
    """Steps of every run."""


def main(options: Options) -> None:
    """Train, then write the table and the figure."""
    if not (options.data_dir / "tokenizer/tokenizer.model").is_file():
        raise UserError(f"--data-dir {options.data_dir} is not a finished quickstart; run it first")
    keys = [(scheme, seed) for seed in options.seeds for scheme in options.schemes]
    runs = {key: _training(options, *key) for key in keys}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    run_all(list(runs.values()), notes=options.output_dir / "done.json")
    curves = {key: _validation_losses(options.output_dir / _name(*key)) for key in runs}
    table = _table(options, {key: curve[options.steps] for key, curve in curves.items()})
    (options.output_dir / "compare.md").write_text(table, encoding="utf-8")
    _draw(options, curves)
    print(f"\n{table}\nwrote {options.output_dir / 'compare.md'} and {options.output_dir / 'compare.png'}")


def _name(scheme: str, seed: int) -> str:
    return f"{scheme}-{seed}"


def _training(options: Options, scheme: str, seed: int) -> Step:
    directory, data = options.output_dir / _name(scheme, seed), options.data_dir / "data"
    return Step(
        f"Train {scheme} with seed {seed}",
        ROOT / "pretrain_mesh.py",
        {
            "--config": from_here(options.config.resolve()),
            "--recurrence": scheme,
            "--seed": seed,
            "--train-iters": options.steps,
            "--eval-interval": max(1, options.steps // 6),
            "--train-data-path": data / "train_text_document",
            "--valid-data-path": data / "valid_text_document",
            "--tokenizer-model": options.data_dir / "tokenizer/tokenizer.model",
            "--save": directory,
            "--load": directory,
        },
        output=checkpoint_path(directory, options.steps),
    )


def _validation_losses(run: Path) -> dict[int, float]:
    """Step -> validation loss."""
    from megatron_mesh.metrics.figures import read_metrics

    return {row["step"]: row["loss"] for row in read_metrics(run)["valid"]}


def _table(options: Options, losses: dict[tuple[str, int], float]) -> str:
    from megatron_mesh.arguments import parse_args
    from megatron_mesh.config.resolve import resolve
    from megatron_mesh.config.sizes import non_embedding_parameters

    seeds = "".join(f" seed {seed} |" for seed in options.seeds)
    lines = [
        f"| scheme | layers | parameters without embeddings |{seeds} mean |",
        "|---|---|---|" + "---|" * (len(options.seeds) + 1),
    ]
    for scheme in options.schemes:
        found = [losses[scheme, seed] for seed in options.seeds]
        written = options.output_dir / _name(scheme, options.seeds[0]) / CONFIG_FILE
        config = resolve(parse_args(["--config", str(written)]).config, world_size=1)
        numbers = "".join(f" {loss:.3f} |" for loss in found)
        lines.append(
            f"| {scheme} | {config.model.layers} | {non_embedding_parameters(config.model):,} |{numbers}"
            f" {statistics.fmean(found):.3f} |"
        )
    return "\n".join(lines) + "\n"


def _draw(options: Options, curves: dict[tuple[str, int], dict[int, float]]) -> None:
    """Mean validation loss over steps, and every seed as a thin line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="step", ylabel="validation loss (nats per token)")
    axes.grid(alpha=0.3)
    for number, scheme in enumerate(options.schemes):
        seeds = [curves[scheme, seed] for seed in options.seeds]
        steps = sorted(seeds[0])
        mean = [statistics.fmean(curve[step] for curve in seeds) for step in steps]
        axes.plot(steps, mean, "o-", color=f"C{number}", label=f"{scheme}: {mean[-1]:.3f}")
        for curve in seeds:
            axes.plot(steps, [curve[step] for step in steps], color=f"C{number}", alpha=0.35, linewidth=0.8)
    axes.legend(title="mean at the end")
    figure.savefig(options.output_dir / "compare.png", dpi=130)


if __name__ == "__main__":
    command.run(main, if_interrupted="Interrupted; run the same command to resume.")
