"""How the layers of a model are written: ``24``, ``4+8R2+4`` or ``4+8+8+4``."""

import re
from dataclasses import dataclass, replace

from megatron_mesh.errors import UserError

_SHARED = re.compile(r"(\d+)\+(\d+)R(\d+)\+(\d+)")
_DISTINCT = re.compile(r"\d+(\+\d+)*")


@dataclass(frozen=True)
class LayerLayout:
    """Layers of the parts of a model, in the order in which a token passes them.

    ``prelude + core * loops + coda`` is the unrolled depth. With ``shared`` the core is one set of
    weights applied ``loops`` times (written ``p+cRK+q``); without, every layer is its own.
    """

    prelude: int
    core: int
    loops: int
    coda: int
    shared: bool = True

    @property
    def depth(self) -> int:
        """Layers that a token passes (the depth of a plain model of equal compute)."""
        return self.prelude + self.core * self.loops + self.coda

    @property
    def unique_layers(self) -> int:
        """Layers that have weights of their own."""
        return self.prelude + self.core * (1 if self.shared else self.loops) + self.coda

    @property
    def plain(self) -> bool:
        """Whether there are no parts, only a depth."""
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
    """Read ``p+cRK+q`` (shared core), ``p+c+...+c+q`` or a plain depth (nothing shared).

    Raises:
        UserError: the text has none of these forms, or a count is out of range.
    """
    text = text.strip()
    if match := _SHARED.fullmatch(text):
        prelude, core, loops, coda = map(int, match.groups())
        layout = LayerLayout(prelude, core, loops, coda)
    elif _DISTINCT.fullmatch(text):
        layout = _parse_distinct(text)
    else:
        raise UserError(
            f"--layers {text!r} is not a layer layout; write prelude+coreRloops+coda, for example "
            "4+8R2+4 (a core of 8 layers applied twice), 4+8+8+4 where cores are not shared, "
            "or one number for a plain model, for example 24"
        )
    check_layout(layout)
    return layout


def _parse_distinct(text: str) -> LayerLayout:
    parts = [int(n) for n in text.split("+")]
    if len(parts) == 1:
        return LayerLayout(prelude=0, core=parts[0], loops=1, coda=0, shared=False)
    if len(parts) == 2:
        raise UserError(
            f"--layers {text} has two parts; write prelude+core+coda (0 for a part that is absent)"
        )
    prelude, *cores, coda = parts
    if len(set(cores)) != 1:
        raise UserError(
            f"--layers {text} has cores of different sizes {cores}; every core must have the same "
            f"number of layers, for example {prelude}+{cores[0]}+{cores[0]}+{coda}"
        )
    return LayerLayout(prelude, cores[0], len(cores), coda, shared=False)


def check_layout(layout: LayerLayout) -> None:
    """Raise UserError unless the core has a layer and runs at least once."""
    if layout.loops < 1:
        raise UserError(
            f"the core of {layout} runs {layout.loops} times; the number of loops must be at "
            "least 1 (--num-loops 2 is the paper's; for a model without a loop use "
            "--recurrence vanilla)"
        )
    if layout.core < 1:
        raise UserError(
            f"the core of {layout} has no layers; --core-layers must be at least 1 "
            "(for a model without a loop use --recurrence vanilla --layers DEPTH)"
        )
    if layout.prelude < 0 or layout.coda < 0:
        raise UserError(f"{layout}: a part cannot have a negative number of layers")
