"""Divides parameters and optimizer state between ranks, for writing and reading checkpoints.

With the distributed optimizer, a rank's share is its shard of the optimizer's state. Without it, all
data-parallel ranks hold the same state, which is cut into equal spans, one per rank. In both cases a rank
reads only its own share when it resumes. It receives the rest over the network: from Megatron's parameter
all-gather, or from a broadcast of each span.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer, MegatronOptimizer
from torch import Tensor

from megatron_mesh.checkpoint.index import Box, span_as_boxes
from megatron_mesh.compat.megatron_model import copy_main_to_model_weights, optimizer_shard
from megatron_mesh.parallel import Stage

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
"""Name of the main parameter of a bfloat16 weight. A float32 weight is its own main parameter."""

Span = tuple[int, int]


def state_key(name: str, weight: str) -> str:
    """Return the checkpoint key of a weight's optimizer state ``name``: one of ``MOMENTS``, or ``MAIN``."""
    return f"optimizer.state.{name}.{weight}"


@dataclass(frozen=True)
class Share:
    """The span of a parameter that this rank writes and reads, with the tensors that hold it."""

    place: ShardedTensor
    """The rank's parameter, and its position in the parameter of the whole model."""
    span: Span
    """First element (inclusive) and last element (exclusive) of the span in the rank's parameter."""
    first: int
    """Element at which ``main`` and ``moments`` begin: the span's start for an optimizer shard, else 0."""
    main: Tensor
    """The main parameter, flat. It is the weight itself if that is float32 or there is no optimizer."""
    moments: dict[str, Tensor]
    """Adam's moments, flat, by the names in ``MOMENTS``. Empty without an optimizer."""
    spans: dict[int, Span]
    """The spans of all data-parallel ranks. Empty with the distributed optimizer."""

    @property
    def writes_weight(self) -> bool:
        """Whether this rank's tensor- and pipeline-parallel position writes the weight and main parameter."""
        return not any(self.place.replica_id[:-1])

    @property
    def writes_moments(self) -> bool:
        """Whether this rank's tensor- and pipeline-parallel position writes the moments.

        For a tied embedding in a pipeline, the first rank writes the weight and the last one the moments.
        """
        tied = getattr(self.place.data, "shared_embedding", False)
        copy, *others = self.place.replica_id[:-1]
        return copy == int(tied) and not any(others)

    @property
    def has_main(self) -> bool:
        """Whether the optimizer has a separate float32 copy of the weight."""
        return self.main.dtype != self.place.dtype

    def to_write(self) -> Iterator[Box]:
        """Yield boxes of the weight, the main parameter and the moments."""
        if self.writes_weight and self.has_main:
            yield from self._boxes(self.place.key, self._weight())
            yield from self._boxes(state_key(MAIN, self.place.key), self._part(self.main))
        elif self.writes_weight:
            yield from self._boxes(self.place.key, self._part(self.main))
        if self.writes_moments:
            yield from self._moments()

    def to_read(self, *, with_optimizer: bool) -> Iterator[Box]:
        """Yield boxes to read into the main parameter and, ``with_optimizer``, the moments.

        Without the optimizer, the main parameter is read from the weight.
        """
        named = with_optimizer and self.has_main
        key = state_key(MAIN, self.place.key) if named else self.place.key
        yield from self._boxes(key, self._part(self.main))
        if with_optimizer:
            yield from self._moments()

    def broadcast(self, *, with_optimizer: bool) -> None:
        """Exchange spans with the data-parallel ranks that hold the same parameter. Collective."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() == 1:
            return
        for tensor in (self.main, *(self.moments.values() if with_optimizer else ())):
            for rank, (start, end) in self.spans.items():
                dist.broadcast(tensor[start:end], dist.get_global_rank(group, rank), group)

    def _weight(self) -> Tensor:
        weight = self.place.data
        if is_float8tensor(weight):  # save the values before quantization
            return self._part(self.main).to(self.place.dtype)
        return _flat(weight)[slice(*self.span)]

    def _moments(self) -> Iterator[Box]:
        for name, moment in self.moments.items():
            yield from self._boxes(state_key(name, self.place.key), self._part(moment))

    def _part(self, held: Tensor) -> Tensor:
        start, end = self.span
        return held[start - self.first : end - self.first]

    def _boxes(self, key: str, data: Tensor) -> Iterator[Box]:
        return span_as_boxes(key, self.place, *self.span, data)


def build_shares(optimizer: MegatronOptimizer | None, places: Sequence[ShardedTensor]) -> list[Share]:
    """Return this rank's shares.

    Args:
        optimizer: None for weights only.
        places: all of this rank's parameters, from ``Stage.sharded_state_dict``.
    """
    if optimizer is None:
        return [
            Share(place, span, 0, _flat(place.data), {}, spans) for place, span, spans in _even_spans(places)
        ]
    allocate(optimizer)
    member = only_member(optimizer)
    if isinstance(member, DistributedOptimizer):
        return [_shard(member, place) for place in places if place.data in member.model_param_gbuf_map]
    found = []
    for place, span, spans in _even_spans(places):
        main = getattr(place.data, "main_param", place.data)
        found.append(Share(place, span, 0, _flat(main), _moments(member, main), spans))
    return found


def complete_parameters(
    stage: Stage, optimizer: MegatronOptimizer | None, shares: Sequence[Share], *, with_optimizer: bool
) -> None:
    """Complete every rank's parameters after all ranks have read their shares. A collective operation."""
    for share in shares:
        share.broadcast(with_optimizer=with_optimizer)
    member = None if optimizer is None else only_member(optimizer)
    if member is not None:
        copy_main_to_model_weights(member)
    if isinstance(member, DistributedOptimizer):
        for group in stage.groups:
            group.start_param_sync(force_sync=True)


