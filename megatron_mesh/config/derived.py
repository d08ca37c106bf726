"""Quantities that follow from a resolved model configuration."""

from megatron_mesh.config.layers import LayerLayout, parse_layers
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES


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


def non_embedding_parameters(model: ModelConfig) -> int:
    """Parameters of a resolved model without embedding and output projection, by formula.

    A block has 12 H^2 + 13 H (for an MLP of width 4H), the final norm 2H; the scheme adds its own.
    """
    assert model.ffn_hidden_size is not None, "resolve() fills in ffn_hidden_size"
    h, ffn, layers = model.hidden_size, model.ffn_hidden_size, layout(model)
    attention = 4 * h * h + 4 * h
    mlp = 2 * h * ffn + ffn + h
    norms = 4 * h
    own = SCHEMES[model.recurrence].num_parameters(h, layers.loops, model.mesh_slots or 0)
    return layers.unique_layers * (attention + mlp + norms) + 2 * h + own
