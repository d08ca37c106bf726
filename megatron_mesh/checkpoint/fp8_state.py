"""Saves the state of FP8's delayed scaling as plain tensors, without pickles.

Transformer Engine stores scales and amax histories in the extra states of its modules, which are pickled
dicts. This module unpacks them before saving and packs them again after loading, so a process only unpickles
what it has pickled itself. The other FP8 recipes and bfloat16 have no such state.

Transformer Engine reduces the histories over all ranks that hold a layer. So they belong to the layer, not to
a rank, and can be loaded into any rank layout.
"""

import logging
import pickle
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_mesh.checkpoint.index import Index

logger = logging.getLogger(__name__)

_TENSORS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
Weights = dict[str, dict[str, Any]]
"""Values by model chunk and name, as from ``Stage.sharded_state_dict``."""


def has_state(config: TransformerConfig) -> bool:
    """Return whether modules have a state that carries over from step to step."""
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def to_save(weights: Weights, config: TransformerConfig) -> dict[str, ShardedTensor]:
    """Return the modules' states by chunk, module and tensor. A module that has not run in FP8 has none."""
    found: dict[str, ShardedTensor] = {}
    if not has_state(config):
        return found
    for name, state in _extra_states(weights).items():
        packed = state.data
        if packed is not None and packed.numel():
            values = pickle.loads(packed.numpy().tobytes())  # safe: this process has just pickled it
            found |= {f"{name}.{key}": _sharded(state, key, values[key]) for key in _TENSORS if key in values}
    return found


def to_fill(weights: Weights, index: Index, config: TransformerConfig) -> dict[str, ShardedTensor]:
    """Return empty tensors for the checkpoint's states, or none if its histories have another length."""
    wanted: dict[str, ShardedTensor] = {}
    if not has_state(config):
        return wanted
    for name, state in _extra_states(weights).items():
        entries = {key: index.entries.get(f"{state.key}.{key}") for key in _TENSORS}
        sizes = {key: entry.shape[1:] for key, entry in entries.items() if entry is not None}
        if not sizes:
            continue
        if sizes["amax_history_fwd"][0] != config.fp8_amax_history_len:
            logger.info(
                "FP8 amax histories restart empty: theirs have length %d in the checkpoint, %d here",
                sizes["amax_history_fwd"][0],
                config.fp8_amax_history_len,
            )
            return {}
        wanted |= {f"{name}.{key}": _sharded(state, key, torch.empty(size)) for key, size in sizes.items()}
    return wanted


def extra_states(filled: dict[str, ShardedTensor], config: TransformerConfig) -> Weights:
    """Pack the filled tensors of ``to_fill`` into extra states, for ``load_state_dict`` of each chunk."""
    found: Weights = {}
    for name in {name.rpartition(".")[0] for name in filled}:
        state: dict[str, Any] = {key: filled[f"{name}.{key}"].data for key in _TENSORS}
        # fp8_checkpoint makes a module restore its state at once, even before it has run.
        others = {"num_gemms": 1, "fp8_checkpoint": True}
        state |= {"recipe": get_fp8_recipe(config), "extra_fp8_variables": others}
        chunk, _, module = name.partition(".")
        packed = torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)
        found.setdefault(chunk, {})[module] = packed
    return found


def _extra_states(weights: Weights) -> dict[str, ShardedObject]:
    return {
        f"{chunk}.{name}": value
        for chunk, part in weights.items()
        for name, value in part.items()
        if isinstance(value, ShardedObject)
    }


def _sharded(state: ShardedObject, key: str, value: torch.Tensor) -> ShardedTensor:
    """Describe a tensor of a module. Modules of stacked layers add a leading dimension."""
    axes = [
        (axis, place, count)
        for axis, (place, count) in enumerate(zip(state.global_offset, state.global_shape, strict=True))
    ]
    return ShardedTensor.from_rank_offsets(
        f"{state.key}.{key}", value, *axes, replica_id=state.replica_id, prepend_axis_num=len(axes)
    )
