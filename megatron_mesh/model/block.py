"""A section: consecutive layers of the prelude, the core or the coda.

The MeSH transformer block: a prelude, a core that runs K times with a recurrence, a coda.
"""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from megatron.core.utils import get_pg_size
from torch import Tensor

from megatron_mesh import kernels
from megatron_mesh.compat.megatron_model import CustomTransformerBlock
from megatron_mesh.config.placement import Part
from megatron_mesh.model.layer_spec import final_norm
from megatron_mesh.model.transformer_config import MeshTransformerConfig, Name, section_config
from megatron_mesh.recurrence import LoopState, Scheme, build_scheme
from megatron_mesh.runtime import profiling


class Section(TransformerBlock):
    """A ``TransformerBlock`` that holds this rank's layers of the prelude, the core or the coda.

    Recomputation and precision contexts are Megatron's. Only the layer numbers are ours, because Megatron
    assumes that every pipeline rank holds an equal share of one plain stack.

    Args:
        layer_spec: the spec of every layer.
        held: the layers that this rank holds, numbered from 0 within the section.
        total: the number of layers in the whole section, on all ranks.
    """

    def __init__(
        self,
        config: MeshTransformerConfig,
        layer_spec: ModuleSpec,
        held: range,
        total: int,
        pg_collection: ProcessGroupCollection,
    ):
        config = copy.copy(config)
        config.num_layers = len(held)
        config.pipeline_model_parallel_size = 1
        config.virtual_pipeline_model_parallel_size = None
        super().__init__(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=[layer_spec] * len(held), layer_norm=None),
            post_layer_norm=False,
            pg_collection=pg_collection,
        )
        self.total_layers = total
        for layer, number in zip(self.layers, held, strict=True):
            layer.layer_number = number + 1

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs) -> Tensor:
        """[S, B, H] -> [S, B, H]; see ``TransformerBlock.forward``."""
        if not self.layers:
            # The pipeline schedule needs input and output to be different nodes of the graph.
            return hidden_states.clone()
        return super().forward(hidden_states, attention_mask, **kwargs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Stack the layers of all ranks into one tensor per parameter, along a new first dimension."""
        assert not sharded_offsets, "a section is not sharded along another dimension"
        state: ShardedStateDict = {}
        for index, layer in enumerate(self.layers):
            here = f"{prefix}layers.{index}."
            place = [(0, layer.layer_number - 1, self.total_layers)]
            part = layer.sharded_state_dict(here, place, metadata)
            replace_prefix_for_sharding(part, here, f"{prefix}layers.")
            state.update(part)
        return state


class MeshTransformerBlock(CustomTransformerBlock):
    """A ``TransformerBlock`` whose middle layers run K times.

    A forward consists of K + 2 *passes*: the prelude, K loops of the core, the coda. Before each pass, the
    recurrence computes the pass's input from the previous pass's output.

    Args:
        layer_spec: the spec of every layer.
        pg_collection: Megatron's process groups.
        part: the layers that this pipeline rank holds (default: all). A partial block has no ``forward``;
            ``parallel/ring.py`` runs its passes one by one.
    """

    config: MeshTransformerConfig

    def __init__(
        self,
        config: MeshTransformerConfig,
        layer_spec: ModuleSpec,
        pg_collection: ProcessGroupCollection,
        part: Part | None = None,
    ):
        self.part = Part.whole(config.layout) if part is None else part
        super().__init__(
            config,
            TransformerBlockSubmodules([layer_spec], final_norm(config)),
            pre_process=self.part.first,
            post_process=self.part.last,
            pg_collection=pg_collection,
        )

    def build_layers(self) -> None:
        """Called by ``TransformerBlock.__init__``."""
        layers, part = self.config.layout, self.part
        self.prelude = self._section("prelude", part.prelude, layers.prelude)
        if layers.shared:
            self.core = self._section("core", part.core, layers.core)
        else:
            self.cores = torch.nn.ModuleList(
                self._section("core", part.core, layers.core) for _ in range(layers.loops)
            )
        self.coda = self._section("coda", part.coda, layers.coda)
        self.recurrence = self._build_recurrence() if part.first else None
        self.final_layernorm = None
        if part.last:
            self.final_layernorm = build_module(
                self.submodules.layer_norm,
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )

    def _section(self, name: Name, held: range, total: int) -> Section:
        config = section_config(self.config, name, held, total)
        return Section(config, self.submodules.layer_specs[0], held, total, self.pg_collection)

    def _build_recurrence(self) -> Scheme:
        config = self.config
        scheme = build_scheme(
            config.recurrence, config.hidden_size, config.layout.loops, config.recurrence_options
        )
        if not scheme.full_precision:
            scheme = scheme.to(config.params_dtype)
        if kernels.available():
            scheme.mix = kernels.weighted_sum
        # Under tensor parallelism the memory is always sharded along the sequence. Without sequence
        # parallelism we scatter its inputs and gather its outputs.
        self.shards_states = (
            get_pg_size(self.tp_group) > 1 and not config.sequence_parallel and scheme.shards_states
        )
        for parameter in scheme.parameters():
            # Each tensor-parallel rank has the gradient for its sequence shard only. The first attribute
            # makes Megatron sum the gradients under sequence parallelism, the second makes
            # parallel/gradients.py sum them without it.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            parameter.sum_over_tensor_parallel = self.shards_states  # type: ignore[attr-defined]
            parameter.no_weight_decay = scheme.full_precision  # type: ignore[attr-defined]  # optimizer.py
        return scheme

    @property
    def passes(self) -> list[Section]:
        """The sections in execution order: K + 2 entries, in which a shared core appears K times."""
        cores = [self.core] * self.config.layout.loops if self.config.layout.shared else [*self.cores]
        return [self.prelude, *cores, self.coda]

    def pass_name(self, index: int) -> str:
        """The name of pass ``index`` in profiles."""
        last = self.config.layout.loops + 1
        return f"pass {index}: {'prelude' if index == 0 else 'coda' if index == last else 'core'}"

    @property
    def layers(self) -> list[TransformerLayer]:
        """Every layer once. Megatron's schedules set ``current_microbatch`` on each of them."""
        return [layer for _, section in self.sections() for layer in section.layers]

    def sections(self) -> Iterator[tuple[str, Section]]:
        """Yield every section once, with its name."""
        yield "prelude", self.prelude
        if self.config.layout.shared:
            yield "core", self.core
        else:
            for i, core in enumerate(self.cores):
                yield f"cores.{i}", cast(Section, core)
        yield "coda", self.coda

    def enter(self, index: int, x: Tensor, state: LoopState) -> Tensor:
        """Compute the input of pass ``index`` from the previous pass's output ``x`` [S, B, H].

        For pass 0, ``x`` is the embedding. Under tensor parallelism without sequence parallelism, ``x`` and
        the result are whole on every rank, although the memory is sharded along the sequence.
        """
        assert self.recurrence is not None, "only the first pipeline rank holds the recurrence"
        with profiling.named(f"cycle {index - 1}" if index else "store embedding"):
            if not self.shards_states:
                return self.recurrence(index, x, state)
            x = tensor_parallel.scatter_to_sequence_parallel_region(x, group=self.tp_group)
            x = self.recurrence(index, x, state)
            return tensor_parallel.gather_from_sequence_parallel_region(
                x, tensor_parallel_output_grad=False, group=self.tp_group
            )

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """Run all passes and the final norm: [S, B, H] -> [S, B, H] (shards under sequence parallelism).

        Args:
            hidden_states: the scaled token embedding.
            attention_mask, kwargs: passed to every section; see ``TransformerBlock.forward``.
        """
        assert self.final_layernorm is not None, "a partial block has no forward; run it pass by pass"
        state = LoopState()
        for index, section in enumerate(self.passes):
            with profiling.named(self.pass_name(index)):
                hidden_states = self.enter(index, hidden_states, state)
                hidden_states = section(hidden_states, attention_mask, **kwargs)
        return self.final_layernorm(hidden_states)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return tensors under the keys prelude, core (or cores.N), coda, final_layernorm and recurrence."""
        assert not sharded_offsets, "Unexpected sharded offsets"
        ends = {"final_layernorm": self.final_layernorm, "recurrence": self.recurrence}
        state: ShardedStateDict = {}
        for name, module in [*self.sections(), *ends.items()]:
            if module is not None:
                part = sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
                state.update(part)
        return state
