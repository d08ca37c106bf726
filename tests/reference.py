"""GPT-NeoX with every recurrence scheme in plain torch, written from the paper, as slow as it is plain.

Shares no code with the package. It takes the model's parameters by name (Megatron-core's names), so
whoever maps names to maths wrongly is found out. Run it in float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]


def rotate(x: Tensor, percent: float, base: float) -> Tensor:
    """Rotary embedding on the first ``percent`` of each head; x is [B, heads, S, D]."""
    dim = int(x.shape[-1] * percent)
    turned, rest = x[..., :dim], x[..., dim:]
    frequency = base ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angle = torch.outer(torch.arange(x.shape[-2], dtype=x.dtype), frequency)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], dim=-1)


def layer(p: Params, prefix: str, x: Tensor, heads: int, percent: float, base: float) -> Tensor:
    """x + attn(ln1(x)) + mlp(ln2(x)); x is [B, S, H]."""

    def linear(name: str, y: Tensor) -> Tensor:
        return y @ p[f"{prefix}{name}.weight"].T + p[f"{prefix}{name}.bias"]

    def norm(name: str) -> Tensor:
        return layer_norm(x, p[f"{prefix}{name}.weight"], p[f"{prefix}{name}.bias"])

    batch, seq, hidden = x.shape
    qkv = linear("self_attention.linear_qkv", norm("input_layernorm"))
    q, k, v = qkv.view(batch, seq, heads, 3, hidden // heads).permute(3, 0, 2, 1, 4)
    q, k = rotate(q, percent, base), rotate(k, percent, base)
    scores = q @ k.transpose(-1, -2) / (hidden // heads) ** 0.5
    scores = scores.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), float("-inf"))
    context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, hidden)
    attention = linear("self_attention.linear_proj", context)
    inner = linear("mlp.linear_fc1", norm("pre_mlp_layernorm"))
    return x + attention + linear("mlp.linear_fc2", F.gelu(inner))


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def logits(
    p: Params,
    tokens: Tensor,
    scheme: str,
    parts: tuple[int, int, int, int],
    heads: int,
    *,
    slots: int = 0,
    transition_query: str = "prelude-output",
    percent: float = 0.25,
    base: float = 10000.0,
) -> Tensor:
    """Logits [B, S, V] for tokens [B, S]; ``parts`` is (prelude, core, loops, coda)."""
    prelude, core, loops, coda = parts
    hidden = p["embedding.word_embeddings.weight"].shape[1]

    def run(section: str, count: int, x: Tensor) -> Tensor:
        for i in range(count):
            x = layer(p, f"decoder.{section}layers.{i}.", x, heads, percent, base)
        return x

    def run_core(t: int, x: Tensor) -> Tensor:
        return run(f"cores.{t}." if scheme == "vanilla+mesh" else "core.", core, x)

    h_emb = p["embedding.word_embeddings.weight"][tokens] * hidden**0.5
    if scheme == "vanilla":
        h = run("", prelude + core * loops + coda, h_emb)
    else:
        o = run("prelude.", prelude, h_emb)
        if scheme in ("mesh", "vanilla+mesh"):
            h = mesh_loop(p, o, h_emb, run_core, loops, slots, transition_query)
        else:
            h = plain_loop(p, o, h_emb, run_core, loops, scheme)
        h = run("coda.", coda, h)
    h = layer_norm(h, p["decoder.final_layernorm.weight"], p["decoder.final_layernorm.bias"])
    out = p.get("output_layer.weight", p["embedding.word_embeddings.weight"])
    return h @ out.T


def plain_loop(p: Params, h_0: Tensor, h_emb: Tensor, run_core, loops: int, scheme: str) -> Tensor:
    h = h_0
    for t in range(loops):
        h_m = run_core(t, h)
        if scheme == "static":
            a = p["decoder.recurrence.weight"][t]
            h = a[0] * h_m + a[1] * h_0 + a[2] * h_emb
        elif scheme == "dynamic":
            a = h @ p[f"decoder.recurrence.maps.{t}.weight"].T + p[f"decoder.recurrence.maps.{t}.bias"]
            h = a[..., :1] * h_m + a[..., 1:2] * h_0 + a[..., 2:] * h_emb
        else:
            added = {"base": 0, "residual": h, "anchor": h_0, "anchor-emb": h_emb}
            h = h_m + sum(added[name] for name in scheme.split("+"))
    return h


def mesh_loop(p: Params, o: Tensor, h_emb: Tensor, run_core, loops: int, slots: int, query: str) -> Tensor:
    buffer = [h_emb] + [torch.zeros_like(h_emb)] * (slots - 1)

    def cycle(t: int, out: Tensor, seen: Tensor) -> Tensor:
        def route(kind: str) -> Tensor:
            name = f"decoder.recurrence.{kind}.{t}"
            return (seen @ p[f"{name}.weight"].T + p[f"{name}.bias"]).softmax(-1)

        write, read = route("write"), route("read")
        for b in range(slots):
            buffer[b] = buffer[b] + write[..., b : b + 1] * out
        return sum(read[..., b : b + 1] * buffer[b] for b in range(slots))

    h = cycle(0, o, o if query == "prelude-output" else h_emb)
    for t in range(loops):
        h = cycle(t + 1, run_core(t, h), h)
    return h
