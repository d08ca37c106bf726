"""The chunks and layers of each pipeline rank, on which all other estimates of the planner build."""

from dataclasses import dataclass

from megatron_mesh.config.layout import LayerLayout, layout
from megatron_mesh.config.placement import microbatch_group_size, placement
from megatron_mesh.config.schema import Config
from megatron_mesh.recurrence import SCHEMES


@dataclass(frozen=True)
class Chunk:
    """A rank's share of one pass: what it computes for a micro-batch before it sends the state on."""

    name: str
    """prelude, core 1, ..., coda; or chunk 1, ... for a plain model."""
    sections: tuple[int, ...]
    """Layers of each ``TransformerBlock`` that runs. Recomputation groups layers within a section."""
    enters: tuple[int, ...] = ()
    """Passes, from 0, whose input the recurrence makes in this chunk (``Scheme.enter``)."""
    embedding: bool = False
    """Whether it starts with the embedding."""
    head: bool = False
    """Whether it ends with the final norm, the output projection and the loss."""
    core: int = 0
    """How many of the layers belong to the core; all layers of a plain model do."""

    @property
    def layers(self) -> int:
        """Number of layers that the chunk runs."""
        return sum(self.sections)


@dataclass(frozen=True)
class Pipeline:
    """The chunks of every rank, and the number of micro-batches in a step."""

    chunks: tuple[tuple[Chunk, ...], ...]
    """[rank][chunk]."""
    layers: tuple[int, ...]
    """Distinct layers on each rank: a shared core counts once."""
    micro_batches: int
    group: int | None = None
    """Micro-batches that run through one chunk before the next chunk's turn; None if a rank has one chunk."""
    loops: int = 1
    """How often a core layer runs with the same weights."""

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks, P."""
        return len(self.chunks)

    @property
    def chunks_per_rank(self) -> int:
        """Number of chunks on each rank, V: one for each pass of a ring."""
        return len(self.chunks[0])

    def core_layers(self, rank: int) -> int:
        """Distinct core layers on ``rank``."""
        return sum(chunk.core for chunk in self.chunks[rank]) // self.loops


def pipeline(config: Config, data_parallel: int) -> Pipeline:
    """Build the pipeline of a resolved run with ``data_parallel`` replicas."""
    training, parallel = config.training, config.parallel
    assert training.global_batch_size is not None, "resolve() fills in global_batch_size"
    micro_batches = training.global_batch_size // (training.micro_batch_size * data_parallel)
    ranks = parallel.pipeline_model_parallel_size
    if ranks == 1:
        return _one_rank(config, micro_batches)
    if not SCHEMES[config.model.recurrence].has_loop:
        return _plain(config, micro_batches)
    return _ring(config, micro_batches)


def _one_rank(config: Config, micro_batches: int) -> Pipeline:
    layers, scheme = layout(config.model), SCHEMES[config.model.recurrence]
    sections: tuple[int, ...] = (layers.depth,)
    enters: tuple[int, ...] = ()
    core = layers.depth
    if scheme.has_loop:
        sections = (layers.prelude, *[layers.core] * layers.loops, layers.coda)
        enters = tuple(range(layers.loops + 2))
        core = layers.loops * layers.core
    chunk = Chunk("all layers", sections, enters, embedding=True, head=True, core=core)
    return Pipeline(((chunk,),), (layers.unique_layers,), micro_batches, loops=_shared_loops(layers))


def _shared_loops(layers: LayerLayout) -> int:
    return layers.loops if layers.shared else 1


def _plain(config: Config, micro_batches: int) -> Pipeline:
    """Megatron-core's own stages: chunks of equal size, assigned to the ranks in turn."""
    parallel, depth = config.parallel, layout(config.model).depth
    ranks = parallel.pipeline_model_parallel_size
    virtual = parallel.num_virtual_stages_per_pipeline_rank or 1
    group = microbatch_group_size(parallel, micro_batches) if virtual > 1 else None
    return plain_pipeline(depth, ranks, virtual, micro_batches, group)


def plain_pipeline(depth: int, ranks: int, virtual: int, micro_batches: int, group: int | None) -> Pipeline:
    """Split ``depth`` distinct layers evenly over ``ranks`` with ``virtual`` chunks each."""
    assert depth % (ranks * virtual) == 0, (depth, ranks, virtual)
    chunks = tuple(
        tuple(
            Chunk(
                f"chunk {v + 1}",
                (depth // (ranks * virtual),),
                embedding=v == 0 and rank == 0,
                head=v == virtual - 1 and rank == ranks - 1,
                core=depth // (ranks * virtual),
            )
            for v in range(virtual)
        )
        for rank in range(ranks)
    )
    return Pipeline(chunks, (depth // ranks,) * ranks, micro_batches, group)


def _ring(config: Config, micro_batches: int) -> Pipeline:
    parts, layers = placement(config.model, config.parallel), layout(config.model)
    ranks, last_pass = parts.ranks, layers.loops + 1

    def chunk(rank: int, v: int) -> Chunk:
        name = "prelude" if v == 0 else "coda" if v == last_pass else f"core {v}"
        section = getattr(parts, name.split()[0])
        return Chunk(
            name,
            (section[rank],),
            enters=(v,) if rank == 0 else (),
            embedding=v == 0 and rank == 0,
            head=v == last_pass and rank == ranks - 1,
            core=section[rank] if name.startswith("core") else 0,
        )

    copies = 1 if layers.shared else layers.loops
    return Pipeline(
        chunks=tuple(tuple(chunk(rank, v) for v in range(last_pass + 1)) for rank in range(ranks)),
        layers=tuple(parts.prelude[r] + copies * parts.core[r] + parts.coda[r] for r in range(ranks)),
        micro_batches=micro_batches,
        group=microbatch_group_size(config.parallel, micro_batches),
        loops=_shared_loops(layers),
    )
