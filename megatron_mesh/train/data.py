"""Opens a run's tokenizer and data sets, and reads micro-batches from a given sample on.

Describes a run's data in the log: sources, tokens and epochs. Nothing here reads data files.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mesh.config.layout import last_sample
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.data import (
    Batch,
    Datasets,
    SampleStream,
    Tokenizer,
    build_datasets,
    build_loader,
    build_tokenizer,
    check_vocab,
)
from megatron_mesh.runtime import device


class NoTokenizer(Tokenizer):
    """Stands in when no tokenizer is given: tokenized data needs only the vocabulary size."""

    eod = -2  # neither a token id nor ``pad``

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": type(self).__name__}

    def tokenize(self, text: str) -> list[int]:
        raise TypeError("no tokenizer was given, only the size of its vocabulary")

    def detokenize(self, ids: list[int]) -> str:
        raise TypeError("no tokenizer was given, only the size of its vocabulary")


def open_vocabulary(config: Config) -> tuple[Config, Tokenizer]:
    """Open the tokenizer; return it with ``config``, whose ``vocab_size`` is filled in from it if unset.

    Raises:
        UserError: there is no such tokenizer, or it has more ids than the model's vocabulary.
    """
    if config.data.tokenizer_model is None:
        assert config.model.vocab_size is not None, "resolve() asks for one of the two"
        return config, NoTokenizer(config.model.vocab_size)
    tokenizer = build_tokenizer(config.data.tokenizer_type, config.data.tokenizer_model)
    if config.model.vocab_size is not None:
        check_vocab(tokenizer, config.model.vocab_size)
        return config, tokenizer
    model = replace(config.model, vocab_size=tokenizer.vocab_size)
    return resolve(replace(config, model=model), world_size=dist.get_world_size()), tokenizer


def open_datasets(config: Config, tokenizer: Tokenizer, step: int = 0, consumed_samples: int = 0) -> Datasets:
    """Open training data up to the end of a run that is at ``step``, and evaluation data if it evaluates."""
    training = config.training
    assert training.global_batch_size is not None
    eval_iters = training.eval_iters if training.eval_interval else 0
    return build_datasets(
        config.data,
        tokenizer,
        seq_length=config.model.seq_length,
        seed=training.seed,
        train_samples=last_sample(training, step, consumed_samples),
        eval_samples=eval_iters * training.global_batch_size,
    )


def fingerprints_of(data: Datasets, tokenizer: Tokenizer) -> dict[str, str]:
    """Return digests of each stream's data and order, by name, and of the tokenizer (see ``TrainState``)."""
    found = {name: stream.order for name, stream in data.named().items()}
    if not isinstance(tokenizer, NoTokenizer):
        found["tokenizer"] = tokenizer.unique_identifiers["sha256"]
    return found


def open_batches(
    config: Config,
    dataset: SampleStream,
    consumed_samples: int = 0,
    batch_size: Callable[[int], int] | None = None,
) -> Iterator[Batch]:
    """Return this rank's micro-batches, starting after ``consumed_samples``.

    The ranks of a tensor-parallel group read the same ones.

    Args:
        batch_size: maps consumed samples to the global batch size; by default the size is constant.
    """
    training = config.training
    assert training.global_batch_size is not None
    return build_loader(
        dataset,
        consumed_samples=consumed_samples,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=batch_size or training.global_batch_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        num_workers=config.data.num_workers,
        pin_memory=device.has_gpu(),
    )


logger = logging.getLogger(__name__)


def log_data(config: Config, data: Datasets, consumed_samples: int) -> None:
    """Log which sources each stream takes its samples from, and how often it reads them."""
    lines = [
        line
        for name, stream in data.named().items()
        for line in describe_data(
            name, stream, config.model.seq_length, consumed_samples if name == "train" else 0
        )
    ]
    logger.info("\n".join(lines))


def describe_data(
    name: str, stream: SampleStream, seq_length: int, consumed_samples: int = 0
) -> Iterator[str]:
    """Yield lines about one stream: its size, and for each source its share, tokens and epochs.

    A blend follows its weights to within one sample, so the weights give the number of samples per source.

    Args:
        consumed_samples: the sample at which a resumed run starts.
    """
    start = f", starting at sample {consumed_samples:,}" if consumed_samples else ""
    tokens = len(stream) * seq_length
    yield f"{name} data: {len(stream):,} samples of {seq_length:,} tokens, {tokens:,} tokens{start}"
    for part in stream.parts:
        samples = len(part.dataset)
        epochs = f"{part.weight * len(stream) / samples:.3g} epochs"
        if consumed_samples:
            epochs += f" ({part.weight * consumed_samples / samples:.3g} done)"
        yield f"  {part.weight:6.2%} from {part.prefix}: {samples * seq_length:,} tokens, {epochs}"


def describe_sources(stream: SampleStream, samples: range) -> str:
    """Return where samples come from, e.g. ``3 of data/books (epoch 1), 1 of data/code (epoch 2)``."""
    origins = [stream.origin(sample) for sample in samples]
    counts = Counter((origin.prefix, origin.epoch + 1) for origin in origins)
    return ", ".join(f"{count} of {prefix} (epoch {epoch})" for (prefix, epoch), count in counts.items())
