"""With any config.json, a model either survives a conversion and back with equal logits, or is rejected.

The logits of the same directory in transformers are the reference.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import import_model

HIDDEN, HEADS, VOCABULARY = 64, 4, 128
TOKENS = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(2))

ROPE: list[Any] = [
    None, {}, [], {"rope_type": "default"}, {"rope_theta": 500}, {"rope_theta": 500.0, "type": "default"},
    {"rope_theta": 10000.5}, {"type": "linear", "factor": 2}, {"rope_type": "linear", "factor": 2.0},
    {"type": "default", "rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "type": "dynamic"},
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, {"factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.3},
    {"full_attention": {"rope_type": "linear", "factor": 2.0}}, {"rope_type": None},
    {"rope_theta": "500"}, {"rope_theta": True}, {"rope_theta": 1e300}, {"rope_theta": 0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
]  # fmt: skip
SIZES = [0, -1, 1, 2, 3, "2", 2.0, True, None, [2], 10**12, 10**400]
# Valid and invalid values of each field.
FIELDS: dict[str, list[Any]] = {
    "vocab_size": [*SIZES, VOCABULARY + 1, float(VOCABULARY), str(VOCABULARY)],
    "hidden_size": [*SIZES, 48, 63],
    "num_hidden_layers": SIZES,
    "num_attention_heads": [*SIZES, 4, 5, 8, 16, 64],
    "intermediate_size": [*SIZES, 64],
    "max_position_embeddings": SIZES,
    "hidden_act": ["gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "relu", "GELU", None],
    "rotary_pct": [1e308, 10**400, 0.25, 0.3, 0.5, 0.75, 1, 1.0, 0, 1.5, -0.5, 0.01, "0.5", None, True, 0.49],
    "rotary_emb_base": [500, 500.0, 10000, 10000.5, 1, 1.5, 0, -3, "10000", None, True, 10**6, 10**25],
    "rope_theta": [500, 10000, 10000.0, 10000.5, None, "10000"],
    "partial_rotary_factor": [0.25, 0.5, None, "x"],
    "rope_scaling": ROPE,
    "rope_parameters": ROPE,
    "layer_norm_eps": [10**400, 1e-5, 1e-3, 1e-12, 0.0, 0, 1, -1.0, "1e-5", None, True],
    "initializer_range": [0.02, 0, 1, -1.0, "x", None],
    "use_parallel_residual": [True, False, None, 1, 0, "true"],
    "attention_bias": [True, False, None, 1, 0],
    "tie_word_embeddings": [True, False, None, 0, 1, "false"],
    "hidden_dropout": [0.0, 0.1, 1, 2, None, "0.1"],
    "attention_dropout": [0, 0.5, -1, None],
    "classifier_dropout": [0.1, None, 7],
    "is_decoder": [True, False, None],
    "pruned_heads": [{}, {"0": [1]}, None],
    "head_dim": [HIDDEN // HEADS, 8, 64, None],
    "sliding_window": [None, 2],
    "layer_types": [None, ["sliding_attention"] * 2],
    "num_key_value_heads": [1, 2],
    "quantization_config": [None, {}, {"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "per_layer_config": [None, {"0": {"intermediate_size": 8}}],
    "dtype": ["float32", "bfloat16", "float16", None],
    "torch_dtype": ["float32", "float16", None],
    "temperature": [0.7],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "transformers_weights": [None, "other.safetensors"],
    "something_new": [None, 1],
    "model_type": ["gpt_neox", "gpt_neox_japanese", "megatron_mesh", None],
    "megatron_mesh_settings": [{}, None, [], {"make_vocab_size_divisible_by": 32}, {"scale_embeddings": True},
        {"make_vocab_size_divisible_by": "8"}, {"make_vocab_size_divisible_by": 0}, {"mesh_memory": "slots"}],
}  # fmt: skip
LOOP_FIELDS: dict[str, list[Any]] = {
    **FIELDS,
    "recurrence": ["mesh", "base", "anchor", "vanilla", "vanilla+mesh", "mosh", None, 3],
    "prelude_layers": SIZES,
    "core_layers": SIZES,
    "coda_layers": SIZES,
    "num_loops": SIZES,
    "trained_loops": SIZES,
    "mesh_slots": [*SIZES, 5, 6],
    "mesh_transition_query": ["prelude-output", "embedding", "core", None],
    "embedding_scale": [1, 1.0, HIDDEN**0.5, 3.0, 4.9, "1", None, True],
}


def random_fields(draw: random.Random) -> dict[str, Any]:
    """Return the config fields of a valid GPT-NeoX."""
    base = draw.choice([100, 10000, 10000.0, 123456])
    share = draw.choice([0.25, 0.26, 0.5, 1.0])
    # transformers 4 doesn't read the new spelling.
    spelling = draw.choice(
        ["old", "both", "none", *(["new"] if int(transformers.__version__[0]) > 4 else [])]
    )
    old = {"rotary_emb_base": base, "rotary_pct": share}
    new = {"rope_theta": float(base), "partial_rotary_factor": share, "rope_type": "default"}
    return {
        "model_type": "gpt_neox",
        "vocab_size": draw.choice([VOCABULARY, 2 * VOCABULARY]),
        "hidden_size": HIDDEN,
        "num_hidden_layers": draw.randint(1, 3),
        "num_attention_heads": draw.choice([1, 2, HEADS]),
        "intermediate_size": draw.choice([16, 40]),
        "max_position_embeddings": draw.choice([8, 24]),
        "layer_norm_eps": draw.choice([1e-5, 1e-2, 1e-12]),
        "tie_word_embeddings": draw.random() < 0.3,
        "hidden_dropout": draw.choice([0.0, 0.0, 0.1]),
        "initializer_range": draw.choice([0.02, 0.01]),
        **(old if spelling in ("old", "both") else {}),
        **({"rope_parameters": new, "transformers_version": "5.1.0"} if spelling in ("new", "both") else {}),
    }


def write_model(directory: Path, fields: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write a model that has no parameters at zero or one, and a config.json of exactly these fields."""
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**json.loads(json.dumps(fields))))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    model.to(dtype).save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(fields))


