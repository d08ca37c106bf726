"""The MeSH transformer block: prelude, a core that runs K times around a recurrence, coda."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor

from megatron_mesh.model.config import MeshTransformerConfig
from megatron_mesh.recurrence import LoopState, build_scheme


class MeshTransformerBlock(TransformerBlock):
    """A ``TransformerBlock`` whose middle layers are applied K times.

    Built like the stock block, from one layer spec per layer of the unrolled depth; the sections are
    stock blocks themselves, so recomputation, sharded checkpoints and FP8 contexts are Megatron's.
    A forward is K + 2 *passes* (prelude, K times the core, coda), and before each of them the
    recurrence makes its input from the output of the one before.
    """

    config: MeshTransformerConfig

    def _build_layers(self) -> None:
        layout = self.config.layout
        specs = self.submodules.layer_specs
        core_end = layout.prelude + layout.core
        self.prelude = self._section(specs[: layout.prelude])
        if layout.shared:
            self.core = self._section(specs[layout.prelude : core_end])
        else:
            starts = range(layout.prelude, layout.depth - layout.coda, layout.core)
            self.cores = torch.nn.ModuleList(self._section(specs[s : s + layout.core]) for s in starts)
        self.coda = self._section(specs[layout.depth - layout.coda :])
        self.final_layernorm = build_module(
            self.submodules.layer_norm,
            config=self.config,
            hidden_size=self.config.hidden_size,
            eps=self.config.layernorm_epsilon,
        )
        self.recurrence = build_scheme(
            self.config.recurrence, self.config.hidden_size, layout.loops, self.config.recurrence_options
        ).to(self.config.params_dtype)
        for parameter in self.recurrence.parameters():
            # The routers see sequence shards then, so their gradients are summed over the TP group.
            parameter.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def _section(self, layer_specs: list) -> TransformerBlock:
        config = copy.copy(self.config)
        config.num_layers = len(layer_specs)
        return TransformerBlock(
            config=config,
            spec=TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=None),
            post_layer_norm=False,
            pg_collection=self.pg_collection,
        )

    @property
    def passes(self) -> list[TransformerBlock]:
        """The sections in the order in which they run: K + 2 entries, a shared core K times."""
        cores = [self.core] * self.config.layout.loops if self.config.layout.shared else [*self.cores]
        return [self.prelude, *cores, self.coda]

    @property
    def layers(self) -> list[TransformerLayer]:
        """Every layer once (Megatron's schedules write the micro-batch's number on each)."""
        return [layer for _, section in self._sections() for layer in section.layers]

    def _sections(self) -> Iterator[tuple[str, TransformerBlock]]:
        yield "prelude", self.prelude
        if self.config.layout.shared:
            yield "core", self.core
        else:
            yield from ((f"cores.{i}", core) for i, core in enumerate(self.cores))
        yield "coda", self.coda

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        """[S, B, H] (sequence shards under sequence parallelism) -> the same, normed.

        Args:
            hidden_states: the scaled token embedding.
            attention_mask, kwargs: handed to every section; see ``TransformerBlock.forward``.
        """
        state = LoopState()
        for index, section in enumerate(self.passes):
            hidden_states = self.recurrence.enter(index, hidden_states, state)
            hidden_states = section(hidden_states, attention_mask, **kwargs)
        return self.final_layernorm(hidden_states)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys ``prelude``, ``core`` (or ``cores.N``), ``coda``, ``final_layernorm`` and ``recurrence``."""
        assert not sharded_offsets, "Unexpected sharded offsets"
        parts = [
            *self._sections(),
            ("final_layernorm", self.final_layernorm),
            ("recurrence", self.recurrence),
        ]
        state: ShardedStateDict = {}
        for name, module in parts:
            state.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        return state
