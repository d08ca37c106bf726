"""Resolving the model settings: scheme, layers, memory and sizes of the backbone."""

import logging
from dataclasses import replace

from megatron_mesh.config.layout import LayerLayout, check_layout, parse_layers
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.config.settings import LAYER_SETTINGS, at_least, flag, nearest, positive
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES, Scheme

logger = logging.getLogger(__name__)

_MEMORY_SETTINGS = (
    "mesh_slots",
    "mesh_transition_query",
    "mesh_memory",
    "router_init_std",
    "router_bias_init",
)


def resolve_model(model: ModelConfig) -> ModelConfig:
    """Resolve the model settings; see ``checks.resolve``."""
    scheme = _scheme(model.recurrence)
    _check_sizes(model)
    layers = _layers(model, scheme)
    slots, router_std = model.mesh_slots, model.router_init_std
    if scheme.uses_memory:
        slots = slots or layers.loops + 3
        router_std = model.init_method_std if router_std is None else router_std
    else:
        _refuse_memory_settings(model)
    return replace(
        model,
        layers=str(layers),
        prelude_layers=None,
        core_layers=None,
        num_loops=None,
        coda_layers=None,
        mesh_slots=slots,
        router_init_std=router_std,
        ffn_hidden_size=model.ffn_hidden_size or 4 * model.hidden_size,
    )


def _scheme(name: str) -> type[Scheme]:
    if name not in SCHEMES:
        near = nearest(name.replace("*", "-emb"), SCHEMES)  # the paper writes anchor*
        hint = f"did you mean {near}? The" if near else "the"
        raise UserError(f"--recurrence {name} does not exist; {hint} schemes are: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def _check_sizes(model: ModelConfig) -> None:
    at_least(1, model, "hidden_size", "num_attention_heads", "ffn_hidden_size", "seq_length", "mesh_slots")
    at_least(1, model, "vocab_size", "make_vocab_size_divisible_by", "rotary_base")
    positive(model, "norm_epsilon")
    at_least(0, model, "init_method_std", "router_init_std")
    if model.hidden_size % model.num_attention_heads:
        heads = model.num_attention_heads
        divisors = [n for n in range(1, model.hidden_size + 1) if model.hidden_size % n == 0]
        near = [*[n for n in divisors if n < heads][-1:], *[n for n in divisors if n > heads][:1]]
        raise UserError(
            f"--hidden-size {model.hidden_size} is not divisible by --num-attention-heads {heads}; use "
            f"{' or '.join(map(str, near))} heads"
        )
    _check_rotary(model.rotary_percent, model.hidden_size // model.num_attention_heads)


def _check_rotary(fraction: float, head: int) -> None:
    if not 0 < fraction <= 1:
        raise UserError(f"--rotary-percent {fraction} is out of range; it must be above 0 and at most 1")
    rotated = int(head * fraction)
    if rotated >= 2 and rotated % 2 == 0:
        return
    even = next((n for n in (rotated + 1, rotated - 1, 2) if n % 2 == 0 and 2 <= n <= head), None)
    remedy = (
        f"use --rotary-percent {min(1.0, (even + 0.5) / head):.3g}, which rotates {even}"
        if even
        else "lower --num-attention-heads, so that a head has at least two dimensions"
    )
    raise UserError(
        f"--rotary-percent {fraction} rotates {rotated} of a head's {head} dimensions, but rotary embeddings "
        f"need an even number of at least 2; {remedy}"
    )


def _layers(model: ModelConfig, scheme: type[Scheme]) -> LayerLayout:
    numbers = {field: getattr(model, name) for name, field in LAYER_SETTINGS.items()}
    given = [flag(name) for name in LAYER_SETTINGS if getattr(model, name) is not None]
    if model.layers is not None and given:
        raise UserError(f"--layers and {given[0]} are both given; keep one of them")
    if model.layers is not None:
        layers = parse_layers(model.layers)
    elif len(given) == len(numbers):
        layers = LayerLayout(**numbers)
        check_layout(layers)
    else:
        missing = [flag(name) for name in LAYER_SETTINGS if flag(name) not in given]
        raise UserError(
            f"{', '.join(missing)} missing; give all four of {', '.join(map(flag, LAYER_SETTINGS))}, "
            "or only --layers"
            if given
            else "the layers are missing; give --layers, e.g. 4+8R2+4, or a preset with --config"
        )
    if layers.shared and not scheme.has_loop:
        logger.info(
            "--recurrence %s: a plain model of %d layers, the unrolled depth of %s",
            model.recurrence,
            layers.depth,
            layers,
        )
        layers = layers.unrolled()
    elif not scheme.shared_core:
        layers = layers.distinct()
    _check_form(layers, model.recurrence, scheme)
    return layers


def _check_form(layers: LayerLayout, name: str, scheme: type[Scheme]) -> None:
    if scheme.shared_core and layers.plain:
        raise UserError(
            f"--recurrence {name} needs a core, but --layers {layers} is a plain depth; write "
            "prelude+coreRloops+coda, e.g. 4+8R2+4, or use --recurrence vanilla"
        )
    if scheme.shared_core and not layers.shared:
        shared = replace(layers, shared=True)
        raise UserError(
            f"--recurrence {name} shares the core's weights between loops, but --layers {layers} has "
            f"separate cores; write --layers {shared}, or use --recurrence vanilla+mesh"
        )
    if scheme.has_loop and layers.plain:
        raise UserError(
            f"--recurrence {name} needs separate cores, but --layers {layers} is a plain depth; write "
            "prelude+core+...+core+coda, e.g. 4+8+8+4"
        )


def _refuse_memory_settings(model: ModelConfig) -> None:
    default = ModelConfig()
    for name in _MEMORY_SETTINGS:
        if getattr(model, name) != getattr(default, name):
            raise UserError(
                f"{flag(name)} is a setting of MeSH, but --recurrence {model.recurrence} has no memory; "
                "remove it, or use --recurrence mesh"
            )