def logits_of(directory: Path) -> torch.Tensor:
    """Return logits in transformers, for ids below the smallest vocabulary size here."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def convert_and_back(directory: Path, scratch: Path) -> str:
    """Convert a directory to a checkpoint and back, and return the outcome."""
    try:
        import_model(directory, scratch / "megatron")
    except UserError as error:
        assert not list(scratch.glob("megatron*"))
        assert "\n" not in str(error)
        return f"rejected: {error}"
    export_checkpoint(scratch / "megatron", scratch / "back")
    try:
        before = logits_of(directory)
    except Exception:  # whatever transformers raises for a model that it cannot open
        return "converted, but transformers cannot open it"
    assert torch.equal(logits_of(scratch / "back"), before)
    return "converted"


def test_valid_models_come_back(tmp_path: Path) -> None:
    draw = random.Random(0)
    for index in range(15):
        scratch = tmp_path / str(index)
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16])
        fields = random_fields(draw)
        write_model(scratch / "source", fields, dtype)
        assert convert_and_back(scratch / "source", scratch) == "converted", fields


def check_changed(source: Path, tmp_path: Path, changes: dict[str, list[Any]], cases: int) -> None:
    draw = random.Random(1)
    good = json.loads((source / "config.json").read_text())
    every = [(name, value) for name, values in changes.items() for value in values]
    seen = dict.fromkeys(("rejected", "converted"), 0)
    for index, (name, value) in enumerate(draw.sample(every, cases)):
        scratch = tmp_path / str(index)
        shutil.copytree(source, scratch / "source")
        config = {**good, name: value}
        if draw.random() < 0.2:
            other, another = draw.choice(every)
            config[other] = another
        (scratch / "source/config.json").write_text(json.dumps(config))
        result = convert_and_back(scratch / "source", scratch).partition(":")[0]
        seen[result] = seen.get(result, 0) + 1
        shutil.rmtree(scratch)
    assert seen["rejected"] > cases / 4 and seen["converted"] > cases / 10, seen


@pytest.mark.parametrize("tied", [False, True])
def test_changed_plain_models(tmp_path: Path, tied: bool) -> None:
    fields = {
        "model_type": "gpt_neox",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 40,
        "max_position_embeddings": 24,
        "tie_word_embeddings": tied,
    }
    write_model(tmp_path / "source", fields)
    check_changed(tmp_path / "source", tmp_path, FIELDS, 60)


def test_changed_exports(exported: Callable[..., Any], tmp_path: Path) -> None:
    _, directory, _ = exported(
        recurrence="mesh",
        layers="1+1R2+1",
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
    )
    check_changed(directory, tmp_path, LOOP_FIELDS, 50)
