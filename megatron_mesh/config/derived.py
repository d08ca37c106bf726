"""Numbers that follow from a resolved configuration."""

from megatron_mesh.config.layers import LayerLayout, parse_layers
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES


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


def non_embedding_parameters(model: ModelConfig) -> int:
    """Compute the number of parameters of a resolved model, without embedding and output projection.

    A layer has 12 H^2 + 13 H parameters (with an MLP of 4H) and the final norm 2H. The scheme may add some.
    """
    assert model.ffn_hidden_size is not None, "resolve() fills in ffn_hidden_size"
    h, ffn, layers = model.hidden_size, model.ffn_hidden_size, layout(model)
    attention = 4 * h * h + 4 * h
    mlp = 2 * h * ffn + ffn + h
    norms = 4 * h
    recurrence = SCHEMES[model.recurrence].num_parameters(h, layers.loops, model.mesh_slots or 0)
    return layers.unique_layers * (attention + mlp + norms) + 2 * h + recurrence
