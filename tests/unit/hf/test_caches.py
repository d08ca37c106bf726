"""Forward and generate with every kind of cache in transformers give the same output as without a cache.

CI runs this file with several versions of transformers.
"""

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache

from megatron_mesh.hf.modeling.layers_mesh import CACHE_NAME
from tests.helpers import relative_error
from tests.unit.hf.models import END, IDS, PADDING, SCHEMES, greedy, looped, stock, unrolled_twin

pytestmark = pytest.mark.versions
KINDS = [*SCHEMES, "stock"]


@pytest.fixture(params=KINDS)
def model(request):
    """A model of each scheme, and a stock GPT-NeoX, which shows what transformers itself can do."""
    return stock() if request.param == "stock" else looped(request.param)


def padded() -> tuple[Tensor, Tensor]:
    """Two prompts of lengths 5 and 8, the first with padding on the left, and their mask."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :3], mask[0, :3] = PADDING, 0
    return ids, mask


def test_the_base_recurrence_is_a_stock_model_of_the_unrolled_depth() -> None:
    model = looped("base")
    twin = unrolled_twin(model)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, twin(IDS).logits) < 1e-5
    ids, mask = padded()
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(
            greedy(model, ids, attention_mask=mask, **options),
            greedy(twin, ids, attention_mask=mask, **options),
        )


def test_caches_and_beams(model) -> None:
    ids, mask = padded()
    uncached = greedy(model, ids, attention_mask=mask, use_cache=False)
    assert len(set(uncached[:, 8:].flatten().tolist())) > 4, (
        "the model repeats itself, which makes this test meaningless"
    )
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(greedy(model, ids, attention_mask=mask, **options), uncached), options
    for row, length in ((0, 5), (1, 8)):
        alone = greedy(model, ids[row : row + 1, 8 - length :])[0, length:]
        assert torch.equal(uncached[row, 8 : 8 + len(alone)], alone)
    beams = greedy(model, ids, attention_mask=mask, num_beams=3)
    assert torch.equal(beams, greedy(model, ids, attention_mask=mask, num_beams=3, use_cache=False))


def test_assisted_decoding(model) -> None:
    """Drafts come from the model itself, from another model, or from the prompt."""
    ids = torch.cat([IDS[1:], IDS[1:]], dim=1)
    alone = greedy(model, ids, use_cache=False)
    other = stock(layers=1)
    assert torch.equal(greedy(model, ids, assistant_model=model), alone)
    assert torch.equal(greedy(model, ids, assistant_model=other), alone)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=2), alone)
    assert torch.equal(greedy(other, ids, assistant_model=model), greedy(other, ids))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_prefill_in_chunks(scheme, chunk, name) -> None:
    """The cache has either name, and is created by the caller or by the model."""
    model = looped(scheme)
    ids, mask = padded()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    depth = model.config.num_hidden_layers
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
        assert getattr(whole, CACHE_NAME) is None
        for cache in (
            None,
            DynamicCache(config=model.config),
            StaticCache(config=model.config, max_cache_len=16),
        ):
            parts = []
            for start in range(0, 8, chunk):
                here = slice(start, start + chunk)
                out = model(
                    ids[:, here],
                    attention_mask=mask[:, : start + chunk],
                    position_ids=positions[:, here],
                    use_cache=True,
                    **{name: cache},
                )
                cache = getattr(out, CACHE_NAME)
                parts.append(out.logits)
            assert relative_error(torch.cat(parts, dim=1)[mask.bool()], whole.logits[mask.bool()]) < 1e-5
            assert cache.get_seq_length() == 8 and len(cache.layers) == depth


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_positions_follow_the_cache(model, kind) -> None:
    """Without position_ids, the next token's position is the number of tokens in the cache."""
    sizes = {} if kind is DynamicCache else {"max_cache_len": 16}
    cache = kind(config=model.config, **sizes)
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        parts = [
            model(IDS[:, start : start + 2], use_cache=True, past_key_values=cache).logits
            for start in range(0, 8, 2)
        ]
    assert relative_error(torch.cat(parts, dim=1), whole) < 1e-5


@pytest.mark.parametrize("name", ["past_key_value", "layer_past", "past", "kv", "state_of_transformers_7"])
def test_a_cache_by_another_name_is_refused(name) -> None:
    """If it were ignored, each token would be decoded without the tokens before it."""
    model = looped()
    with pytest.raises(TypeError, match=f"doesn't know a cache named {name!r}"):
        model(IDS, **{name: DynamicCache(config=model.config)})
    with pytest.raises(TypeError, match=f"doesn't know a cache named {name!r}"):
        model.model(IDS, **{name: DynamicCache(config=model.config)})


def test_caches_that_contradict_each_other() -> None:
    model = looped()
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    model(IDS, cache=one, past_key_values=one)
    assert one.get_seq_length() == 8
    with pytest.raises(ValueError, match="two names of the same argument"):
        model(IDS, cache=one, past_key_values=other)


@pytest.mark.parametrize(("scheme", "loops"), [*((scheme, 2) for scheme in SCHEMES), ("base", 3)])
def test_continuous_batching(scheme, loops, monkeypatch) -> None:
    """Prompts that share decoding steps, one of them in two chunks, get the same tokens as alone."""
    model = looped(scheme)
    model.set_num_loops(loops)
    sizes = {"num_blocks": 16, "max_batch_tokens": 12}  # the default is a share of the memory
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": END, "pad_token_id": PADDING}
    options = {}
    if transformers.__version__.startswith("4."):
        how |= sizes
        memory = (torch.device("cpu"), 2**30, 0, 0)  # transformers 4 can only ask an accelerator
        module = "transformers.generation.continuous_batching.cache"
        monkeypatch.setattr(f"{module}.get_device_and_memory_breakdown", lambda: memory)
    else:
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(**sizes)
    prompts = [[5, 6, 7, 8], [9, 10, 11], IDS[0].tolist()]
    alone = [greedy(model, torch.tensor([prompt]), use_cache=False)[0, len(prompt) :] for prompt in prompts]
    done = model.generate_batch(inputs=prompts, generation_config=GenerationConfig(**how), **options)
    answers = [list(done[name].generated_tokens) for name in sorted(done)]
    assert answers == [tokens.tolist() for tokens in alone]