def only_member(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Return the optimizer in a chain of one, which Megatron-core builds for models without experts."""
    if not isinstance(optimizer, ChainedOptimizer):
        return optimizer
    (member,) = optimizer.chained_optimizers
    return member


def allocate(optimizer: MegatronOptimizer) -> None:
    """Create the state of parameters that were never updated: moments of zero."""
    inner = only_member(optimizer).optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            if not state:
                if _counts_with_parameters(inner):
                    state["step"] = torch.tensor(0.0)
                state |= {name: torch.zeros_like(parameter) for name in MOMENTS}


def updates_done(optimizer: MegatronOptimizer) -> int:
    """Return how many updates Adam has counted. It corrects the bias of the moments by that number."""
    inner = only_member(optimizer).optimizer
    if _counts_with_parameters(inner):
        counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
    else:
        counts = [int(group["step"]) for group in inner.param_groups if "step" in group]
    return max(counts, default=0)


def set_updates_done(optimizer: MegatronOptimizer, count: int) -> None:
    """Set the number that ``updates_done`` returns. Call ``allocate`` first."""
    inner = only_member(optimizer).optimizer
    if _counts_with_parameters(inner):
        for state in inner.state.values():
            state["step"].fill_(count)
    else:
        for group in inner.param_groups:
            group["step"] = count


def _counts_with_parameters(inner: Any) -> bool:
    """Return whether Adam counts updates per parameter, as torch's does, or per group (TE's and apex's)."""
    return isinstance(inner, torch.optim.Adam)


def _shard(optimizer: DistributedOptimizer, place: ShardedTensor) -> Share:
    start, end = optimizer_shard(optimizer, place.data)
    group, order = optimizer.model_param_group_index_map[place.data]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    return Share(place, (start, end), start, _flat(main), _moments(optimizer, main), {})


def _moments(optimizer: MegatronOptimizer, main: Tensor) -> dict[str, Tensor]:
    return {name: _flat(optimizer.optimizer.state[main][name]) for name in MOMENTS}


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1)


def _even_spans(places: Sequence[ShardedTensor]) -> Iterator[tuple[ShardedTensor, Span, dict[int, Span]]]:
    """Divide parameters that all data-parallel ranks hold into equal spans.

    Parameters are concatenated and cut: first those whose weights this rank's data-parallel group writes,
        then
    those that another group writes as well. The cuts of either kind must not depend on the other.

    Yields:
        A parameter, this rank's span of it, and the spans of all data-parallel ranks.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for written in (True, False):
        chosen = [place for place in places if (not any(place.replica_id[:-1])) == written]
        total, begin = sum(place.data.numel() for place in chosen), 0
        for place in chosen:
            end = begin + place.data.numel()
            spans = {}
            for rank in _overlapping(begin, end, total, group.size()):
                cut = (total * rank // group.size(), total * (rank + 1) // group.size())
                start, stop = max(begin, cut[0]), min(end, cut[1])
                if start < stop:
                    spans[rank] = (start - begin, stop - begin)
            yield place, spans.get(group.rank(), (0, 0)), spans
            begin = end


def _overlapping(begin: int, end: int, total: int, ranks: int) -> range:
    """Return the ranks whose equal share of ``total`` elements overlaps with ``begin`` to ``end``."""
    return range(begin * ranks // max(total, 1), -(-end * ranks // max(total, 1)))
