"""Describes a run's data in the log: sources, tokens and epochs. Nothing here reads data files."""

import logging
from collections import Counter
from collections.abc import Iterator

from megatron_mesh.config.schema import Config
from megatron_mesh.data import Datasets, SampleStream

logger = logging.getLogger(__name__)


def log_data(config: Config, data: Datasets, consumed_samples: int) -> None:
    """Log which sources each stream takes its samples from, and how often it reads them."""
    lines = [
        line
        for name, stream in data.named().items()
        for line in describe(
            name, stream, config.model.seq_length, consumed_samples if name == "train" else 0
        )
    ]
    logger.info("\n".join(lines))


def describe(name: str, stream: SampleStream, seq_length: int, consumed_samples: int = 0) -> Iterator[str]:
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
