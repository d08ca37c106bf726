"""Run the loop around a ring of pipeline ranks: weights stay in place, activations circulate.

Each rank owns a part of the prelude, of the core and of the coda. A micro-batch goes round the ring K + 2
times, once per pass: prelude, K loops of the core, coda. To Megatron-core's interleaved schedule, pass v is
model chunk v. Our chunks hold no weights of their own: each is a view of the rank's weights that runs the
rank's part of one pass. With a shared core, chunks 1..K are the same layers.

Every pass starts on the first rank, so the recurrence and its stored states live there. Ranks exchange only
one hidden state [S, B, H] per pass.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mesh.compat.torch_internals import shallow_copy
from megatron_mesh.model import MeshGPTModel
from megatron_mesh.model.block import MeshTransformerBlock
from megatron_mesh.recurrence import LoopState
from megatron_mesh.runtime import profiling


class _AddLeafGradient(torch.autograd.Function):
    """Identity on ``x``. Its backward adds the gradient accumulated on ``leaf``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor) -> Tensor:
        ctx.leaf = leaf
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        accumulated, ctx.leaf.grad = ctx.leaf.grad, None
        return grad if accumulated is None else grad + accumulated, None


def carry(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x`` twice: in this pass's graph, and as a detached leaf for later passes.

    The leaf's gradient is added back here. Every pass of a micro-batch has its own autograd graph, and the
    backwards run from the last pass to the first. So the later passes have completed the leaf's gradient when
    this pass's backward starts.

    The ring uses this function as ``LoopState.share``.
    """
    if not torch.is_grad_enabled():
        return x, x
    leaf = x.detach().requires_grad_()
    return _AddLeafGradient.apply(x, leaf), leaf


class LoopStates:
    """The recurrence's state of each micro-batch in its forward; only the first rank has any."""

    def __init__(self, passes: int):
        self._last = passes - 1
        self._states: dict[int, LoopState] = {}

    def enter(self, index: int, microbatch: int) -> LoopState:
        """Return the state with which a micro-batch enters pass ``index``.

        The first pass creates the state and the last one removes it. The autograd graphs hold what the
        backwards need.
        """
        if index == 0:
            self._states[microbatch] = LoopState(share=carry)
        if index == self._last:
            return self._states.pop(microbatch)
        return self._states[microbatch]

    def __len__(self) -> int:
        return len(self._states)


class RingPass(torch.nn.Module):
    """One pass through this rank's part of a section; it replaces the ``decoder`` of a chunk."""

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
        """The layers and the pass itself: Megatron's schedule sets ``current_microbatch`` on each of them."""
        return [*self.section.layers, self]

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Set the input [S, B, H] received from the previous rank; None if the embedding is the input."""
        self.input_tensor = input_tensor

    def forward(self, hidden_states: Tensor | None, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """[S, B, H] -> [S, B, H]; see ``TransformerBlock.forward``."""
        x = self.input_tensor if hidden_states is None else hidden_states
        assert x is not None
        block = self.block
        with profiling.named(block.pass_name(self.index)):
            if block.recurrence is not None:
                x = block.enter(self.index, x, self.states.enter(self.index, self.current_microbatch))
            x = self.section(x, attention_mask, **kwargs)
        if block.final_layernorm is not None and self.index == len(block.passes) - 1:
            x = block.final_layernorm(x)
        return x


def ring_chunks(model: MeshGPTModel) -> list[MeshGPTModel]:
    """Return this rank's K + 2 chunks: copies of ``model`` that share its weights and run one pass each."""
    passes = len(model.decoder.passes)
    states = LoopStates(passes)
    return [_chunk(model, index, passes, states) for index in range(passes)]


def _chunk(model: MeshGPTModel, index: int, passes: int, states: LoopStates) -> MeshGPTModel:
    chunk = shallow_copy(model, decoder=RingPass(model.decoder, index, states))
    chunk.pre_process = model.pre_process and index == 0
    chunk.post_process = model.post_process and index == passes - 1
    chunk.vp_stage = index
    # Megatron's schedule marks these modules in the chunk's first micro-batch of a step
    # (set_is_first_microbatch). Only the section's first pass lists them, so each weight is cast to FP8 once.
    section = model.decoder.passes[index]
    first = model.decoder.passes.index(section) == index
    chunk.modules_with_is_first_microbatch = [
        module for module in section.modules() if first and hasattr(module, "is_first_microbatch")
    ]
    return chunk
