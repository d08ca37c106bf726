"""Memory-as-State-Highways (MeSH): a memory around the loop, with separate routers for each cycle."""

import torch
from torch import Tensor

from .memory import CYCLES
from .mixing import at_least_fp32
from .schemes import Draw, LoopState, RecurrenceOptions, Scheme, linears, register


@register("mesh")
class MeSH(Scheme):
    """A memory of N slots. Each cycle writes and reads it once, with routers ``Linear(H -> N)`` + softmax.

    Cycle 0, the transition, writes the prelude's output. Cycle t + 1 writes the output of loop t, and its
    routers see that loop's input h_t. Each of the K + 1 cycles has its own write router and read router.
    """

    per_loop_parameters = True
    uses_memory = True
    keeps_embedding = True
    shards_states = True
    formula = "read(memory + write(h_m))"

    def __init__(self, hidden_size: int, loops: int, options: RecurrenceOptions):
        super().__init__(hidden_size, loops, options)
        self.write = linears(loops + 1, hidden_size, options.slots)
        self.read = linears(loops + 1, hidden_size, options.slots)
        self.run_cycle = CYCLES[options.memory]

    @classmethod
    def num_parameters(cls, hidden_size: int, loops: int, slots: int) -> int:
        return (loops + 1) * 2 * (hidden_size + 1) * slots

    @classmethod
    def enter_flops(cls, index: int, hidden_size: int, slots: int) -> int:
        if index == 0:
            return 0
        routers = 2 * 2 * hidden_size * slots
        mixing = 2 * (index + 1) * hidden_size  # h_emb and o_0..o_(index - 1)
        return routers + mixing

    @classmethod
    def makes_new_state(cls, index: int) -> bool:
        return index > 0

    @classmethod
    def saved_states(cls, loops: int) -> int:
        return loops + 1  # o_0..o_K; the prelude's first layer saves h_emb anyway

    def init_parameters(self, draw: Draw) -> None:
        """Draw weights from N(0, std). Biases are 0, but ``router_bias_init`` for the cycle's slot t + 1."""
        for kind, routers in (("write", self.write), ("read", self.read)):
            for t in range(self.loops + 1):
                router = routers[t]
                draw(f"{kind}.{t}.weight", router.weight, self.options.router_init_std)
                with torch.no_grad():
                    router.bias.zero_()
                    if t + 1 < self.options.slots:
                        router.bias[t + 1] = self.options.router_bias_init

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
        """Return cycle ``t``'s write and read weights [S, B, N]. The softmax runs in at least float32."""
        w = torch.softmax(at_least_fp32(self.write[t](query)), dim=-1)
        r = torch.softmax(at_least_fp32(self.read[t](query)), dim=-1)
        return w, r


@register("vanilla+mesh")
class VanillaMeSH(MeSH):
    """MeSH between cores with separate weights (the paper's 4+8+8+4)."""

    shared_core = False
    formula = "read(memory + write(h_m)), cores not shared"
