"""Exports in use: caches, batches, attention kernels, training, and changed numbers of loops."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.exports import TOKENS
from tests.helpers import relative_error
from tests.unit.hf.test_logits import load

pytestmark = pytest.mark.versions

SCHEMES = ["mesh", "dynamic", "residual+anchor+anchor-emb", "vanilla+mesh", "vanilla"]
LAYERS = {"vanilla+mesh": "1+2+2+1", "vanilla": "4"}


@pytest.fixture(params=SCHEMES)
def directory(exported, request):
    """An export of each kind."""
    return exported(recurrence=request.param, layers=LAYERS.get(request.param, "1+2R2+1"))[1]


def generate(model, tokens=TOKENS, **options):
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(
        tokens, attention_mask=options.pop("attention_mask", torch.ones_like(tokens)), **how
    )


def test_cached_and_uncached_tokens_are_equal(directory) -> None:
    model = load(directory)
    cached = generate(model)
    assert cached.shape == (3, 28)
    assert torch.equal(cached, generate(model, use_cache=False))
    beams = generate(model, num_beams=3)
    assert torch.equal(beams, generate(model, num_beams=3, use_cache=False))
    torch.manual_seed(0)
    drawn = generate(model, do_sample=True, top_p=0.9)
    torch.manual_seed(0)
    assert torch.equal(drawn, generate(model, do_sample=True, top_p=0.9, use_cache=False))
    assert not torch.equal(drawn, cached)


def test_logits_with_a_cache(directory) -> None:
    """One token at a time. The cache has a separate entry for each layer in each loop."""
    model = load(directory)
    with torch.no_grad():
        whole = model(TOKENS).logits
        cache, parts = None, []
        for position in range(TOKENS.shape[1]):
            out = model(TOKENS[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5
    assert len(cache.layers) == model.config.num_hidden_layers
    entries = [layer.keys for layer in cache.layers]
    assert all(entry.shape[2] == TOKENS.shape[1] for entry in entries)
    assert len({float(entry.double().sum()) for entry in entries}) == len(entries)


def test_left_padding(directory) -> None:
    """A short prompt in a batch of longer ones gets the same continuation as alone."""
    model = load(directory)
    short = TOKENS[:1, :5]
    padded = torch.cat([torch.zeros(1, 11, dtype=torch.long), short], dim=1)
    batch = torch.cat([padded, TOKENS[1:]])
    mask = torch.ones_like(batch)
    mask[0, :11] = 0
    together = model.generate(
        batch, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(together[0, 16:], generate(model, short, max_new_tokens=8)[0, 5:])
    assert torch.equal(together[1:], generate(model, TOKENS[1:], max_new_tokens=8))


def test_attention_kernels(directory) -> None:
    eager = load(directory, attn_implementation="eager")
    sdpa = load(directory, attn_implementation="sdpa")
    with torch.no_grad():
        out = eager(TOKENS, output_attentions=True, output_hidden_states=True)
        assert relative_error(sdpa(TOKENS).logits, out.logits) < 1e-5
    depth = eager.config.num_hidden_layers
    assert len(out.attentions) == depth and len(out.hidden_states) == depth + 1
    assert torch.equal(eager.get_output_embeddings()(out.hidden_states[-1]), out.logits)


def test_training_with_gradient_checkpointing(directory) -> None:
    """The loss falls, and gradients with recomputation equal those without."""
    gradients, losses = [], []
    for checkpointing in (False, True):
        model = load(directory).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
            losses.append((loss.item(), model(TOKENS, labels=TOKENS).loss.item()))
    assert losses[0][1] < losses[0][0]
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize("scheme", ["base", "residual", "anchor"])
def test_more_loops_where_the_scheme_allows_it(exported, scheme) -> None:
    directory = exported(recurrence=scheme, layers="1+2R2+1")[1]
    changed = load(directory)
    changed.set_num_loops(3)
    loaded = load(directory, num_loops=3)
    with torch.no_grad():
        assert torch.equal(changed(TOKENS).logits, loaded(TOKENS).logits)
        assert not torch.equal(changed(TOKENS).logits, load(directory)(TOKENS).logits)
    assert torch.equal(generate(changed), generate(loaded, use_cache=False))
    changed.set_num_loops(2)
    assert torch.equal(generate(changed), generate(load(directory)))


@pytest.mark.parametrize("scheme", ["mesh", "dynamic", "static", "vanilla+mesh"])
def test_other_loops_are_refused(exported, scheme) -> None:
    directory = exported(recurrence=scheme, layers=LAYERS.get(scheme, "1+2R2+1"))[1]
    with pytest.raises(
        ValueError, match=r"separate parameters per loop, and the model was trained with 2 loops"
    ):
        load(directory, num_loops=3)
    with pytest.raises(ValueError, match="num_loops=1 is not possible"):
        load(directory).set_num_loops(1)
    with pytest.raises(ValueError, match="at least 1"):
        load(directory).set_num_loops(0)


def test_save_pretrained_writes_a_complete_model(directory, tmp_path) -> None:
    """A changed and saved model loads with the code in its new directory."""
    model = load(directory)
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0.5
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_nothing_of_ours_is_imported(exported, tmp_path) -> None:
    """The directory works where megatron_mesh is not installed."""
    import subprocess
    import sys

    directory = shutil.copytree(exported()[1], tmp_path / "model")
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_mesh", "megatron"):
            raise ImportError(f"{{name}} is not installed")
sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True)
print(float(model(torch.arange(8)[None]).logits.double().sum()))
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600
    )
    assert ended.returncode == 0, ended.stderr
    with torch.no_grad():
        expected = float(load(directory)(torch.arange(8)[None]).logits.double().sum())
    assert float(ended.stdout) == pytest.approx(expected, rel=1e-5)


def test_random_initialisation(exported) -> None:
    """``from_config`` initializes the scheme's parameters as in pretraining."""
    directory = exported(recurrence="dynamic", layers="1+2R2+1")[1]
    config = json.loads((directory / "config.json").read_text())
    model = AutoModelForCausalLM.from_config(load(directory).config, trust_remote_code=True)
    scheme = dict(model.named_parameters())
    assert torch.equal(scheme["model.recurrence.maps.0.bias"], torch.tensor([1.0, 0.0, 0.0]))
    std = scheme["model.core.0.mlp.dense_h_to_4h.weight"].detach().std()
    assert float(std) == pytest.approx(config["initializer_range"], rel=0.1)
