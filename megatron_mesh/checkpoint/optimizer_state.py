"""One form on disk for the state of the plain and the distributed optimizer: each loads the other's.

For every weight ``optimizer.state.exp_avg.<weight>``, ``exp_avg_sq`` and, where weights are bfloat16,
``fp32_param``, the main parameter (a float32 weight is its own); and settings and step of the groups.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer import param_group_identifier_keys

from megatron_mesh.checkpoint.distributed_optimizer import CHECKPOINT_METADATA, prepare_loading


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, weights: ShardedStateDict, *, bf16: bool, loading: bool
) -> ShardedStateDict:
    """This rank's part of the optimizer's state, to be written or to be filled."""
    if loading:
        prepare_loading(optimizer)
    state = optimizer.sharded_state_dict(weights, is_loading=loading, metadata=CHECKPOINT_METADATA)
    for entry in state.get("param_state", {}).values():  # of the distributed optimizer
        if bf16:
            entry["param"].key = entry["param"].key.replace("state.param.", "state.fp32_param.", 1)
        else:
            del entry["param"]
    return state


def load_optimizer_state(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    """Take over what was loaded into ``sharded_optimizer_state``, of whichever kind it was when saved."""
    member = _only_member(optimizer)
    inner = saved.get("optimizer", saved)
    groups, step = inner["param_groups"], _step(inner)
    if isinstance(member, DistributedOptimizer):
        fresh = member.state_dict()
        _adopt(fresh["optimizer"]["param_groups"], groups, step=step)
        fresh |= {"param_state": saved["param_state"]}
        fresh["param_state_sharding_type"] = CHECKPOINT_METADATA["distrib_optim_sharding_type"]
    else:
        fresh = member.state_dict()
        ours = fresh.get("optimizer", fresh)
        # A float32 model's state is beside the groups that a distributed optimizer has saved.
        ours["state"] = {**inner.get("state", {}), **saved.get("state", {})}
        ours["state"].pop("common_step", None)
        if isinstance(member.optimizer, torch.optim.Adam):
            _adopt(ours["param_groups"], groups)
            ours["state"]["common_step"] = step
        else:  # Transformer Engine's and apex's FusedAdam count with the groups
            _adopt(ours["param_groups"], groups, step=step)
        if "fp32_from_fp16_params" in saved:
            fresh["fp32_from_fp16_params"] = saved["fp32_from_fp16_params"]
    optimizer.load_state_dict(fresh)


def _only_member(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    if not isinstance(optimizer, ChainedOptimizer):
        return optimizer
    (member,) = optimizer.chained_optimizers  # a model without experts has one
    return member


def _step(inner: dict[str, Any]) -> int:
    """Updates done: they are with the state (plain optimizer, torch's Adam) or else with the groups."""
    if "common_step" in inner.get("state", {}):
        return int(inner["state"]["common_step"])
    return int(inner["param_groups"][0]["step"])


def _adopt(ours: list[dict[str, Any]], saved: list[dict[str, Any]], **more: Any) -> None:
    """Give our groups the settings of the saved ones; their members are ours."""
    by_kind = {_kind(group): group for group in saved}
    for group in ours:
        settings = by_kind[_kind(group)]
        group |= {name: settings[name] for name in group if name in settings and name != "params"}
        group |= more


def _kind(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group[name] for name in param_group_identifier_keys)
