"""Chooses the layers of a plain model from which a recursive model starts.

The three ways to initialize the core are those of Bae et al., "Relaxed Recursive Transformers" (arXiv
2410.20672, section 2.3).
"""

from dataclasses import replace
from typing import Literal

from megatron_mesh.config.derived import layout
from megatron_mesh.config.layout import LayerLayout, parse_layers
from megatron_mesh.config.resolve.model import resolve_model
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES

CoreInit = Literal["average", "first", "stepwise"]


def recursive_model(plain: ModelConfig, layers: str, recurrence: str) -> ModelConfig:
    """Return the resolved settings of a recursive model with the sizes of a plain one.

    Raises:
        UserError: ``plain`` already has a loop, the new model would have none, or the depths differ.
    """
    if SCHEMES[plain.recurrence].has_loop:
        raise UserError(
            f"--to-recursive needs a plain model, but this one already has a loop ({plain.recurrence})"
        )
    if recurrence in SCHEMES and not SCHEMES[recurrence].shared_core:
        raise UserError(
            f"--recurrence {recurrence} doesn't share its core; choose another, e.g. mesh or base"
        )
    target = parse_layers(layers)
    if not target.shared:
        raise UserError(f"--to-recursive {layers} has no loop; write prelude+coreRloops+coda, e.g. 4+8R2+4")
    if target.depth != layout(plain).depth:
        raise UserError(
            f"--to-recursive {layers} is {target.depth} layers deep, but the model has {layout(plain).depth} "
            "layers; choose a layout of that depth"
        )
    return resolve_model(replace(plain, recurrence=recurrence, layers=layers))


def core_sources(target: LayerLayout, choice: CoreInit) -> list[list[int]]:
    """Return, for each core layer, the layers of the plain model whose mean is its initial value.

    Args:
        target: layout of the recursive model.
        choice: "average" takes the layers at the same position in every loop; "first" takes the layer of the
            first loop; "stepwise" takes layers at equal distances from the first layer of all loops to the
            last.
    """
    loops, core, start = target.loops, target.core, target.prelude
    if choice == "average":
        return [[start + loop * core + index for loop in range(loops)] for index in range(core)]
    if choice == "first":
        return [[start + index] for index in range(core)]
    last = loops * core - 1
    return [[start + round(index * last / max(1, core - 1))] for index in range(core)]


def layer_sources(target: LayerLayout, choice: CoreInit) -> dict[str, list[list[int]]]:
    """Return the same for all layers, by the name of the part: prelude, core and coda."""
    first_of_coda = target.depth - target.coda
    return {
        "prelude": [[index] for index in range(target.prelude)],
        "core": core_sources(target, choice),
        "coda": [[first_of_coda + index] for index in range(target.coda)],
    }
