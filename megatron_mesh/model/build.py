"""Name parameters as in the whole model, whatever part of it a rank holds, and count them by part.

Draw initial weights that depend only on the seed and on each parameter's name.

Every tensor has its own random generator and is drawn in full, in float32 on the CPU. A tensor-parallel rank
then takes its shard. So construction order, device and rank layout don't matter.

Build a model from a resolved configuration, on the run's device or on torch's meta device.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode

from megatron_mesh.config.layout import padded_vocab_size
from megatron_mesh.config.placement import Part
from megatron_mesh.config.schema import Config
from megatron_mesh.model.gpt import MeshGPTModel
from megatron_mesh.model.implementation import LOCAL, Implementation, choose
from megatron_mesh.model.layer_spec import layer_spec
from megatron_mesh.model.transformer_config import transformer_config
from megatron_mesh.runtime import device

_PARTS = {
    "embedding": "embedding",
    "decoder.prelude": "prelude",
    "decoder.core": "core",
    "decoder.coda": "coda",
    "decoder.layers": "layers",
    "decoder.recurrence": "recurrence",
    "decoder.final_layernorm": "final norm",
    "output_layer": "output projection",
}


def whole_model_parameters(model: MeshGPTModel) -> Iterator[tuple[str, Parameter]]:
    """Yield ``model.named_parameters()``, with each layer's number in the whole model.

    With tied embeddings in a pipeline, the last rank's output projection gets the embedding's name.
    """
    layers = {
        f"{path}.": f"{path.rpartition('.')[0]}.{module.layer_number - 1}."
        for path, module in model.named_modules()
        if isinstance(module, TransformerLayer)
    }
    for name, parameter in model.named_parameters():
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        here = next((prefix for prefix in layers if name.startswith(prefix)), None)
        yield (name if here is None else layers[here] + name.removeprefix(here)), parameter


def count_parameters(model: MeshGPTModel) -> Counter[str]:
    """Count the parameters of a built model by part; shared ones count once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next(label for prefix, label in _PARTS.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    return counts


# Matrices whose output is added to the residual stream.
_OUTPUT_PROJECTIONS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")


@torch.no_grad()
def init_weights(model: MeshGPTModel, seed: int, depth_scaled: bool = True) -> None:
    """Set weights to N(0, std), biases to 0 and norm weights to 1. The recurrence scheme sets its own values.

    Args:
        depth_scaled: divide the std of output projections by sqrt(2 x unrolled depth), as the paper does.
    """
    std = model.config.init_method_std
    output_std = std / (2 * model.config.num_layers) ** 0.5 if depth_scaled else std
    prefix = "decoder.recurrence."
    for name, parameter in whole_model_parameters(model):
        if name.startswith(prefix):
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "layernorm" in name or "layer_norm" in name:
            parameter.fill_(1.0)
        else:
            this_std = output_std if name.endswith(_OUTPUT_PROJECTIONS) else std
            _draw(parameter, f"{seed}/{name}", this_std, model.tp_group)
    scheme = getattr(model.decoder, "recurrence", None)
    if scheme is not None:
        scheme.init_parameters(
            lambda name, weight, std: _draw(weight, f"{seed}/{prefix}{name}", std, model.tp_group)
        )


@torch.no_grad()
def zero_weights(model: MeshGPTModel) -> None:
    """Set every parameter to zero before loading a checkpoint, which may lack the padded vocabulary rows."""
    for parameter in model.parameters():
        parameter.zero_()


def drawn(shape: Sequence[int], key: str, std: float) -> Tensor:
    """Draw the whole tensor named ``key`` from N(0, std)."""
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)


def _draw(weight: Tensor, key: str, std: float, tp_group: torch.distributed.ProcessGroup) -> None:
    """Fill ``weight`` with this rank's shard of the tensor named ``key``."""
    shape = list(weight.shape)
    sharded = getattr(weight, "tensor_model_parallel", False)
    if sharded:
        shape[weight.partition_dim] *= get_pg_size(tp_group)  # type: ignore[attr-defined]
    whole = drawn(shape, key, std)
    if sharded:
        whole = whole.chunk(get_pg_size(tp_group), weight.partition_dim)[get_pg_rank(tp_group)]  # type: ignore[attr-defined]
    weight.copy_(whole)
    # A weight stored in FP8 also holds the unrounded values, from which the optimizer's main parameters
    # start.
    precise = getattr(weight, "get_high_precision_init_val", None)
    if precise is not None:
        precise().copy_(whole)


def build_model(
    config: Config, part: Part | None = None, *, initial_weights: bool = True, **stage: Any
) -> MeshGPTModel:
    """Build this rank's model. Megatron's process groups must exist. Global random generators don't advance.

    Args:
        part: the part of a looped model that this pipeline rank holds (default: all).
        initial_weights: draw the weights from the seed. If False they are zero, for a checkpoint to fill.
        stage: for a chunk of a plain model: ``pre_process``, ``post_process`` and ``vp_stage``.
    """
    implementation = choose(config.precision, config.parallel)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with device.device(), _SkipTorchInit():
        model = _construct(config, groups, part, implementation, **stage)
    if initial_weights:
        init_weights(model, config.training.seed, config.model.depth_scaled_init)
    else:
        zero_weights(model)
    return model


class _SkipTorchInit(TorchFunctionMode):
    """Skip the random initialization in torch's module constructors; ``init.py`` sets all values later."""

    _DRAWS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._DRAWS:
            return (*args, *(kwargs or {}).values())[0]
        return func(*args, **(kwargs or {}))


def build_on_meta(
    config: Config, tp_rank: int = 0, pp_rank: int = 0, part: Part | None = None, **stage: Any
) -> MeshGPTModel:
    """Build the same modules without memory or process groups, to count parameters.

    The layers are always local. Transformer Engine's have the same weights, but need a device.
    """
    groups = ProcessGroupCollection()
    groups.tp = _GroupShape(config.parallel.tensor_model_parallel_size, tp_rank)
    groups.pp = _GroupShape(config.parallel.pipeline_model_parallel_size, pp_rank)
    for name in ("cp", "dp", "dp_cp"):
        setattr(groups, name, _GroupShape(1, 0))
    groups.embd = None
    with torch.device("meta"):
        return _construct(config, groups, part, LOCAL, **stage)


class _GroupShape:
    """Stands in for a process group in module constructors, which only ask for its size and rank."""

    def __init__(self, size: int, rank: int):
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def _construct(
    config: Config,
    groups: ProcessGroupCollection,
    part: Part | None,
    implementation: Implementation,
    **stage: Any,
) -> MeshGPTModel:
    model, transformer = config.model, transformer_config(config, implementation)
    return MeshGPTModel(
        transformer,
        layer_spec(implementation, transformer.attention_backend),
        vocab_size=padded_vocab_size(model),
        unpadded_vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        rotary_percent=model.rotary_percent,
        rotary_base=model.rotary_base,
        pg_collection=groups,
        part=part,
        **stage,
    )
