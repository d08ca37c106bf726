"""Memory-as-State-Highways: an explicit memory around the loop, with routers for each iteration."""

from collections.abc import Callable

import torch
from torch import Tensor

from .memory import CYCLES
from .mixing import at_least_fp32
from .schemes import Draw, LoopState, RecurrenceOptions, Scheme, linears, register

# Called with (cycle, write weights [S, B, N], read weights [S, B, N]), e.g. by the metrics.
Observer = Callable[[int, Tensor, Tensor], None]


@register("mesh")
class MeSH(Scheme):
    """Memory of N slots, written and read once per cycle by routers ``Linear(H -> N)`` + softmax.

    Cycle 0, the transition, takes the prelude's output; cycle t + 1 takes the output of loop t while
    its routers look at that loop's input h_t. Each of the K + 1 cycles has its own pair of routers.
    """

    uses_memory = True
    formula = "read(memory + write(h_m))"

    def __init__(self, hidden_size: int, loops: int, options: RecurrenceOptions):
        super().__init__(hidden_size, loops, options)
        self.write = linears(loops + 1, hidden_size, options.slots)
        self.read = linears(loops + 1, hidden_size, options.slots)
        self.run_cycle = CYCLES[options.memory]
        self.observer: Observer | None = None

    @classmethod
    def num_parameters(cls, hidden_size: int, loops: int, slots: int) -> int:
        return (loops + 1) * 2 * (hidden_size + 1) * slots

    @classmethod
    def forward_flops(cls, hidden_size: int, loops: int, slots: int) -> int:
        routers = (loops + 1) * 2 * 2 * hidden_size * slots
        mixing = sum(2 * (t + 2) * hidden_size for t in range(loops + 1))
        return routers + mixing

    @classmethod
    def kept_states(cls, loops: int) -> int:
        return loops + 1  # o_0..o_K; h_emb is the prelude's input

    def init_parameters(self, draw: Draw) -> None:
        """N(0, std) weights; zero biases but for ``router_bias_init`` on the cycle's own slot t + 1."""
        for kind, routers in (("write", self.write), ("read", self.read)):
            for t in range(self.loops + 1):
                router = routers[t]
                draw(f"{kind}.{t}.weight", router.weight, self.options.router_init_std)
                with torch.no_grad():
                    router.bias.zero_()
                    if t + 1 < self.options.slots:
                        router.bias[t + 1] = self.options.router_bias_init

    def embed(self, h_emb: Tensor, state: LoopState) -> Tensor:
        return state.keep("h_emb", h_emb)

    def cycle(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        query = self._query(t, o, state)
        w, r = self.route(t, query)
        if self.observer is not None:
            self.observer(t, w.detach(), r.detach())
        return state.keep("h_t", self.run_cycle(o, w, r, state, self.mix))

    def _query(self, t: int, o: Tensor, state: LoopState) -> Tensor:
        if t > 0:
            return state.kept["h_t"]
        return o if self.options.transition_query == "prelude-output" else state.kept["h_emb"]

    def route(self, t: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Write and read weights [S, B, N] of cycle ``t``; the softmax runs in at least float32."""
        w = torch.softmax(at_least_fp32(self.write[t](query)), dim=-1)
        r = torch.softmax(at_least_fp32(self.read[t](query)), dim=-1)
        return w, r


@register("vanilla+mesh")
class VanillaMeSH(MeSH):
    """MeSH between blocks that do not share weights (the paper's 4+8+8+4)."""

    shared_core = False
    formula = "read(memory + write(h_m)), cores not shared"
