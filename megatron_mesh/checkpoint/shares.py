"""The share of every parameter that a rank writes and reads: weights, main parameters and Adam's moments.

With the distributed optimizer that is the rank's shard of the optimizer's state. What data-parallel ranks
hold alike (the plain optimizer's state) is cut into equal runs, one for each of them. Either way a resumed
rank reads its own share, and the others' come over the network: through Megatron's gather of parameters, or
by a broadcast of each run into its place.
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

from megatron_mesh.checkpoint.boxes import Box, run_as_boxes
from megatron_mesh.compat.megatron_model import copy_main_to_model_weights, optimizer_shard
from megatron_mesh.parallel import Stage

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
"""The main parameter of a bfloat16 weight; a float32 weight is its own."""

Run = tuple[int, int]


def state_key(name: str, weight: str) -> str:
    """Key in a checkpoint of what the optimizer holds of a weight: one of ``MOMENTS``, or ``MAIN``."""
    return f"optimizer.state.{name}.{weight}"


@dataclass(frozen=True)
class Share:
    """The run of a parameter's elements that this rank writes and reads, and what the rank holds of it."""

    place: ShardedTensor
    """The rank's parameter, and where it lies in the whole model's."""
    run: Run
    """From which element of it up to which."""
    first: int
    """Index of the first element in ``main`` and ``moments``: the run's start for a shard, 0 if this rank
    holds the whole parameter."""
    main: Tensor
    """Flat. The main parameter; the weight itself, if that is float32 or there is no optimizer."""
    moments: dict[str, Tensor]
    """Flat, by the names in ``MOMENTS``; none without an optimizer."""
    runs: dict[int, Run]
    """Runs of all data-parallel ranks, by rank. Empty with the distributed optimizer."""

    @property
    def writes_weight(self) -> bool:
        """Whether no other tensor- or pipeline-parallel rank writes the weight and its main parameter."""
        return not any(self.place.replica_id[:-1])

    @property
    def writes_moments(self) -> bool:
        """Whether no other tensor- or pipeline-parallel rank writes the moments.

        Of a tied embedding in a pipeline, the first rank writes the weight and the last one the moments.
        """
        tied = getattr(self.place.data, "shared_embedding", False)
        copy, *others = self.place.replica_id[:-1]
        return copy == int(tied) and not any(others)

    @property
    def has_main(self) -> bool:
        """Whether the optimizer keeps a separate float32 copy of the weight."""
        return self.main.dtype != self.place.dtype

    def to_write(self) -> Iterator[Box]:
        """Boxes of the weight and of what the optimizer holds."""
        if self.writes_weight and self.has_main:
            yield from self._boxes(self.place.key, self._weight())
            yield from self._boxes(state_key(MAIN, self.place.key), self._part(self.main))
        elif self.writes_weight:
            yield from self._boxes(self.place.key, self._part(self.main))
        if self.writes_moments:
            yield from self._moments()

    def to_read(self, *, with_optimizer: bool) -> Iterator[Box]:
        """Boxes to fill: of the main parameter, which is read from the weight if need be, and the moments."""
        named = with_optimizer and self.has_main
        key = state_key(MAIN, self.place.key) if named else self.place.key
        yield from self._boxes(key, self._part(self.main))
        if with_optimizer:
            yield from self._moments()

    def broadcast(self, *, with_optimizer: bool) -> None:
        """Hand this rank's run to the others that hold the same, and take theirs; a collective operation."""
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() == 1:
            return
        for tensor in (self.main, *(self.moments.values() if with_optimizer else ())):
            for rank, (start, end) in self.runs.items():
                dist.broadcast(tensor[start:end], dist.get_global_rank(group, rank), group)

    def _weight(self) -> Tensor:
        weight = self.place.data
        if is_float8tensor(weight):  # a checkpoint has what it was quantized from
            return self._part(self.main).to(self.place.dtype)
        return _flat(weight)[slice(*self.run)]

    def _moments(self) -> Iterator[Box]:
        for name, moment in self.moments.items():
            yield from self._boxes(state_key(name, self.place.key), self._part(moment))

    def _part(self, held: Tensor) -> Tensor:
        start, end = self.run
        return held[start - self.first : end - self.first]

    def _boxes(self, key: str, data: Tensor) -> Iterator[Box]:
        return run_as_boxes(key, self.place, *self.run, data)


