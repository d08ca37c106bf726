"""Quantities that follow from a resolved model configuration."""

from megatron_mesh.config.layers import LayerLayout, parse_layers
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError


def layout(model: ModelConfig) -> LayerLayout:
    """The layers of a resolved model."""
    assert model.layers is not None, "resolve() fills in layers"
    return parse_layers(model.layers)


def padded_vocab_size(model: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up to ``make_vocab_size_divisible_by``.

    It depends on the model alone, never on how many ranks share it (Megatron-LM's padding does), so a
    checkpoint fits every layout.

    Raises:
        UserError: the size of the vocabulary is not known.
    """
    if model.vocab_size is None:
        raise UserError("the size of the vocabulary is not known; give --tokenizer-model or --vocab-size")
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def tokens_of_rank(config: Config) -> int:
    """Tokens of a micro-batch on each rank that shares its sequences in attention."""
    tokens = config.training.micro_batch_size * config.model.seq_length
    return tokens // config.parallel.context_parallel_size
