"""The MeSH memory (arXiv 2510.07739, sec. 3), computed exactly in two ways: factored, or slot by slot.

Slot 0 starts as the embedding, the others as zero. A cycle writes ``slot_b += w_b * o`` and then reads
``sum_b r_b * slot_b``. The slots are linear in the outputs written to them, so

    read_t = r_0 * h_emb + sum_{j<=t} (sum_b r_b * w_b^j) * o_j.

The factored computation therefore needs only the states h_emb, o_0..o_K and N numbers per token and cycle. It
saves K + 2 tensors for backward. Updating N slots in K + 1 cycles under autograd saves (N + 1)(K + 1).
"""

import torch
from torch import Tensor

from .mixing import Mix, at_least_fp32
from .schemes import LoopState


def factored_cycle(o: Tensor, w: Tensor, r: Tensor, state: LoopState, mix: Mix) -> Tensor:
    """Write ``o`` [S, B, H] with weights ``w`` [S, B, N], then read with weights ``r`` [S, B, N].

    Adds ``o`` and ``w`` to ``state``, which must have ``kept["h_emb"]``.
    """
    w, w_later = state.share(w)
    o, o_later = state.share(o)
    gains = [r[..., 0], *((r * w_j).sum(-1) for w_j in (*state.writes, w))]
    outputs = [*state.outputs, o]
    state.writes.append(w_later)
    state.outputs.append(o_later)
    return mix(torch.stack(gains, dim=-1), [state.kept["h_emb"], *outputs])


def slots_cycle(o: Tensor, w: Tensor, r: Tensor, state: LoopState, mix: Mix) -> Tensor:
    """Do the same by updating every slot: slow, and the reference for ``factored_cycle``."""
    slots = state.kept.get("slots")
    if slots is None:
        h_emb = at_least_fp32(state.kept["h_emb"])
        slots = torch.stack([h_emb] + [torch.zeros_like(h_emb)] * (w.shape[-1] - 1))
    slots = slots + w.movedim(-1, 0).unsqueeze(-1) * o
    slots = state.keep("slots", slots)
    return (r.movedim(-1, 0).unsqueeze(-1) * slots).sum(0).to(o.dtype)


CYCLES = {"factored": factored_cycle, "slots": slots_cycle}
