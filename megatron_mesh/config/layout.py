"""The layer layout of a model, written as ``4+8R2+4``, ``4+8+8+4`` or ``24``."""

import re
from dataclasses import dataclass, replace

from megatron_mesh.errors import UserError

_SHARED = re.compile(r"(\d+)\+(\d+)R(\d+)\+(\d+)")
_DISTINCT = re.compile(r"\d+(\+\d+)*")


@dataclass(frozen=True)
class LayerLayout:
    """Layers of each section of a model, in the order in which a token passes through them.

    If ``shared``, every loop runs the same core weights (written ``p+cRK+q``). Otherwise every layer has
    separate weights.
    """

    prelude: int
    core: int
    loops: int
    coda: int
    shared: bool = True

    @property
    def depth(self) -> int:
        """Unrolled depth: layers that a token passes through, as in a plain model of equal compute."""
        return self.prelude + self.core * self.loops + self.coda

    @property
    def unique_layers(self) -> int:
        """Layers of weights."""
        return self.prelude + self.core * (1 if self.shared else self.loops) + self.coda

    @property
    def plain(self) -> bool:
        """Whether the layout is only a depth, without sections."""
        return not self.shared and (self.prelude, self.loops, self.coda) == (0, 1, 0)

    def distinct(self) -> "LayerLayout":
        """Return the same parts with separate weights for each loop: 4+8R2+4 becomes 4+8+8+4."""
        return replace(self, shared=False)

    def unrolled(self) -> "LayerLayout":
        """Return the plain model of the same depth: 4+8R2+4 becomes 24."""
        return LayerLayout(prelude=0, core=self.depth, loops=1, coda=0, shared=False)

    def __str__(self) -> str:
        if self.shared:
            return f"{self.prelude}+{self.core}R{self.loops}+{self.coda}"
        if self.plain:
            return str(self.core)
        return "+".join(str(n) for n in (self.prelude, *[self.core] * self.loops, self.coda))


def parse_layers(text: str) -> LayerLayout:
    """Parse ``p+cRK+q`` (shared core), ``p+c+...+c+q`` (separate cores) or a plain depth.

    Raises:
        UserError: the text has none of these forms, or a number is out of range.
    """
    text = text.strip()
    if match := _SHARED.fullmatch(text):
        prelude, core, loops, coda = map(int, match.groups())
        layout = LayerLayout(prelude, core, loops, coda)
    elif _DISTINCT.fullmatch(text):
        layout = _parse_distinct(text)
    else:
        raise UserError(
            f"--layers {text!r} is not a layer layout; write prelude+coreRloops+coda, e.g. 4+8R2+4 (a core "
            "of 8 layers that runs twice), 4+8+8+4 (separate cores) or 24 (a plain model)"
        )
    check_layout(layout)
    return layout


def _parse_distinct(text: str) -> LayerLayout:
    parts = [int(n) for n in text.split("+")]
    if len(parts) == 1:
        return LayerLayout(prelude=0, core=parts[0], loops=1, coda=0, shared=False)
    if len(parts) == 2:
        raise UserError(
            f"--layers {text} has two numbers; write prelude+core+coda, with 0 for an absent prelude or coda"
        )
    prelude, *cores, coda = parts
    if len(set(cores)) != 1:
        raise UserError(
            f"--layers {text} has cores of different sizes {cores}; give every core the same number of "
            f"layers, e.g. {prelude}+{cores[0]}+{cores[0]}+{coda}"
        )
    return LayerLayout(prelude, cores[0], len(cores), coda, shared=False)


def check_layout(layout: LayerLayout) -> None:
    """Raise UserError unless the core has layers and runs at least once."""
    if layout.loops < 1:
        raise UserError(
            f"the core of {layout} runs {layout.loops} times; --num-loops must be at least 1 (for a model "
            "without a loop use --recurrence vanilla)"
        )
    if layout.core < 1:
        raise UserError(
            f"the core of {layout} has no layers; --core-layers must be at least 1 (for a model without a "
            "loop use --recurrence vanilla --layers DEPTH)"
        )
    if layout.prelude < 0 or layout.coda < 0:
        raise UserError(
            f"the layers {layout} include a negative number; prelude and coda need 0 or more layers"
        )
