"""Bytes of parameters with what follows from them, and of one layer's activations."""

from dataclasses import dataclass

from megatron_mesh.config.derived import tokens_of_rank
from megatron_mesh.config.schema import Config


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


def layer_bytes(config: Config) -> int:
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
    return tokens_of_rank(config) * (3 * h // shard + sharded_by_tp // tp) * width
