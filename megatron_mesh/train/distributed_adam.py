"""Loading the distributed optimizer's state where its Adam is torch's own.

Without Transformer Engine and apex, Megatron-core 0.16.1 runs ``torch.optim.AdamW`` under its distributed
optimizer, and cannot load what it has saved: torch keeps a ``step`` with each parameter, which Megatron
keeps with the group, and which comes back as one tensor that all parameters share and would all advance.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer

# Gathered to whole tensors at saving, so that any layout of ranks can load them.
CHECKPOINT_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


def prepare_loading(optimizer: MegatronOptimizer) -> None:
    """Make every distributed optimizer in ``optimizer`` ready to load a checkpoint."""
    members = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    for member in members:
        if isinstance(member, DistributedOptimizer) and isinstance(member.optimizer, torch.optim.Optimizer):
            if not member.optimizer.state:
                member._init_optimizer_states_with_dummy_values()  # it loads into what is there
            _StepsApart.install(member)


class _StepsApart:
    """Stands for ``_set_main_param_and_optimizer_states`` of one optimizer."""

    def __init__(self, optimizer: DistributedOptimizer):
        self.optimizer = optimizer
        self.original = optimizer._set_main_param_and_optimizer_states

    @classmethod
    def install(cls, optimizer: DistributedOptimizer) -> None:
        if not isinstance(vars(optimizer).get("_set_main_param_and_optimizer_states"), cls):
            optimizer._set_main_param_and_optimizer_states = cls(optimizer)

    @torch.no_grad()
    def __call__(self, model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        group, order = self.optimizer.model_param_group_index_map[model_param]
        inner = self.optimizer.optimizer
        state = inner.state[inner.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        self.original(model_param, tensors)
