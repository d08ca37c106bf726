#!/usr/bin/env python
"""Build the index cache of a run's data in advance, so that no GPU waits for it.

    python tools/build_data_index.py --config examples/configs/pythia-160m.yaml \\
        --data-path data/corpus_text_document --data-cache-path /local/cache --tokenizer-model tokenizer.json

Takes every setting of pretrain_mesh.py (see its --help); give the run's own. The data, --split, --seq-length
and --seed decide which index is built, and the other settings change nothing. One index serves any number of
steps, ranks and loader processes, wherever the data are mounted. Several of these commands may run at once.
The table of a blend depends on the length of the run, so the run builds it.
"""

from dataclasses import dataclass

from megatron_mesh import command
from megatron_mesh.errors import UserError


@dataclass
class Options:
    """All options are settings of pretrain_mesh.py."""


def main(options: Options, settings: list[str]) -> None:
    """Build the cache and print how much data there is."""
    if not settings:
        raise UserError("the data are missing; give --data-path or a --config that names them")
    from megatron_mesh.arguments import parse_args
    from megatron_mesh.data import Tokenizer, build_datasets, build_tokenizer
    from megatron_mesh.train.data import NoTokenizer

    config = parse_args(settings, prog="build_data_index.py").config
    tokenizer: Tokenizer = NoTokenizer(0)
    if config.data.tokenizer_model is not None:
        tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    seq_length = config.model.seq_length
    datasets = build_datasets(
        config.data,
        tokenizer,
        seq_length=seq_length,
        seed=config.training.seed,
        train_samples=1,
        eval_samples=1,
    )
    streams = datasets.named()
    for kind in ("valid", "test"):
        if not any(name.startswith(kind) for name in streams):
            print(f"{kind}: none")
    for name, stream in streams.items():
        for part in stream.parts:
            samples = len(part.dataset)
            tokens = samples * seq_length
            print(
                f"{name}: {part.prefix}: {samples:,} sequences, {tokens:,} tokens, weight {part.weight:.4g}"
            )


if __name__ == "__main__":
    command.run(main)
