"""Numbers that follow from a resolved configuration."""

from megatron_mesh.config.layout import LayerLayout, parse_layers
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError


def layout(model: ModelConfig) -> LayerLayout:
    """Return the layer layout of a resolved model."""
    assert model.layers is not None, "resolve() fills in layers"
    return parse_layers(model.layers)


def padded_vocab_size(model: ModelConfig) -> int:
    """Return the vocabulary size rounded up to a multiple of ``make_vocab_size_divisible_by``.

    Unlike Megatron-LM's padding, it doesn't depend on tensor parallelism, so a checkpoint fits every rank
    layout.

    Raises:
        UserError: the vocabulary size isn't known.
    """
    if model.vocab_size is None:
        raise UserError("the vocabulary size is not known; give --tokenizer-model or --vocab-size")
    multiple = model.make_vocab_size_divisible_by
    return -(-model.vocab_size // multiple) * multiple


def tokens_of_rank(config: Config) -> int:
    """Return the tokens of a micro-batch that one context-parallel rank processes."""
    tokens = config.training.micro_batch_size * config.model.seq_length
    return tokens // config.parallel.context_parallel_size
