"""A recursive model started from a plain one: which layers its core is made of.

The three choices are those of Bae et al., "Relaxed Recursive Transformers" (arXiv 2410.20672, sec. 2.3).
"""

from dataclasses import replace
from typing import Literal

from megatron_mesh.config.check_model import resolve_model
from megatron_mesh.config.derived import layout
from megatron_mesh.config.layers import LayerLayout, parse_layers
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES

CoreInit = Literal["average", "first", "stepwise"]


def recursive_model(plain: ModelConfig, layers: str, recurrence: str) -> ModelConfig:
    """The resolved settings of a recursive model of the same backbone.

    Raises:
        UserError: ``plain`` has a loop already, the new one would have none, or the depths differ.
    """
    if SCHEMES[plain.recurrence].has_loop:
        raise UserError(
            f"--to-recursive starts from a plain model, and this one is {plain.recurrence} already"
        )
    if recurrence in SCHEMES and not SCHEMES[recurrence].shared_core:
        raise UserError(f"--recurrence {recurrence} has no core that runs again; choose e.g. mesh or base")
    target = parse_layers(layers)
    if not target.shared:
        raise UserError(f"--to-recursive {layers} has no loop; write prelude+coreRloops+coda, e.g. 4+8R2+4")
    if target.depth != layout(plain).depth:
        raise UserError(
            f"--to-recursive {layers} is {target.depth} layers deep, the model {layout(plain).depth}; choose "
            "parts that add up"
        )
    return resolve_model(replace(plain, recurrence=recurrence, layers=layers))


def core_sources(target: LayerLayout, choice: CoreInit) -> list[list[int]]:
    """For each layer of the core, the layers of the plain model whose mean it starts as.

    average: those that stand at its place in each loop; first: the one in the first loop; stepwise: layers
    at equal steps from the first to the last of all loops'.
    """
    loops, core, start = target.loops, target.core, target.prelude
    if choice == "average":
        return [[start + loop * core + index for loop in range(loops)] for index in range(core)]
    if choice == "first":
        return [[start + index] for index in range(core)]
    last = loops * core - 1
    return [[start + round(index * last / max(1, core - 1))] for index in range(core)]


def layer_sources(target: LayerLayout, choice: CoreInit) -> dict[str, list[list[int]]]:
    """The same for each part of the recursive model, by its name."""
    first_of_coda = target.depth - target.coda
    return {
        "prelude": [[index] for index in range(target.prelude)],
        "core": core_sources(target, choice),
        "coda": [[first_of_coda + index] for index in range(target.coda)],
    }
