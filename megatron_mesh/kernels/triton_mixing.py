"""The Triton kernels behind ``mixing.py`` and their tiling.

A row is a token: there are S * B rows of H columns. States are passed as a tuple of pointers, so Triton
compiles a kernel for each number of states. A program issues all loads of a tile before it sums and stores,
so that the loads overlap. Neither the compiler nor the GPU would move a load ahead of a store.
"""

import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 8192
TILE = 2048
"""A program handles at least this many elements of a state: 16 for each of 128 threads."""
ELEMENTS_PER_WARP = 512


def forward(out: Tensor, weights: Tensor, states: tuple[Tensor, ...]) -> None:
    """Write ``sum_j weights[..., j] * states[j]`` to ``out`` [S, B, H]. All tensors are contiguous."""
    width = out.shape[-1]
    rows = out.numel() // width
    block_rows, block, warps = tile(width)
    grid = (triton.cdiv(rows, block_rows), triton.cdiv(width, block))
    _forward[grid](out, weights, states, rows, width, block_rows, block, num_warps=warps)


def backward(
    grad_weights: Tensor | None,
    grad_states: tuple[Tensor | None, ...],
    grad: Tensor,
    weights: Tensor,
    states: tuple[Tensor, ...],
) -> None:
    """Write the gradients of weights and states, except those that are None.

    The gradient of ``weights[..., j]`` is the dot product of ``grad`` and ``states[j]`` over H. The gradient
    of ``states[j]`` is ``weights[..., j] * grad``.
    """
    width = grad.shape[-1]
    rows = grad.numel() // width
    block_rows, block, warps = tile(width)
    slots = triton.next_power_of_2(len(states))
    arguments = (grad_weights, grad_states, grad, weights, states, rows, width, slots, block_rows, block)
    _backward[(triton.cdiv(rows, block_rows),)](*arguments, num_warps=warps)


def tile(width: int) -> tuple[int, int, int]:
    """Return the rows and columns of a program's tile, and its warps, for rows of ``width`` elements."""
    columns = min(triton.next_power_of_2(width), MAX_COLUMNS)
    rows = max(1, TILE // columns)
    return rows, columns, rows * columns // ELEMENTS_PER_WARP


@triton.jit
def _weights_of(weights, row, rows, J: tl.constexpr):
    found = ()
    for j in tl.static_range(J):
        found += (tl.load(weights + row * J + j, mask=row < rows),)  # type: ignore[assignment]
    return found


@triton.jit
def _forward(
    out,
    weights,
    states,
    rows,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    xs = [tl.load(state + at, mask=inside) for state in states]
    ws = _weights_of(weights, row, rows, len(states))
    total = tl.full((ROWS, BLOCK), 0.0, tl.float32)
    for j in tl.static_range(len(states)):
        total += ws[j][:, None] * xs[j].to(tl.float32)
    tl.store(out + at, total, mask=inside)


@triton.jit
def _backward(
    grad_weights,
    grad_states,
    grad,
    weights,
    states,
    rows,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, SLOTS)
    ws = _weights_of(weights, row, rows, len(states))
    dots = tl.full((ROWS, SLOTS), 0.0, tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
        at = row[:, None] * WIDTH + column[None, :]
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        if grad_weights is not None:
            xs = [tl.load(state + at, mask=inside, other=0.0) for state in states]
        for j in tl.static_range(len(states)):
            if grad_states[j] is not None:
                tl.store(grad_states[j] + at, ws[j][:, None] * g, mask=inside)
        if grad_weights is not None:
            for j in tl.static_range(len(states)):
                dot = tl.sum(g * xs[j].to(tl.float32), axis=1)
                dots += tl.where(slot == j, dot[:, None], 0.0)
    if grad_weights is not None:
        inside = (row < rows)[:, None] & (slot < len(states))[None, :]
        tl.store(grad_weights + row[:, None] * len(states) + slot[None, :], dots, mask=inside)
