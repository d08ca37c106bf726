"""The time line of a step: every rank follows its order and waits for what its neighbours send."""

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
    """Spans of every rank in order, in the unit of the costs."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def step_time(self) -> float:
        """From the first forward to the end of the last backward of any rank."""
        return max(spans[-1].end for spans in self.spans)

    @property
    def busy(self) -> tuple[float, ...]:
        """Time in which each rank computes."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time in which they wait: 1 - sum(busy) / (ranks x step time)."""
        return 1 - sum(self.busy) / (len(self.spans) * self.step_time)

    @property
    def imbalance(self) -> float:
        """The part of it that is there because ranks have unequal work: 1 - mean(busy) / max(busy)."""
        return 1 - sum(self.busy) / (len(self.spans) * max(self.busy))

    @property
    def bubble_over_compute(self) -> float:
        """Waiting over computing: ranks x step time / sum(busy) - 1.

        It is (P-1) / (V m) where all chunks cost the same, V chunks a rank and m micro-batches
        (arXiv 2104.04473, sec. 2.2).
        """
        return len(self.spans) * self.step_time / sum(self.busy) - 1


def simulate(
    order: Sequence[Sequence[Step]], costs: Sequence[Sequence[Cost]], transfer: float = 0.0
) -> Timeline:
    """Run the steps of every rank as early as its order and its inputs allow.

    A chunk's forward needs the output of the rank before it (rank 0: of the last rank, one pass earlier),
    its backward the gradient of the rank behind. Messages are buffered, as with overlapped
    communication: nobody waits for a receiver.

    Args:
        order: steps of each rank.
        costs: [rank][chunk], in a unit of time of one's choice.
        transfer: time from the end of a step until its result is there on another rank.
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
        assert len(ends) > before, "the order of the schedule waits for itself"
    return Timeline(tuple(map(tuple, spans)))


def _needs(rank: int, step: Step, ranks: int, last_chunk: int) -> tuple[int, Step] | None:
    """The step, and its rank, whose result a step takes; None at either end of the network."""
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
