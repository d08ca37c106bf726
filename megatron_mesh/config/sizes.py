"""Count the parameters, FLOPs and bytes of a resolved model. No other module contains these formulas.

Placement, planner, metrics and benchmarks use them. Tests compare them with real modules and with torch's
counters. H is the hidden size and F the width of the MLP. With an argument ``tp``, a function counts what one
of ``tp`` tensor-parallel ranks holds.
"""

from megatron_mesh.config.layout import layout, padded_vocab_size, tokens_of_rank
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.recurrence import SCHEMES, Scheme

GRADIENT_BYTES = 4
"""Per parameter: gradients are accumulated and reduced in float32."""
MOMENTS_BYTES = 8
"""Per parameter: Adam's two moments in float32."""
FP8_CAST_BYTES = 2
"""Per weight that is cast to FP8: one byte for the cast, one for its transpose.

Hopper multiplies FP8 matrices in one orientation only, so Transformer Engine stores a cast for the forward
and a transposed one for the backward (``module/linear.py``: ``weight_quantizer.set_usage(rowwise,
columnwise)``).
"""


# Parameters


def layer_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Count the parameters of one layer: 12 H^2 + 13 H if F = 4H and ``tp`` = 1."""
    sharded_biases = (3 * model.hidden_size + _ffn(model)) // tp
    return layer_matrix_parameters(model, tp) + sharded_biases + replicated_layer_parameters(model)


def layer_matrix_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Count the weights in a layer's four matrices: QKV, attention output, and the two of the MLP."""
    h = model.hidden_size
    return (4 * h * h + 2 * h * _ffn(model)) // tp


def replicated_layer_parameters(model: ModelConfig) -> int:
    """Count the parameters of a layer that every tensor-parallel rank holds in full.

    They belong to two norms and to the biases of two row-parallel matrices.
    """
    return 6 * model.hidden_size


def final_norm_parameters(model: ModelConfig) -> int:
    """Count weight and bias of the norm after the last layer."""
    return 2 * model.hidden_size


def embedding_parameters(model: ModelConfig, tp: int = 1) -> int:
    """Count the parameters of the token embedding, and of the output projection if that is untied."""
    return padded_vocab_size(model) // tp * model.hidden_size


def scheme_parameters(model: ModelConfig) -> int:
    """Count the parameters of the recurrence scheme: routers or coefficients, which are never sharded."""
    return _scheme(model).num_parameters(model.hidden_size, layout(model).loops, model.mesh_slots or 0)


def non_embedding_parameters(model: ModelConfig) -> int:
    """Count the parameters of the whole model without embedding and output projection."""
    layers = layout(model).unique_layers * layer_parameters(model)
    return layers + final_norm_parameters(model) + scheme_parameters(model)


# FLOPs of a forward per token, with 2 FLOPs per multiply-add of a matrix product


def attention_flops(model: ModelConfig) -> float:
    """FLOPs of a layer's attention scores and weighted values, averaged over the sequence.

    Only the causal half is counted, as in Megatron-LM's ``num_floating_point_operations``.
    """
    return 2.0 * model.seq_length * model.hidden_size


def mlp_flops(model: ModelConfig) -> float:
    """FLOPs of a layer's MLP."""
    return 4.0 * model.hidden_size * _ffn(model)


def layer_flops(model: ModelConfig) -> float:
    """FLOPs of one layer."""
    return 8.0 * model.hidden_size**2 + attention_flops(model) + mlp_flops(model)


def head_flops(model: ModelConfig) -> float:
    """FLOPs of the output projection."""
    return 2.0 * model.hidden_size * padded_vocab_size(model)


def enter_flops(model: ModelConfig, index: int) -> float:
    """FLOPs of the recurrence at the start of pass ``index`` = 0..K+1."""
    return _scheme(model).enter_flops(index, model.hidden_size, model.mesh_slots or 0)


def forward_flops_per_token(model: ModelConfig) -> float:
    """FLOPs of a forward through the unrolled network."""
    layers = layout(model)
    scheme = _scheme(model).forward_flops(model.hidden_size, layers.loops, model.mesh_slots or 0)
    return layers.depth * layer_flops(model) + scheme + head_flops(model)


def flops_per_token(model: ModelConfig) -> float:
    """FLOPs of forward and backward, which costs two forwards; recomputation is not counted."""
    return 3 * forward_flops_per_token(model)


def loss_in_layers(model: ModelConfig) -> float:
    """FLOPs of the output projection divided by a layer's; 0 while the vocabulary size is unknown."""
    return 0.0 if model.vocab_size is None else head_flops(model) / layer_flops(model)


# Bytes on one rank


def weight_bytes(config: Config) -> int:
    """Bytes per parameter, and per element of an activation."""
    return 2 if config.training.bf16 else 4


def optimizer_bytes(config: Config) -> int:
    """Optimizer state per parameter: moments and, for a bfloat16 weight, the float32 main parameter."""
    return MOMENTS_BYTES + (4 if config.training.bf16 else 0)


def state_bytes(config: Config) -> int:
    """Bytes of a micro-batch's hidden state [S, B, H], not sharded over tensor-parallel ranks."""
    return tokens_of_rank(config) * config.model.hidden_size * weight_bytes(config)


def state_shard_bytes(config: Config) -> int:
    """Bytes of a hidden state between layers: under sequence parallelism it is a sequence shard."""
    parallel = config.parallel
    return state_bytes(config) // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def layer_activation_bytes(config: Config) -> int:
    """Bytes that autograd stores for one layer and micro-batch.

    In elements per token these are H each for x, ln1(x) and ln2(x), sharded only under sequence parallelism.
    The others are sharded over tensor-parallel ranks: 3H for QKV (v is a view of it), H each for rotated q,
    rotated k and the attention's output, and F on either side of the MLP's activation function.

    Recomputing the attention saves nothing, because torch's attention doesn't materialize its scores. FP8
    layers are counted at full width: some of their activations take only a byte, so this is an upper bound.
    """
    model, parallel = config.model, config.parallel
    tp = parallel.tensor_model_parallel_size
    shards = tp if parallel.sequence_parallel else 1
    sharded_over_tp = 6 * model.hidden_size
    if "mlp" not in (config.training.recompute_modules or []):
        sharded_over_tp += 2 * _ffn(model)
    elements = 3 * model.hidden_size // shards + sharded_over_tp // tp
    return tokens_of_rank(config) * elements * weight_bytes(config)


def head_activation_bytes(config: Config) -> int:
    """Bytes of the final norm's input and output, and of the float32 softmax over the vocabulary."""
    tp = config.parallel.tensor_model_parallel_size
    return 2 * state_shard_bytes(config) + tokens_of_rank(config) * padded_vocab_size(config.model) // tp * 4


def _ffn(model: ModelConfig) -> int:
    return model.ffn_hidden_size or 4 * model.hidden_size


def _scheme(model: ModelConfig) -> type[Scheme]:
    return SCHEMES[model.recurrence]
