"""What FP8 adds to memory: each weight matrix of an FP8 layer once more, as a cast and its transpose.

Hopper multiplies FP8 matrices in one orientation only, so Transformer Engine keeps a cast for the forward and
a transposed one for the backward (``module/linear.py``: ``weight_quantizer.set_usage(rowwise, columnwise)``),
a byte a weight each. Activations are counted in bfloat16 all the same: of what an FP8 layer keeps, some is a
byte an element, so the estimate is on the safe side.
"""

from megatron_mesh.config.schema import Config
from megatron_mesh.planner.stages import Chunk, Pipeline

_CAST = 2  # bytes a weight


def kept_casts_bytes(config: Config, pipeline: Pipeline, rank: int) -> int:
    """Casts that last as long as the weights: tensorwise, once for all passes (``model/precision.py``).

    Weights that are in FP8 themselves (``fp8_param_gather``) take with their transpose what they take in
    bfloat16, and nothing is added. With ``first_last_layers_bf16`` the layers left out are counted too.
    """
    precision = config.precision
    if not precision.fp8_format or precision.fp8_recipe != "tensorwise" or precision.fp8_param_gather:
        return 0
    layers = pipeline.layers[rank] if precision.fp8_scope == "all" else pipeline.core_layers(rank)
    return _CAST * matrix_weights(config) * layers


def pass_casts_bytes(config: Config, chunk: Chunk, layers: int) -> int:
    """Casts that autograd keeps for one pass over ``layers`` of a chunk: blockwise and delayed."""
    precision = config.precision
    if not precision.fp8_format or precision.fp8_recipe == "tensorwise" or precision.fp8_param_gather:
        return 0
    in_fp8 = chunk.layers if precision.fp8_scope == "all" else chunk.core
    return _CAST * matrix_weights(config) * min(layers, in_fp8)


def matrix_weights(config: Config) -> int:
    """Weights of a layer's four matrices on one tensor-parallel rank."""
    model, tp = config.model, config.parallel.tensor_model_parallel_size
    h, ffn = model.hidden_size, model.ffn_hidden_size or 4 * model.hidden_size
    return (4 * h * h + 2 * h * ffn) // tp
