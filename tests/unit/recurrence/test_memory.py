"""Both computations of the memory give the same values and gradients; its weighted sum is correct."""

import pytest
import torch

from megatron_mesh.recurrence import LoopState, RecurrenceOptions, build_scheme
from megatron_mesh.recurrence.mixing import weighted_sum

S, B, H = 5, 2, 8


def double_mesh(loops: int, slots: int, memory: str, query: str = "prelude-output") -> torch.nn.Module:
    options = RecurrenceOptions(slots=slots, memory=memory, transition_query=query)
    scheme = build_scheme("mesh", H, loops, options).double()
    generator = torch.Generator().manual_seed(loops * 100 + slots)
    for parameter in scheme.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return scheme


def run(scheme: torch.nn.Module, loops: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the loop around an arbitrary core; return the output and all gradients."""
    generator = torch.Generator().manual_seed(7)
    h_emb = torch.randn(S, B, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(H, H, generator=generator, dtype=torch.float64, requires_grad=True)
    state, x = LoopState(), h_emb
    for index in range(loops + 2):
        x = torch.tanh(scheme.enter(index, x, state) @ weights)
    x.pow(2).sum().backward()
    return x.detach(), [h_emb.grad, weights.grad, *(p.grad for p in scheme.parameters())]


@pytest.mark.parametrize("query", ["prelude-output", "embedding"])
@pytest.mark.parametrize("loops,slots", [(1, 1), (1, 4), (2, 5), (2, 2), (3, 6), (4, 3)])
def test_factored_equals_slots(loops: int, slots: int, query: str) -> None:
    ours, our_grads = run(double_mesh(loops, slots, "factored", query), loops)
    reference, reference_grads = run(double_mesh(loops, slots, "slots", query), loops)
    torch.testing.assert_close(ours, reference, rtol=1e-13, atol=1e-13)
    for a, b in zip(our_grads, reference_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_read_sees_the_write_of_its_own_cycle() -> None:
    """If all routers write and read only slot 1, a cycle returns what has been written."""
    scheme = double_mesh(2, 5, "factored")
    for router in [*scheme.write, *scheme.read]:
        torch.nn.init.zeros_(router.weight)
        router.bias.data = torch.tensor([-1e4, 1e4, -1e4, -1e4, -1e4], dtype=torch.float64)
    state = LoopState()
    h_emb, o = torch.randn(2, S, B, H, dtype=torch.float64)
    scheme.enter(0, h_emb, state)
    torch.testing.assert_close(scheme.enter(1, o, state), o)
    torch.testing.assert_close(scheme.enter(2, o, state), 2 * o)  # slots accumulate


def test_weighted_sum_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    states = [
        torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)
    ]
    torch.testing.assert_close(
        weighted_sum(weights, states), torch.einsum("sbj,jsbh->sbh", weights, torch.stack(states))
    )
    assert torch.autograd.gradcheck(lambda w, *xs: weighted_sum(w, xs), (weights, *states))


def test_weighted_sum_of_bf16_accumulates_in_fp32() -> None:
    weights = torch.tensor([1.0, 1.0, 1.0, -1.0]).expand(1, 1, 4)
    states = [torch.full((1, 1, 1), x, dtype=torch.bfloat16) for x in (256.0, 1.0, 1.0, 256.0)]
    result = weighted_sum(weights, states)
    assert result.dtype == torch.bfloat16
    assert result.item() == 2.0  # bf16 has no 257, so adding in bf16 gives 0


def test_routers_start_uniform_or_near_base() -> None:
    def softmaxes(bias: float) -> torch.Tensor:
        scheme = build_scheme("mesh", H, 2, RecurrenceOptions(slots=5, router_bias_init=bias))
        scheme.init_parameters(lambda name, weight, std: torch.nn.init.zeros_(weight))
        return torch.stack([torch.cat(scheme.route(t, torch.zeros(1, 1, H))).squeeze() for t in range(3)])

    torch.testing.assert_close(softmaxes(0.0), torch.full((3, 2, 5), 0.2))
    biased = softmaxes(1.5)
    assert biased.argmax(-1).tolist() == [[1, 1], [2, 2], [3, 3]]  # slot t + 1 in cycle t


def test_observer_sees_every_cycle() -> None:
    scheme, seen = double_mesh(3, 6, "factored"), []
    scheme.observer = lambda cycle, w, r: seen.append((cycle, w, r))
    run(scheme, 3)
    assert [cycle for cycle, _, _ in seen] == [0, 1, 2, 3]
    for _, w, r in seen:
        assert w.shape == r.shape == (S, B, 6)
        assert not w.requires_grad
        for weights in (w, r):
            torch.testing.assert_close(weights.sum(-1), torch.ones(S, B, dtype=torch.float64))
