"""How much memory a rank needs, from shapes: weights, gradients, optimizer state, activations."""

from dataclasses import dataclass

from megatron_mesh.config.derived import layout, padded_vocab_size
from megatron_mesh.config.schema import Config
from megatron_mesh.recurrence import SCHEMES


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per rank. What a framework, its communication and fragmentation take comes on top."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(config: Config, parameters: int) -> MemoryEstimate:
    """Memory of a rank that holds ``parameters`` parameters.

    Gradients are summed in float32. Adam keeps two float32 moments, and for bfloat16 weights a float32
    copy of each.
    """
    bf16 = config.training.bf16
    return MemoryEstimate(
        weights=parameters * (2 if bf16 else 4),
        gradients=parameters * 4,
        optimizer=parameters * (12 if bf16 else 8),
        activations=activation_bytes(config),
    )


def activation_bytes(config: Config) -> int:
    """Tensors kept for the backward pass of one micro-batch, on one tensor-parallel rank."""
    model, layers = config.model, layout(config.model)
    tp = config.parallel.tensor_model_parallel_size
    width = 2 if config.training.bf16 else 4
    tokens = config.training.micro_batch_size * model.seq_length
    shard = tp if config.parallel.sequence_parallel else 1
    state = tokens * model.hidden_size * width // shard
    kept = _layer_bytes(config) * layers.depth
    if config.training.recompute_granularity == "full":
        kept = _fully_recomputed_bytes(config)
    kept += SCHEMES[model.recurrence].kept_states(layers.loops) * state
    kept += 2 * state  # the final norm's input and output
    # Cross-entropy keeps the softmax over the vocabulary in float32.
    return kept + tokens * padded_vocab_size(model) // tp * 4


def _layer_bytes(config: Config) -> int:
    """One layer, in units of tokens x width: H each for x, ln1(x) and ln2(x); in the tensor-parallel part
    3H for qkv (v is a view of it), H each for rotated q, rotated k and the attention's output, and twice
    the MLP's width around its activation function. Recomputing the attention saves none of these, since
    torch's attention does not write its scores out."""
    model, training = config.model, config.training
    tp = config.parallel.tensor_model_parallel_size
    shard = tp if config.parallel.sequence_parallel else 1
    h, ffn = model.hidden_size, model.ffn_hidden_size or 4 * model.hidden_size
    sharded_by_tp = 6 * h
    if "mlp" not in (training.recompute_modules or []):
        sharded_by_tp += 2 * ffn
    width = 2 if training.bf16 else 4
    return training.micro_batch_size * model.seq_length * (3 * h // shard + sharded_by_tp // tp) * width


def _fully_recomputed_bytes(config: Config) -> int:
    """Full recomputation: the input of each group of layers, and all of the group that is being redone."""
    training, model, layers = config.training, config.model, layout(config.model)
    tp = config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    width = 2 if training.bf16 else 4
    state = training.micro_batch_size * model.seq_length * model.hidden_size * width // tp
    group = training.recompute_num_layers or 1
    if training.recompute_method == "uniform":
        return -(-layers.depth // group) * state + group * _layer_bytes(config)
    if SCHEMES[model.recurrence].has_loop:
        sections = [layers.prelude, *[layers.core] * layers.loops, layers.coda]
    else:
        sections = [layers.depth]
    redone = sum(min(group, section) for section in sections)
    return redone * state + (layers.depth - redone + 1) * _layer_bytes(config)
