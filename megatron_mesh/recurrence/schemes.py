"""Recurrence schemes: how the outputs of earlier passes make the input of the next pass.

A model with K loops runs K + 2 passes: pass 0 is the prelude, passes 1..K the core, pass K + 1 the coda.
Before pass v, ``Scheme.enter(v, x, state)`` takes the output ``x`` of the previous pass (for v = 0 the token
embedding) and returns the input of pass v. This is all that a scheme does, in one process and on a pipeline.

To add a scheme, write one class here (or in a file that ``__init__`` imports) and register it by name. Its
class attributes and class methods tell the rest of the package what it shards, saves, adds and computes. The
command line, parameter counts, tests and README tables follow from ``SCHEMES``.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from .mixing import Mix, at_least_fp32, weighted_sum

Draw = Callable[[str, Tensor, float], None]
"""Fills the parameter of this name within the scheme with N(0, std)."""

Observer = Callable[[int, Tensor, Tensor], None]
"""Receives the cycle, its write weights [S, B, N] and its read weights [S, B, N]."""


def _same_graph(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x


@dataclass
class LoopState:
    """What the passes of one micro-batch keep for later passes.

    ``share(x)`` returns ``x`` twice: for the current pass and for later passes. In a single autograd graph
    both are ``x``. A pipeline runs each pass in a separate graph, so it returns a leaf as the second and
    carries the leaf's gradient back.
    """

    share: Callable[[Tensor], tuple[Tensor, Tensor]] = _same_graph
    kept: dict[str, Tensor] = field(default_factory=dict)
    """States by name: the embedding ``h_emb``, the prelude's output ``h_0``, the core's last input
    ``h_t``."""
    outputs: list[Tensor] = field(default_factory=list)
    """The outputs that a factored memory has written so far."""
    writes: list[Tensor] = field(default_factory=list)
    """The write weights of these outputs."""

    def keep(self, name: str, x: Tensor) -> Tensor:
        """Keep ``x`` under ``name`` for later passes, and return it for the current pass."""
        here, self.kept[name] = self.share(x)
        return here


@dataclass(frozen=True)
class RecurrenceOptions:
    """Settings of the memory. Schemes without a memory ignore them."""

    slots: int = 5
    transition_query: str = "prelude-output"
    memory: str = "factored"
    router_init_std: float = 0.02
    router_bias_init: float = 0.0


class Scheme(nn.Module):
    """Base class of all schemes.

    The class attributes and class methods describe a scheme to the rest of the package, which never asks for
    its name or class. A new scheme overrides those whose default is wrong for it.

    Args:
        hidden_size: H.
        loops: K, the number of times the core runs.
        options: settings of the memory.
    """

    formula: ClassVar[str] = ""
    """The next state, in the notation of the paper's tables."""
    has_loop: ClassVar[bool] = True
    """False only for the plain model, which runs Megatron's own decoder."""
    shared_core: ClassVar[bool] = True
    """Whether all loops run the same core weights."""
    per_loop_parameters: ClassVar[bool] = False
    """Whether the scheme has separate parameters for each loop or cycle, so that K can't change after
    training."""
    uses_memory: ClassVar[bool] = False
    """Whether the scheme has slots and routers. The ``mesh_*`` and ``router_*`` settings then apply, and the
    scheme must call ``observer`` in every cycle if it is set."""
    full_precision: ClassVar[bool] = False
    """Whether the parameters stay in float32 in a bfloat16 model and have no weight decay."""
    keeps_embedding: ClassVar[bool] = False
    """Whether cycles read the token embedding, as ``state.kept["h_emb"]``."""
    shards_states: ClassVar[bool] = False
    """Whether tensor-parallel ranks always divide the scheme's work along the sequence. Without sequence
    parallelism, each rank then scatters the scheme's inputs, gathers its outputs and sums its parameters'
    gradients. Set it if the scheme has parameters or saves states; otherwise every rank computes the whole
    scheme."""

    def __init__(self, hidden_size: int, loops: int, options: RecurrenceOptions):
        super().__init__()
        self.hidden_size = hidden_size
        self.loops = loops
        self.options = options
        self.mix: Mix = weighted_sum  # callers may set a faster implementation
        self.observer: Observer | None = None

    @classmethod
    def loops_can_vary(cls) -> bool:
        """Return whether a trained model can run another number of loops."""
        return cls.has_loop and cls.shared_core and not cls.per_loop_parameters

    @classmethod
    def num_parameters(cls, hidden_size: int, loops: int, slots: int) -> int:
        """Return the number of parameters that the scheme adds, on every tensor-parallel rank."""
        return 0

    @classmethod
    def enter_flops(cls, index: int, hidden_size: int, slots: int) -> int:
        """Return the forward FLOPs per token of ``enter`` before pass ``index`` (2 per multiply-add)."""
        return 0

    @classmethod
    def forward_flops(cls, hidden_size: int, loops: int, slots: int) -> int:
        """Return the FLOPs per token that the scheme adds to a forward pass through the model."""
        return sum(cls.enter_flops(index, hidden_size, slots) for index in range(loops + 2))

    @classmethod
    def makes_new_state(cls, index: int) -> bool:
        """Return whether the input of pass ``index`` is a new tensor, not the output of the previous pass
        itself.

        A pipeline's first rank then holds both for backward.
        """
        return False

    @classmethod
    def saved_states(cls, loops: int) -> int:
        """Return how many states [S, B, H] one process saves for backward, beyond those of ``base``."""
        return 0

    def init_parameters(self, draw: Draw) -> None:
        """Set the initial value of every parameter; use ``draw`` for random values."""

    def forward(self, index: int, x: Tensor, state: LoopState) -> Tensor:
        """Run ``enter``. Callers call the module, since hooks that gather sharded parameters need it."""
        return self.enter(index, x, state)

    def enter(self, index: int, x: Tensor, state: LoopState) -> Tensor:
        """Return the input [S, B, H] of pass ``index`` from ``x`` [S, B, H], the previous pass's output."""
        if index == 0:
            return state.keep("h_emb", x) if self.keeps_embedding else x
        return self.cycle(index - 1, x, state)

    def cycle(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        """Return h_t from ``o``, the output of the prelude (``t = 0``) or of loop t - 1 (``t = 1..K``)."""
        raise TypeError(f"{type(self).__name__} has no loop")


SCHEMES: dict[str, type[Scheme]] = {}


def register(name: str) -> Callable[[type[Scheme]], type[Scheme]]:
    """Return a class decorator that adds a scheme to ``SCHEMES`` under ``name``."""

    def add(cls: type[Scheme]) -> type[Scheme]:
        assert name not in SCHEMES, f"{name} is registered twice"
        SCHEMES[name] = cls
        return cls

    return add


def build_scheme(name: str, hidden_size: int, loops: int, options: RecurrenceOptions) -> Scheme:
    """Build the scheme registered under ``name``."""
    return SCHEMES[name](hidden_size, loops, options)


class Linears(nn.ModuleList):
    """Linear maps, one per loop or cycle. Adapters and quantizers may replace them."""

    def __getitem__(self, index: int) -> nn.Linear:  # type: ignore[override]
        return cast(nn.Linear, super().__getitem__(index))


class FloatLinear(nn.Linear):
    """A linear map that multiplies in the input's dtype and adds the bias in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs], in at least float32."""
        product = nn.functional.linear(x, self.weight.to(x.dtype))
        return at_least_fp32(product) + at_least_fp32(self.bias)


def linears(count: int, inputs: int, outputs: int, kind: type[nn.Linear] = nn.Linear) -> Linears:
    """Build ``count`` linear maps with bias."""
    return Linears(kind(inputs, outputs) for _ in range(count))


@register("vanilla")
class Vanilla(Scheme):
    """The plain model: no loop, and separate weights for every layer of the unrolled depth."""

    shared_core = False
    has_loop = False
    formula = "no loop"


class Additive(Scheme):
    """Adds earlier states (``terms``) to the core's output, without weights."""

    terms: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def enter_flops(cls, index: int, hidden_size: int, slots: int) -> int:
        return len(cls.terms) * hidden_size if index > 1 else 0

    @classmethod
    def makes_new_state(cls, index: int) -> bool:
        return index > 1 and bool(cls.terms)

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
    """Uses the core's output as the next state."""

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
    keeps_embedding = True
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
    keeps_embedding = True
    formula = "h_m + h_0 + h_emb"


@register("residual+anchor+anchor-emb")
class ResidualAnchorAnchorEmb(Additive):
    """Adds the core's input, the state that entered the loop and the token embedding."""

    terms = ("h_t", "h_0", "h_emb")
    keeps_embedding = True
    formula = "h_m + h_t + h_0 + h_emb"


class Mixed(Scheme):
    """A weighted sum of the core's output, h_0 and h_emb. It starts as the base recursion.

    The coefficients start at 1, 0 and 0. In bfloat16 a coefficient near 1 could only move in steps of 1/128,
    and weight decay would pull it to 0.
    """

    per_loop_parameters = True
    full_precision = True
    keeps_embedding = True
    shards_states = True

    @classmethod
    def enter_flops(cls, index: int, hidden_size: int, slots: int) -> int:
        return 2 * 3 * hidden_size if index > 1 else 0

    @classmethod
    def makes_new_state(cls, index: int) -> bool:
        return index > 1

    @classmethod
    def saved_states(cls, loops: int) -> int:
        return loops  # the core's outputs; layers save h_0 and h_emb anyway

    def cycle(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        if t == 0:
            h = state.keep("h_0", o)
        else:
            a = at_least_fp32(self.coefficients(t - 1, state)).expand(*o.shape[:-1], 3)
            h = self.mix(a, [o, state.kept["h_0"], state.kept["h_emb"]])
        return self.remember(h, state)

    def coefficients(self, t: int, state: LoopState) -> Tensor:
        """Return the weights [3] or [S, B, 3] of (h_m, h_0, h_emb) after loop ``t``."""
        raise NotImplementedError

    def remember(self, h: Tensor, state: LoopState) -> Tensor:
        """Keep what ``coefficients`` needs in the next cycle; return ``h``."""
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
    def enter_flops(cls, index: int, hidden_size: int, slots: int) -> int:
        return 2 * super().enter_flops(index, hidden_size, slots)

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