def shares_of(optimizer: MegatronOptimizer | None, places: Sequence[ShardedTensor]) -> list[Share]:
    """This rank's shares.

    Args:
        optimizer: None for the weights alone.
        places: all of this rank's parameters, as from ``Stage.sharded_state_dict``.
    """
    if optimizer is None:
        return [Share(place, run, 0, _flat(place.data), {}, runs) for place, run, runs in _even_runs(places)]
    allocate(optimizer)
    member = only_member(optimizer)
    if isinstance(member, DistributedOptimizer):
        return [_shard(member, place) for place in places if place.data in member.model_param_gbuf_map]
    found = []
    for place, run, runs in _even_runs(places):
        main = getattr(place.data, "main_param", place.data)
        found.append(Share(place, run, 0, _flat(main), _moments(member, main), runs))
    return found


def spread(
    stage: Stage, optimizer: MegatronOptimizer | None, shares: Sequence[Share], *, with_optimizer: bool
) -> None:
    """Complete every rank's parameters after all have filled their shares; a collective operation."""
    for share in shares:
        share.broadcast(with_optimizer=with_optimizer)
    member = None if optimizer is None else only_member(optimizer)
    if member is not None:
        copy_main_to_model_weights(member)
    if isinstance(member, DistributedOptimizer):
        for group in stage.groups:
            group.start_param_sync(force_sync=True)


def only_member(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """The optimizer in a chain of one, as Megatron-core builds it for a model without experts."""
    if not isinstance(optimizer, ChainedOptimizer):
        return optimizer
    (member,) = optimizer.chained_optimizers
    return member


def allocate(optimizer: MegatronOptimizer) -> None:
    """Give parameters that were never updated their state: moments of zero."""
    inner = only_member(optimizer).optimizer
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state[parameter]
            if not state:
                if _counts_with_parameters(inner):
                    state["step"] = torch.tensor(0.0)
                state |= {name: torch.zeros_like(parameter) for name in MOMENTS}


def updates_done(optimizer: MegatronOptimizer) -> int:
    """How many updates Adam counts, by which it corrects the moments' bias."""
    inner = only_member(optimizer).optimizer
    if _counts_with_parameters(inner):
        counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
    else:
        counts = [int(group["step"]) for group in inner.param_groups if "step" in group]
    return max(counts, default=0)


def set_updates_done(optimizer: MegatronOptimizer, count: int) -> None:
    """The opposite of ``updates_done``; after ``allocate``."""
    inner = only_member(optimizer).optimizer
    if _counts_with_parameters(inner):
        for state in inner.state.values():
            state["step"].fill_(count)
    else:
        for group in inner.param_groups:
            group["step"] = count


def _counts_with_parameters(inner: Any) -> bool:
    """torch's Adam does; Transformer Engine's and apex's count with their groups."""
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


def _even_runs(places: Sequence[ShardedTensor]) -> Iterator[tuple[ShardedTensor, Run, dict[int, Run]]]:
    """Cut what data-parallel ranks hold alike into equal parts.

    All parameters are laid end to end, first those whose weights this rank's replicas write, then those that
    other ranks write too: where these are cut must not depend on the others.

    Yields:
        A parameter, this rank's run of its elements, and the runs by data-parallel rank.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for written in (True, False):
        chosen = [place for place in places if (not any(place.replica_id[:-1])) == written]
        total, begin = sum(place.data.numel() for place in chosen), 0
        for place in chosen:
            end = begin + place.data.numel()
            runs = {}
            for rank in _overlapping(begin, end, total, group.size()):
                cut = (total * rank // group.size(), total * (rank + 1) // group.size())
                start, stop = max(begin, cut[0]), min(end, cut[1])
                if start < stop:
                    runs[rank] = (start - begin, stop - begin)
            yield place, runs.get(group.rank(), (0, 0)), runs
            begin = end


def _overlapping(begin: int, end: int, total: int, ranks: int) -> range:
    """Ranks whose share of ``total`` elements, cut equally, overlaps ``begin`` to ``end``."""
    return range(begin * ranks // max(total, 1), -(-end * ranks // max(total, 1)))
