"""The loop round a ring of pipeline ranks: weights stay where they are, activations circulate.

Each rank holds its part of prelude, core and coda. The K + 2 passes of the unrolled network are the model
chunks of Megatron-core's interleaved schedule: chunk v is a view onto the rank's weights that runs its part
of pass v, so the chunks 1..K of a shared core are the same layers. What the recurrence keeps from pass to
pass stays on the first rank, where each pass begins: one hidden state [S, B, H] is all that crosses from
rank to rank.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mesh.compat.torch_internals import shallow_copy
from megatron_mesh.model import MeshGPTModel
from megatron_mesh.model.block import MeshTransformerBlock
from megatron_mesh.recurrence import LoopState
from megatron_mesh.runtime import ranges


class _AddLeafGradient(torch.autograd.Function):
    """The identity on ``x``, whose backward adds the gradient that has gathered on ``leaf``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        gathered, ctx.leaf.grad = ctx.leaf.grad, None
        return grad if gathered is None else grad + gathered, None


def carry(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` twice: in this pass's graph, and as a detached leaf for later passes.

    The leaf's gradient is added back here. Each pass of a micro-batch is a graph of its own, and the backward
    passes run in descending order, so the leaf's gradient is complete when the backward of this pass begins.
    This is ``LoopState.share`` of a ring.
    """
    if not torch.is_grad_enabled():
        return x, x
    leaf = x.detach().requires_grad_()
    return _AddLeafGradient.apply(x, leaf), leaf


class LoopStates:
    """The recurrence's state of every micro-batch under way; only the first rank has any."""

    def __init__(self, passes: int):
        self._last = passes - 1
        self._states: dict[int, LoopState] = {}

    def enter(self, index: int, microbatch: int) -> LoopState:
        """The state with which a micro-batch enters pass ``index``; nobody asks again after the last.

        What the backward passes need is held by their graphs.
        """
        if index == 0:
            self._states[microbatch] = LoopState(share=carry)
        if index == self._last:
            return self._states.pop(microbatch)
        return self._states[microbatch]

    def __len__(self) -> int:
        return len(self._states)


class RingPass(torch.nn.Module):
    """One pass through this rank's part of a section: the ``decoder`` of a chunk."""

    def __init__(self, block: MeshTransformerBlock, index: int, states: LoopStates):
        super().__init__()
        self.block = block
        self.index = index
        self.states = states
        self.section = block.passes[index]
        self.input_tensor: Tensor | None = None
        self.current_microbatch = 0

    @property
    def layers(self) -> list[torch.nn.Module]:
        """What the schedule tells the number of the micro-batch: the layers, and the pass itself."""
        return [*self.section.layers, self]

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Take what the previous rank sent [S, B, H]; None where the embedding comes instead."""
        self.input_tensor = input_tensor

    def forward(self, hidden_states: Tensor | None, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """[S, B, H] -> [S, B, H]; see ``TransformerBlock.forward``."""
        x = self.input_tensor if hidden_states is None else hidden_states
        assert x is not None
        block = self.block
        with ranges.named(block.pass_name(self.index)):
            if block.recurrence is not None:
                x = block.enter(self.index, x, self.states.enter(self.index, self.current_microbatch))
            x = self.section(x, attention_mask, **kwargs)
        if block.final_layernorm is not None and self.index == len(block.passes) - 1:
            x = block.final_layernorm(x)
        return x


def ring_chunks(model: MeshGPTModel) -> list[MeshGPTModel]:
    """The K + 2 chunks of this rank: copies of ``model`` that share its weights and run one pass each."""
    passes = len(model.decoder.passes)
    states = LoopStates(passes)
    return [_chunk(model, index, passes, states) for index in range(passes)]


def _chunk(model: MeshGPTModel, index: int, passes: int, states: LoopStates) -> MeshGPTModel:
    chunk = shallow_copy(model, decoder=RingPass(model.decoder, index, states))
    chunk.pre_process = model.pre_process and index == 0
    chunk.post_process = model.post_process and index == passes - 1
    chunk.vp_stage = index
    # What Megatron's schedule marks in this chunk's first micro-batch of a step (set_is_first_microbatch):
    # a section is marked by its first pass alone, so that its weights are cast to FP8 once.
    section = model.decoder.passes[index]
    first = model.decoder.passes.index(section) == index
    chunk.modules_with_is_first_microbatch = [
        module for module in section.modules() if first and hasattr(module, "is_first_microbatch")
    ]
    return chunk
