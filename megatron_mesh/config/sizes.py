"""Parameters, FLOPs and bytes of a resolved model's pieces: the only place that knows these formulas.

Placement, planner, metrics and benchmarks read them; tests compare them with real modules and with torch's
counters. H is the hidden size, F the width of the MLP, S the sequence length and V the padded vocabulary.
The ``tp`` of a function is the number of tensor-parallel ranks that share the weights; 1 counts them all.
"""

from megatron_mesh.config.derived import layout, padded_vocab_size, tokens_of_rank
from megatron_mesh.config.schema import Config, ModelConfig
from megatron_mesh.recurrence import SCHEMES, Scheme

GRADIENT_BYTES = 4
"""Of a parameter: gradients are accumulated and reduced in float32."""
MOMENTS_BYTES = 8
"""Of a parameter: Adam's two moments in float32."""
FP8_CAST_BYTES = 2
"""Of a weight that is cast to FP8: one byte for the cast, one for its transpose.

Hopper multiplies FP8 matrices in one orientation only, so Transformer Engine stores a cast for the forward
and a transposed one for the backward (``module/linear.py``: ``weight_quantizer.set_usage(rowwise,
columnwise)``).
"""


# Parameters


def layer_parameters(model: ModelConfig, tp: int = 1) -> int:
    """One layer: 12 H^2 + 13 H in all if F = 4H."""
    h, ffn = model.hidden_size, _ffn(model)
    column_parallel_biases = 3 * h + ffn
    return (
        layer_matrix_parameters(model, tp) + column_parallel_biases // tp + replicated_layer_parameters(model)
    )


def layer_matrix_parameters(model: ModelConfig, tp: int = 1) -> int:
    """The four weight matrices of a layer: QKV, attention output, and the two of the MLP."""
    h = model.hidden_size
    return (4 * h * h + 2 * h * _ffn(model)) // tp


def replicated_layer_parameters(model: ModelConfig) -> int:
    """What every tensor-parallel rank holds in full: two norms and two biases of row-parallel matrices."""
    return 6 * model.hidden_size


def final_norm_parameters(model: ModelConfig) -> int:
    """Weight and bias of the norm after the last layer."""
    return 2 * model.hidden_size


def embedding_parameters(model: ModelConfig, tp: int = 1) -> int:
    """The token embedding or, untied, the output projection."""
    return padded_vocab_size(model) // tp * model.hidden_size


def scheme_parameters(model: ModelConfig) -> int:
    """What the recurrence scheme adds: routers or coefficients, never sharded."""
    return _scheme(model).num_parameters(model.hidden_size, layout(model).loops, model.mesh_slots or 0)


def non_embedding_parameters(model: ModelConfig) -> int:
    """The whole model without embedding and output projection."""
    layers = layout(model).unique_layers * layer_parameters(model)
    return layers + final_norm_parameters(model) + scheme_parameters(model)


# FLOPs of a forward per token: 2 per multiply-add of a matrix product


def attention_flops(model: ModelConfig) -> float:
    """Scores and weighted values of a layer, averaged over the sequence.

    Only the causal half is counted, as in Megatron-LM's ``num_floating_point_operations``.
    """
    return 2.0 * model.seq_length * model.hidden_size


def mlp_flops(model: ModelConfig) -> float:
    """The two matrices of a layer's MLP."""
    return 4.0 * model.hidden_size * _ffn(model)


def layer_flops(model: ModelConfig) -> float:
    """One layer."""
    return 8.0 * model.hidden_size**2 + attention_flops(model) + mlp_flops(model)


def head_flops(model: ModelConfig) -> float:
    """The output projection."""
    return 2.0 * model.hidden_size * padded_vocab_size(model)


def enter_flops(model: ModelConfig, index: int) -> float:
    """The recurrence at the start of pass ``index`` = 0..K+1.

    A scheme only states its total for K loops, which are the cycles 0..K, and cycle K starts pass K + 1. So
    the cost of one pass is the difference between two totals.
    """
    scheme, h, slots = _scheme(model), model.hidden_size, model.mesh_slots or 0
    before, after = (
        scheme.forward_flops(h, loops, slots) if loops >= 0 else 0 for loops in (index - 2, index - 1)
    )
    return after - before


def forward_flops_per_token(model: ModelConfig) -> float:
    """One forward through the unrolled network."""
    layers = layout(model)
    scheme = _scheme(model).forward_flops(model.hidden_size, layers.loops, model.mesh_slots or 0)
    return layers.depth * layer_flops(model) + scheme + head_flops(model)


def flops_per_token(model: ModelConfig) -> float:
    """Forward and backward of the unrolled network, without recomputation; a backward costs two forwards."""
    return 3 * forward_flops_per_token(model)


def loss_in_layers(model: ModelConfig) -> float:
    """The output projection's FLOPs divided by a layer's; 0 if the vocabulary size is not known yet."""
    return 0.0 if model.vocab_size is None else head_flops(model) / layer_flops(model)


# Bytes on one rank


def weight_bytes(config: Config) -> int:
    """Bytes of a parameter, and of an element of an activation."""
    return 2 if config.training.bf16 else 4


def optimizer_bytes(config: Config) -> int:
    """Optimizer state of a parameter: the moments and, for a bfloat16 weight, its float32 main parameter."""
    return MOMENTS_BYTES + (4 if config.training.bf16 else 0)


def state_bytes(config: Config) -> int:
    """One hidden state [S, B, H] of a micro-batch, not sharded over tensor-parallel ranks."""
    return tokens_of_rank(config) * config.model.hidden_size * weight_bytes(config)


def state_shard_bytes(config: Config) -> int:
    """One hidden state as it passes between layers: a sequence shard under sequence parallelism."""
    parallel = config.parallel
    return state_bytes(config) // (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def layer_activation_bytes(config: Config) -> int:
    """What autograd stores for one layer and micro-batch.

    In elements per token: H each for x, ln1(x) and ln2(x), sharded only under sequence parallelism. Sharded
    over tensor-parallel ranks are 3H for QKV (v is a view of it), H each for rotated q, rotated k and the
    attention's output, and F on either side of the MLP's activation function.

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
    """The final norm's input and output, and the softmax over the vocabulary in float32."""
    tp = config.parallel.tensor_model_parallel_size
    return 2 * state_shard_bytes(config) + tokens_of_rank(config) * padded_vocab_size(config.model) // tp * 4


def _ffn(model: ModelConfig) -> int:
    return model.ffn_hidden_size or 4 * model.hidden_size


def _scheme(model: ModelConfig) -> type[Scheme]:
    return SCHEMES[model.recurrence]
