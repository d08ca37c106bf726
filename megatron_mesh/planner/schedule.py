"""Simulate a training step: every rank follows its order and waits for its neighbours' messages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_mesh.planner.costs import Cost
from megatron_mesh.planner.order import Step


class Span(NamedTuple):
    """When a rank runs a step."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of every rank in order, in the unit of the costs."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def step_time(self) -> float:
        """Time from the first forward to the end of the last backward on any rank."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time that each rank spends computing."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time that they spend waiting: 1 - sum(busy) / (ranks x step time)."""
        return 1 - sum(self.busy) / (len(self.spans) * self.step_time)

    @property
    def imbalance(self) -> float:
        """Part of the bubble that comes from unequal work: 1 - mean(busy) / max(busy)."""
        return 1 - sum(self.busy) / (len(self.spans) * max(self.busy))

    @property
    def bubble_over_compute(self) -> float:
        """Ratio of waiting to computing: ranks x step time / sum(busy) - 1.

        If all chunks cost the same, this is (P-1) / (V m) for P ranks with V chunks each and m micro-batches
        (arXiv 2104.04473, sec. 2.2).
        """
        return len(self.spans) * self.step_time / sum(self.busy) - 1


def simulate(
    order: Sequence[Sequence[Step]], costs: Sequence[Sequence[Cost]], transfer: float = 0.0
) -> Timeline:
    """Run every rank's steps as early as its order and its inputs allow.

    A chunk's forward needs the output of the previous rank (on rank 0: of the last rank, one pass earlier).
    Its backward needs the gradient from the next rank. Messages are buffered, as with overlapped
    communication, so no sender waits for its receiver.

    Args:
        order: the steps of each rank.
        costs: [rank][chunk], in any unit of time.
        transfer: time from the end of a step until its result arrives on another rank.
    """
    ranks, last_chunk = len(order), len(costs[0]) - 1
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    ends: dict[tuple[int, Step], float] = {}
    total = sum(map(len, order))
    while len(ends) < total:
        before = len(ends)
        for rank, steps in enumerate(order):
            done = spans[rank]
            while len(done) < len(steps):
                step = steps[len(done)]
                start = done[-1].end if done else 0.0
                source = _needs(rank, step, ranks, last_chunk)
                if source is not None:
                    if source not in ends:
                        break
                    start = max(start, ends[source] + (transfer if source[0] != rank else 0.0))
                cost = costs[rank][step.chunk]
                end = start + (cost.backward if step.backward else cost.forward)
                done.append(Span(step, start, end))
                ends[rank, step] = end
        assert len(ends) > before, "deadlock: the schedule's order waits for itself"
    return Timeline(tuple(map(tuple, spans)))


def _needs(rank: int, step: Step, ranks: int, last_chunk: int) -> tuple[int, Step] | None:
    """Return the step whose result this step needs, with its rank; None for the first chunk's forward."""
    backward, chunk, _ = step
    if not backward:
        if rank > 0:
            return rank - 1, step
        return (ranks - 1, step._replace(chunk=chunk - 1)) if chunk > 0 else None
    if rank < ranks - 1:
        return rank + 1, step
    if chunk < last_chunk:
        return 0, step._replace(chunk=chunk + 1)
    return rank, step._replace(backward=False)
