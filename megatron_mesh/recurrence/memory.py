"""Two exact computations of the MeSH memory (arXiv 2510.07739, sec. 3): written-out slots, factored.

Slot 0 starts as the embedding, the others as zero. A cycle writes ``slot_b += w_b * o`` and then
reads ``sum_b r_b * slot_b``. Since the slots are linear in what was written,

    read_t = r_0 * h_emb + sum_{j<=t} (sum_b r_b * w_b^j) * o_j,

so the states h_emb, o_0..o_K and N numbers per token and cycle are enough: K + 2 tensors kept for
backward, where writing N slots in K + 1 cycles and letting autograd save them keeps (N + 1)(K + 1).
"""

import torch
from torch import Tensor

from .mixing import Mix, at_least_fp32
from .schemes import LoopState


def factored_cycle(o: Tensor, w: Tensor, r: Tensor, state: LoopState, mix: Mix) -> Tensor:
    """Write ``o`` [S, B, H] with weights ``w`` [S, B, N], then read with ``r`` [S, B, N].

    Keeps ``o`` and ``w`` in ``state``; expects ``state.kept["h_emb"]``.
    """
    w, w_later = state.share(w)
    o, o_later = state.share(o)
    gains = [r[..., 0], *((r * w_j).sum(-1) for w_j in (*state.writes, w))]
    outputs = [*state.outputs, o]
    state.writes.append(w_later)
    state.outputs.append(o_later)
    return mix(torch.stack(gains, dim=-1), [state.kept["h_emb"], *outputs])


def slots_cycle(o: Tensor, w: Tensor, r: Tensor, state: LoopState, mix: Mix) -> Tensor:
    """The same, literally: every slot is written out. Slow; the reference for ``factored_cycle``."""
    slots = state.kept.get("slots")
    if slots is None:
        h_emb = at_least_fp32(state.kept["h_emb"])
        slots = torch.stack([h_emb] + [torch.zeros_like(h_emb)] * (w.shape[-1] - 1))
    slots = slots + w.movedim(-1, 0).unsqueeze(-1) * o
    slots = state.keep("slots", slots)
    return (r.movedim(-1, 0).unsqueeze(-1) * slots).sum(0).to(o.dtype)


CYCLES = {"factored": factored_cycle, "slots": slots_cycle}
