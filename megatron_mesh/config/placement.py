"""Which pipeline rank owns which layers of a looped model.

Prelude, core and coda are each cut into consecutive parts, one per rank, and a rank keeps its three parts
for good: the model's K + 2 passes go round the ring of ranks, and every pass takes each rank's part.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_mesh.config.derived import layout
from megatron_mesh.config.layers import LayerLayout
from megatron_mesh.config.schema import ModelConfig, ParallelConfig
from megatron_mesh.config.sizes import loss_in_layers
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES


@dataclass(frozen=True)
class Part:
    """What one rank holds of a looped model: layers by their number within the section, and the ends."""

    prelude: range
    core: range
    coda: range
    first: bool = True
    """Whether it holds the embedding and the recurrence."""
    last: bool = True
    """Whether it holds the final norm and the output projection."""

    @classmethod
    def whole(cls, layers: LayerLayout) -> "Part":
        """The model on one rank."""
        return cls(range(layers.prelude), range(layers.core), range(layers.coda))


@dataclass(frozen=True)
class Placement:
    """Layers of each section on each pipeline rank; where cores are not shared, of each of them."""

    prelude: tuple[int, ...]
    core: tuple[int, ...]
    coda: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Size of the pipeline."""
        return len(self.core)

    def sections(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and parts of prelude, core and coda."""
        yield from (("prelude", self.prelude), ("core", self.core), ("coda", self.coda))

    def span(self, section: str, rank: int) -> tuple[int, int]:
        """First layer, and the one after the last, that ``rank`` owns of a section (counted in it)."""
        parts = getattr(self, section)
        first = sum(parts[:rank])
        return first, first + parts[rank]

    def part(self, rank: int) -> Part:
        """What ``rank`` holds."""
        layers = {name: range(*self.span(name, rank)) for name, _ in self.sections()}
        return Part(**layers, first=rank == 0, last=rank == self.ranks - 1)

    def __str__(self) -> str:
        return "/".join(",".join(map(str, parts)) for _, parts in self.sections())


def placement(model: ModelConfig, parallel: ParallelConfig) -> Placement:
    """The placement of a resolved, looped model.

    Raises:
        UserError: ``pipeline_model_parallel_layout`` is not one of this model and pipeline.
    """
    layers, ranks = layout(model), parallel.pipeline_model_parallel_size
    even = _balanced(model, layers, parallel)
    if parallel.pipeline_model_parallel_layout is None:
        return even
    wanted = parse_placement(parallel.pipeline_model_parallel_layout)
    totals = {"prelude": layers.prelude, "core": layers.core, "coda": layers.coda}
    for name, parts in wanted.sections():
        if len(parts) != ranks or sum(parts) != totals[name]:
            raise UserError(
                f"--pipeline-model-parallel-layout {wanted}: the {name} has the parts {parts}, and "
                f"--pipeline-model-parallel-size {ranks} with --layers {layers} needs {ranks} parts that "
                f"make {totals[name]}; an even one is {even}"
            )
    return wanted


def parse_placement(text: str) -> Placement:
    """Read ``2,2/4,4/3,1``: layers per rank of prelude, core and coda (UserError if it is not that)."""
    try:
        parts = [tuple(int(n) for n in section.split(",")) for section in text.split("/")]
        if len(parts) != 3 or min(n for section in parts for n in section) < 0:
            raise ValueError(text)
    except ValueError:
        raise UserError(
            f"--pipeline-model-parallel-layout {text!r} is not prelude/core/coda with the layers of each "
            "rank, for example 2,2/4,4/3,1 for two ranks and --layers 4+8R2+4"
        ) from None
    return Placement(*parts)


def _balanced(model: ModelConfig, layers: LayerLayout, parallel: ParallelConfig) -> Placement:
    """As even as possible; what does not divide goes away from the embedding and from the loss.

    Where that would leave a rank without any layer, it goes to the ranks that hold least so far.
    """
    ranks = parallel.pipeline_model_parallel_size
    embedding = 1.0 if parallel.account_for_embedding_in_pipeline_split else 0.0
    loss = loss_in_layers(model) if parallel.account_for_loss_in_pipeline_split else 0.0
    inner = [0.0] * (ranks - 1)

    def spread(*, fill: bool) -> Placement:
        held = [0] * ranks if fill else None
        core = _spread(layers.core, [0.0, *inner], 0, held)
        prelude = _spread(layers.prelude, [embedding, *inner], 0, held)
        return Placement(prelude, core, _spread(layers.coda, [*inner, loss], ranks - 1, held))

    even = spread(fill=False)
    return even if all(map(sum, zip(even.prelude, even.core, even.coda, strict=True))) else spread(fill=True)


def _spread(layers: int, load: list[float], away_from: int, held: list[int] | None = None) -> tuple[int, ...]:
    """Give each layer to the rank with the least load, among equals the one farthest from ``away_from``.

    Args:
        held: layers of other parts by rank, which decide among equals first; these layers are added.
    """
    counts = [0] * len(load)
    for _ in range(layers):
        others = held or counts
        rank = min(range(len(load)), key=lambda r: (load[r] + counts[r], others[r], -abs(r - away_from)))
        counts[rank] += 1
        if held:
            held[rank] += 1
    return tuple(counts)


def virtual_stages(model: ModelConfig, parallel: ParallelConfig) -> int | None:
    """Model chunks of each pipeline rank in Megatron-core's interleaved schedule; None without one."""
    if parallel.pipeline_model_parallel_size == 1:
        return None
    if SCHEMES[model.recurrence].has_loop:
        return layout(model).loops + 2
    chunks = parallel.num_virtual_stages_per_pipeline_rank
    return None if chunks == 1 else chunks


def microbatch_group_size(parallel: ParallelConfig, micro_batches: int) -> int:
    """Micro-batches that pass one chunk before the next chunk's turn, of ``micro_batches`` per step.

    The setting, or else the smallest that fits: every group, the last one too, must have a micro-batch for
    each rank, or the pipeline would stall (Megatron-core's ``schedules.py`` refuses it).

    Raises:
        UserError: the setting does not fit.
    """
    ranks, wanted = parallel.pipeline_model_parallel_size, parallel.microbatch_group_size_per_virtual_stage
    fitting = [g for g in range(ranks, micro_batches + 1) if not 0 < micro_batches % g < ranks]
    if wanted is None:
        return fitting[0]
    if wanted not in fitting:
        near = min(fitting, key=lambda g: abs(g - wanted))
        raise UserError(
            f"--microbatch-group-size-per-virtual-stage {wanted} does not fit {micro_batches} micro-batches "
            f"on {ranks} pipeline ranks (it must be from {ranks} to {micro_batches}, and the last group must "
            f"not be smaller than {ranks}); the nearest that fits: {near}"
        )
    return wanted
