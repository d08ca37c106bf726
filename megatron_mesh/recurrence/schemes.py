"""Recurrence schemes: how the state that enters a pass is made from what earlier passes gave.

A model with K loops is K + 2 passes: pass 0 is the prelude, passes 1..K the core, pass K+1 the coda.
``Scheme.enter(v, x, state)`` stands before pass v: it gets the output ``x`` of the pass before (for
v = 0 the token embedding) and returns the pass's input. Whoever runs the passes, in one process or
round a pipeline, does nothing else.

A new scheme is one class here (or in a file imported by ``__init__``), registered by name; the
command line, parameter counts, tests and README tables follow from ``SCHEMES``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from .mixing import Mix, at_least_fp32, weighted_sum

# Fills a parameter, given its name within the scheme, with N(0, std).
Draw = Callable[[str, Tensor, float], None]


def _same_graph(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


@dataclass
class LoopState:
    """What the passes of one micro-batch leave for later passes.

    ``share(x)`` returns ``x`` twice: as it goes on in its own pass, and as later passes shall read it.
    In one autograd graph both are ``x``; a pipeline, which runs each pass as a graph of its own, gives
    a leaf for the second and carries its gradient back.
    """

    share: Callable[[Tensor], tuple[Tensor, Tensor]] = _same_graph
    kept: dict[str, Tensor] = field(default_factory=dict)
    outputs: list[Tensor] = field(default_factory=list)
    writes: list[Tensor] = field(default_factory=list)

    def keep(self, name: str, x: Tensor) -> Tensor:
        """Keep ``x`` for later passes under ``name``; returns it for this pass."""
        here, self.kept[name] = self.share(x)
        return here


@dataclass(frozen=True)
class RecurrenceOptions:
    """Settings of the memory; schemes without one ignore them."""

    slots: int = 5
    transition_query: str = "prelude-output"
    memory: str = "factored"
    router_init_std: float = 0.02
    router_bias_init: float = 0.0


class Scheme(nn.Module):
    """Base of all schemes.

    Args:
        hidden_size: H.
        loops: K, how often the core runs.
        options: settings of the memory.
    """

    shared_core: ClassVar[bool] = True
    """Whether the K cores are one set of weights."""
    has_loop: ClassVar[bool] = True
    """False for the plain model, which is Megatron's own decoder."""
    uses_memory: ClassVar[bool] = False
    """Whether the scheme has slots and routers."""
    full_precision: ClassVar[bool] = False
    """Whether the parameters stay in float32 in a bfloat16 model, and have no weight decay."""
    formula: ClassVar[str] = ""
    """The next state, in the notation of the paper's tables."""

    def __init__(self, hidden_size: int, loops: int, options: RecurrenceOptions):
        super().__init__()
        self.hidden_size = hidden_size
        self.loops = loops
        self.options = options
        self.mix: Mix = weighted_sum  # whoever has a faster one may put it here

    @classmethod
    def num_parameters(cls, hidden_size: int, loops: int, slots: int) -> int:
        """Parameters that the scheme adds to the model."""
        return 0

    @classmethod
    def forward_flops(cls, hidden_size: int, loops: int, slots: int) -> int:
        """FLOPs per token that the scheme adds to a forward pass (2 per multiply-add)."""
        return 0

    @classmethod
    def kept_states(cls, loops: int) -> int:
        """States [S, B, H] kept for the backward pass beyond those of the base recursion."""
        return 0

    def init_parameters(self, draw: Draw) -> None:
        """Set the initial value of every parameter; random ones through ``draw``."""

    def forward(self, index: int, x: Tensor, state: LoopState) -> Tensor:
        """``enter``. Callers call the module, since what gathers sharded parameters hooks into calls."""
        return self.enter(index, x, state)

    def enter(self, index: int, x: Tensor, state: LoopState) -> Tensor:
        """The input [S, B, H] of pass ``index``, from the output ``x`` [S, B, H] of the pass before."""
        if index == 0:
            return self.embed(x, state)
        return self.cycle(index - 1, x, state)

    def embed(self, h_emb: Tensor, state: LoopState) -> Tensor:
        """Pass 0: see, and keep if needed, the scaled token embedding."""
        return h_emb

    def cycle(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        """``t = 0``: prelude output -> h_0; ``t = 1..K``: core output of loop t-1 -> h_t."""
        raise TypeError(f"{type(self).__name__} has no loop")


SCHEMES: dict[str, type[Scheme]] = {}


def register(name: str) -> Callable[[type[Scheme]], type[Scheme]]:
    """Class decorator: make a scheme known under ``name``."""

    def add(cls: type[Scheme]) -> type[Scheme]:
        assert name not in SCHEMES, f"{name} is registered twice"
        SCHEMES[name] = cls
        return cls

    return add


def build_scheme(name: str, hidden_size: int, loops: int, options: RecurrenceOptions) -> Scheme:
    """The scheme registered under ``name`` (KeyError if there is none)."""
    return SCHEMES[name](hidden_size, loops, options)


class Linears(nn.ModuleList):
    """A list of linear maps, one per loop or cycle; adapters and quantizers may put their own in place."""

    def __getitem__(self, index: int) -> nn.Linear:  # type: ignore[override]
        return cast(nn.Linear, super().__getitem__(index))


class FloatLinear(nn.Linear):
    """A linear map whose bias is added in float32: the product may be in the input's type, the sum is not."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in at least float32."""
        product = nn.functional.linear(x, self.weight.to(x.dtype))
        return at_least_fp32(product) + at_least_fp32(self.bias)


def linears(count: int, inputs: int, outputs: int, kind: type[nn.Linear] = nn.Linear) -> Linears:
    """``count`` maps of ``inputs`` to ``outputs`` with bias."""
    return Linears(kind(inputs, outputs) for _ in range(count))


@register("vanilla")
class Vanilla(Scheme):
    """No loop: as many distinct layers as the unrolled depth."""

    shared_core = False
    has_loop = False
    formula = "no loop"


class Additive(Scheme):
    """The core's output plus earlier states, without weights."""

    terms: ClassVar[tuple[str, ...]] = ()

    def embed(self, h_emb: Tensor, state: LoopState) -> Tensor:
        return state.keep("h_emb", h_emb) if "h_emb" in self.terms else h_emb

    @classmethod
    def forward_flops(cls, hidden_size: int, loops: int, slots: int) -> int:
        return loops * len(cls.terms) * hidden_size

    def cycle(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        if t == 0:
            h = state.keep("h_0", o) if "h_0" in self.terms else o
        else:
            h = o
            for term in self.terms:
                h = h + state.kept[term]
        return state.keep("h_t", h) if "h_t" in self.terms else h


@register("base")
class Base(Additive):
    """The core's output is the next state."""

    formula = "h_m"


@register("residual")
class Residual(Additive):
    """Adds the core's input."""

    terms = ("h_t",)
    formula = "h_m + h_t"


@register("anchor")
class Anchor(Additive):
    """Adds the state that entered the loop."""

    terms = ("h_0",)
    formula = "h_m + h_0"


@register("anchor-emb")
class AnchorEmb(Additive):
    """Adds the token embedding (the paper's anchor*)."""

    terms = ("h_emb",)
    formula = "h_m + h_emb"


@register("residual+anchor")
class ResidualAnchor(Additive):
    """Adds the core's input and the state that entered the loop."""

    terms = ("h_t", "h_0")
    formula = "h_m + h_t + h_0"


@register("anchor+anchor-emb")
class AnchorAnchorEmb(Additive):
    """Adds the state that entered the loop and the token embedding."""

    terms = ("h_0", "h_emb")
    formula = "h_m + h_0 + h_emb"


@register("residual+anchor+anchor-emb")
class ResidualAnchorAnchorEmb(Additive):
    """Adds all three."""

    terms = ("h_t", "h_0", "h_emb")
    formula = "h_m + h_t + h_0 + h_emb"


class Mixed(Scheme):
    """A weighted sum of the core's output, h_0 and h_emb; starts as the base recursion.

    The coefficients start at 1 and 0. In bfloat16, 1 would move in steps of 1/128, and weight decay would
    pull it to 0.
    """

    full_precision = True

    @classmethod
    def forward_flops(cls, hidden_size: int, loops: int, slots: int) -> int:
        return loops * 2 * 3 * hidden_size

    @classmethod
    def kept_states(cls, loops: int) -> int:
        return loops  # the core's outputs; h_0 and h_emb are inputs of layers

    def embed(self, h_emb: Tensor, state: LoopState) -> Tensor:
        return state.keep("h_emb", h_emb)

    def cycle(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        if t == 0:
            h = state.keep("h_0", o)
        else:
            a = at_least_fp32(self.coefficients(t - 1, state)).expand(*o.shape[:-1], 3)
            h = self.mix(a, [o, state.kept["h_0"], state.kept["h_emb"]])
        return self.remember(h, state)

    def coefficients(self, t: int, state: LoopState) -> Tensor:
        """Weights of (h_m, h_0, h_emb) after loop ``t``: [3] or [S, B, 3]."""
        raise TypeError("Mixed has no coefficients of its own")

    def remember(self, h: Tensor, state: LoopState) -> Tensor:
        """Keep what ``coefficients`` will look at."""
        return h


@register("static")
class Static(Mixed):
    """Three learned scalars per loop."""

    formula = "a1 h_m + a2 h_0 + a3 h_emb"

    def __init__(self, hidden_size: int, loops: int, options: RecurrenceOptions):
        super().__init__(hidden_size, loops, options)
        self.weight = nn.Parameter(torch.empty(loops, 3))

    @classmethod
    def num_parameters(cls, hidden_size: int, loops: int, slots: int) -> int:
        return 3 * loops

    def init_parameters(self, draw: Draw) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, 0] = 1.0

    def coefficients(self, t: int, state: LoopState) -> Tensor:
        return self.weight[t]


@register("dynamic")
class Dynamic(Mixed):
    """Three coefficients per loop and token, linear in the core's input."""

    formula = "the same, a = linear(h_t) per token"

    def __init__(self, hidden_size: int, loops: int, options: RecurrenceOptions):
        super().__init__(hidden_size, loops, options)
        self.maps = linears(loops, hidden_size, 3, FloatLinear)

    @classmethod
    def num_parameters(cls, hidden_size: int, loops: int, slots: int) -> int:
        return 3 * (hidden_size + 1) * loops

    @classmethod
    def forward_flops(cls, hidden_size: int, loops: int, slots: int) -> int:
        return 2 * super().forward_flops(hidden_size, loops, slots)

    def init_parameters(self, draw: Draw) -> None:
        with torch.no_grad():
            for t in range(self.loops):
                linear = self.maps[t]
                linear.weight.zero_()
                linear.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))

    def coefficients(self, t: int, state: LoopState) -> Tensor:
        return self.maps[t](state.kept["h_t"])

    def remember(self, h: Tensor, state: LoopState) -> Tensor:
        return state.keep("h_t", h)
