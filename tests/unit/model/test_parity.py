"""Compare the model's logits and gradients with the plain float64 reference."""

import pytest
import torch

from megatron_mesh.config.layout import layout
from megatron_mesh.model import build_model
from megatron_mesh.recurrence import SCHEMES
from tests.helpers import randomise, relative_error, tiny_config
from tests.reference import logits

TOLERANCE = 1e-5
RECOMPUTE = {
    "none": {},
    "core attention": {"recompute_granularity": "selective"},
    "every module": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "mlp"],
    },
    "full uniform": {"recompute_granularity": "full"},
    "full block": {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 1,
    },
}


def assert_equal_to_reference(scheme: str, layers: str, **settings) -> None:
    config = tiny_config(scheme, layers, **settings)
    model = build_model(config)
    randomise(model)
    # With other seeds, the gradient of a bias may nearly cancel out and lose another digit in float32.
    generator = torch.Generator().manual_seed(11)
    tokens = torch.randint(0, 96, (2, 16), generator=generator)
    labels = torch.randint(0, 96, (2, 16), generator=generator)

    ours = model(tokens, None, None)
    model(tokens, None, None, labels=labels).sum().backward()

    params = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    parts = layout(config.model)
    reference = logits(
        params,
        tokens,
        scheme,
        (parts.prelude, parts.core, parts.loops, parts.coda),
        config.model.num_attention_heads,
        slots=config.model.mesh_slots or 0,
        transition_query=config.model.mesh_transition_query,
        percent=config.model.rotary_percent,
    )
    known = reference[..., :96].flatten(0, 1)  # padded entries have zero probability
    torch.nn.functional.cross_entropy(known, labels.flatten(), reduction="sum").backward()

    assert ours.dtype == torch.float32
    assert relative_error(ours, reference) < TOLERANCE
    errors = {name: relative_error(p.grad, params[name].grad) for name, p in model.named_parameters()}
    assert max(errors.values()) < TOLERANCE, max(errors.items(), key=lambda item: item[1])
    zero = {name for name, p in params.items() if p.grad.norm() == 0}
    # With one slot the softmax is constant, so the routers have no gradient.
    expected = {n for n in params if "recurrence" in n} if config.model.mesh_slots == 1 else set()
    assert zero == expected, "a gradient that is zero proves nothing"


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme(scheme: str, loops: int) -> None:
    assert_equal_to_reference(scheme, f"1+2R{loops}+1")


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("scheme", ["vanilla", "residual+anchor+anchor-emb", "dynamic", "mesh"])
def test_recompute(scheme: str, recompute: str) -> None:
    assert_equal_to_reference(scheme, "1+2R2+1", **RECOMPUTE[recompute])


@pytest.mark.parametrize(
    "settings",
    [
        {"mesh_transition_query": "embedding"},
        {"mesh_memory": "slots"},
        {"mesh_slots": 1},
        {"mesh_slots": 2},
        {"untie_embeddings_and_output_weights": False},
        {"rotary_percent": 1.0},
        {"layers": "0+1R3+0"},
        {"layers": "2+1R2+0"},
        {"layers": "0+1R2+2"},
    ],
    ids=str,
)
def test_options_of_mesh(settings: dict) -> None:
    assert_equal_to_reference("mesh", settings.pop("layers", "1+1R2+1"), **settings)


def test_the_reference_is_causal_and_positional() -> None:
    """Check the reference itself: a token changes no earlier logits, but swapping two changes later ones."""
    config = tiny_config("mesh", "1+1R2+1")
    model = build_model(config)
    params = {n: p.detach().double() for n, p in model.named_parameters()}
    tokens = torch.randint(0, 96, (1, 16), generator=torch.Generator().manual_seed(0))
    changed, exchanged = tokens.clone(), tokens.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 96
    exchanged[0, [2, 3]] = exchanged[0, [3, 2]]
    first, second, third = (
        logits(params, t, "mesh", (1, 1, 2, 1), 4, slots=5) for t in (tokens, changed, exchanged)
    )
    torch.testing.assert_close(first[:, :10], second[:, :10], rtol=0, atol=0)
    assert not torch.allclose(first[:, 10:], second[:, 10:])
    assert not torch.allclose(first[:, -1], third[:, -1], rtol=1e-9)


def test_bf16_is_near() -> None:
    """With bfloat16 weights and activations, the error is no larger than 8 mantissa bits explain."""
    config = tiny_config("mesh", "1+2R2+1", bf16=True)
    model = build_model(config)
    tokens = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(3))
    params = {n: p.detach().double() for n, p in model.named_parameters()}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    reference = logits(params, tokens, "mesh", (1, 2, 2, 1), 4, slots=5)
    assert relative_error(model(tokens, None, None), reference) < 0.03


@pytest.mark.parametrize("tied", [False, True])
def test_padding_of_the_vocabulary_changes_nothing(tied: bool) -> None:
    """Whatever their values, padded rows change neither the loss nor any gradient, and get no gradient."""
    tokens, labels = torch.randint(0, 96, (2, 2, 16), generator=torch.Generator().manual_seed(3))
    found = {}
    for multiple in (1, 10, 128):
        config = tiny_config(
            make_vocab_size_divisible_by=multiple, untie_embeddings_and_output_weights=not tied
        )
        model = build_model(config)
        randomise(model)
        rows = {name: p for name, p in model.named_parameters() if "embeddings" in name or "output" in name}
        for index, parameter in enumerate(rows.values()):
            drawn = torch.empty(96, 32).normal_(generator=torch.Generator().manual_seed(index))
            parameter.data.fill_(9.0)  # a logit of the padding would be large
            parameter.data[:96] = drawn
        losses = model(tokens, None, None, labels=labels)
        losses.sum().backward()
        assert all(not p.grad[96:].any() for p in rows.values())
        found[multiple] = (
            losses,
            {name: p.grad[:96] if name in rows else p.grad for name, p in model.named_parameters()},
        )
    plain, gradients = found[1]
    for losses, others in (found[10], found[128]):
        torch.testing.assert_close(losses, plain)
        for name, gradient in gradients.items():
            assert relative_error(others[name], gradient) < 1e-5, name
