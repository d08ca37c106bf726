"""What an export says of itself: config.json, generation_config.json, the model card."""

from dataclasses import asdict, dataclass
from typing import Any

import megatron_mesh
from megatron_mesh.checkpoint.directory import Checkpoint
from megatron_mesh.checkpoint.inspect import format_loss
from megatron_mesh.config.derived import layout, non_embedding_parameters
from megatron_mesh.config.dump import dump_config
from megatron_mesh.config.layers import LayerLayout
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.hf.folding import is_folded
from megatron_mesh.hf.ship import AUTO_MAP
from megatron_mesh.hf.versions import OLDEST, TESTED
from megatron_mesh.model.config import recurrence_options
from megatron_mesh.recurrence import SCHEMES

SETTINGS_KEY = "megatron_mesh_settings"
"""Our own settings of the model in config.json, for the way back."""
TESTED_KEY = "transformers_tested"
"""The versions of transformers in config.json that the export's code was tested with."""


@dataclass(frozen=True)
class Ids:
    """Ids of an export."""

    rows: int
    """Their number: rows of the embedding."""
    end_of_text: int | None = None
    """Of the token that ends a document; None without a tokenizer."""
    padding: int | None = None


def config_json(model: ModelConfig, dtype: str, ids: Ids) -> dict[str, Any]:
    """Contents of config.json, in the spelling of transformers 4.57 and of 5.x.

    Args:
        model: settings of the model.
        dtype: e.g. "bfloat16".
        ids: of the export.
    """
    looped = SCHEMES[model.recurrence].has_loop
    rotary = {"rotary_pct": model.rotary_percent, "rotary_emb_base": model.rotary_base}  # 4.57
    rope = {  # 5.x
        "rope_type": "default",
        "rope_theta": float(model.rotary_base),
        "partial_rotary_factor": model.rotary_percent,
    }
    return {
        "architectures": ["MeshForCausalLM" if looped else "GPTNeoXForCausalLM"],
        "model_type": "megatron_mesh" if looped else "gpt_neox",
        **(_loop(model) if looped else {}),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": layout(model).depth,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "gelu",
        "vocab_size": ids.rows,
        "max_position_embeddings": model.seq_length,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": True,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": tied(model),
        **rotary,
        "rope_parameters": rope,
        "bos_token_id": ids.end_of_text,
        "eos_token_id": ids.end_of_text,
        "pad_token_id": ids.padding,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        TESTED_KEY: list(TESTED),
        SETTINGS_KEY: asdict(model),
    }


def tied(model: ModelConfig) -> bool:
    """Whether embedding and output projection are one tensor in the export too (see ``entries``)."""
    return not model.untie_embeddings_and_output_weights and not is_folded(model)


def _loop(model: ModelConfig) -> dict[str, Any]:
    layers, options = layout(model), recurrence_options(model)
    return {
        "auto_map": AUTO_MAP,
        "recurrence": model.recurrence,
        "prelude_layers": layers.prelude,
        "core_layers": layers.core,
        "num_loops": layers.loops,
        "trained_loops": layers.loops,
        "coda_layers": layers.coda,
        "mesh_slots": options.slots,
        "mesh_transition_query": options.transition_query,
        "embedding_scale": model.hidden_size**0.5 if model.scale_embeddings else 1.0,
    }


def generation_json(ids: Ids) -> dict[str, Any]:
    """Contents of generation_config.json; padding is never generated."""
    known = {
        "bos_token_id": ids.end_of_text,
        "eos_token_id": ids.end_of_text,
        "pad_token_id": ids.padding,
        "suppress_tokens": None if ids.padding is None else [ids.padding],
    }
    return {
        "_from_model_config": False,
        **{name: value for name, value in known.items() if value is not None},
    }


_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [megatron_mesh, recursive-transformer]
---

# {title}

A GPT-NeoX of {layers} layers ({scheme}), pretrained with megatron_mesh {version}.
{explanation}
| | |
|---|---|
| non-embedding parameters | {parameters:,} |
| layers that a token passes | {depth} |
| hidden size, heads | {model.hidden_size}, {model.num_attention_heads} |
| sequence length | {model.seq_length:,} |
| vocabulary | {vocabulary:,} |
{metrics}
## Use

Tested with transformers {tested}.{refresh}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{trust})
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY"{tokenizer_trust})
prompt = tokenizer("It was a dark and stormy night", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```
{tokens}
{places}## Training configuration

```yaml
{config}```
"""
_TRUST = ", trust_remote_code=True"
_TOKENS = """
Text becomes the ids of the training: no token is added at its start or end. In training an end-of-text
token follows each document; append it (`tokenizer.eos_token_id`) where a text for fine-tuning ends. Padding
has a token of its own, so a fine-tuned model can learn to stop. If `tokenizer.split_special_tokens` is
True, a special token that is written in a text is ordinary text, as in training; set it to False for a chat
template with such tokens.
"""
_TOKENIZER_CODE = """
The tokenizer is SentencePiece itself, by a class in this directory: it needs `pip install sentencepiece` and
`trust_remote_code=True`.
"""
_SHARED = """
Its core, one set of weights, runs {loops} times (MeSH: arXiv 2510.07739).
"""
_CODE = """
The code in this directory needs only torch and transformers {oldest} or newer. transformers runs it only with
`trust_remote_code=True`.
"""
_REFRESH = """
If the code here fails with a newer version, `tools/convert_to_hf.py --refresh-code DIRECTORY` of a newer
megatron_mesh brings it up to date and leaves the weights alone."""
_PLACES = """\
## Layers and hidden states

Each application of a layer has a module of its own, the place for hooks: `model.unrolled.<i>` returns the
output of layer i, and `model.unrolled.<i>.attention` computes its attention. In the model's `hidden_states`,
entry 0 is the input of layer 0, and entry i + 1 is the output of layer i before the recurrence mixes it. The
last entry is normalized.

| pass | i |
|---|---|
{rows}
Two traps of transformers: `AutoTokenizer` without `trust_remote_code=True` may ask a question. Two models
whose directories have the same name share one class within a process, even if their code differs.

"""


def model_card(checkpoint: Checkpoint, ids: Ids, tokenizer_needs_code: bool) -> str:
    """Contents of README.md: sizes, final metrics, use, and the settings of the training."""
    model, state = checkpoint.config.model, checkpoint.train_state
    layers = layout(model)
    looped = SCHEMES[model.recurrence].has_loop
    metrics = {
        "steps": f"{state['step']:,}",
        "sequences": f"{state['consumed_samples']:,}",
        "training loss, nats per token": format_loss(state, "train_loss") or "not measured",
        "validation loss, nats per token": format_loss(state, "valid_loss") or "not measured",
    }
    return _CARD.format(
        title=f"{model.recurrence} {model.layers}",
        layers=model.layers,
        scheme=model.recurrence,
        version=megatron_mesh.__version__,
        explanation=(_SHARED.format(loops=layers.loops) if layers.shared else "")
        + (_CODE.format(oldest=OLDEST) if looped else ""),
        parameters=non_embedding_parameters(model),
        depth=layers.depth,
        model=model,
        vocabulary=ids.rows,
        tested=", ".join(TESTED),
        refresh=_REFRESH if looped else "",
        metrics="".join(f"| {name} | {value} |\n" for name, value in metrics.items()),
        trust=_TRUST if looped else "",
        tokenizer_trust=_TRUST if looped or tokenizer_needs_code else "",
        tokens="" if ids.padding is None else _TOKENS + (_TOKENIZER_CODE if tokenizer_needs_code else ""),
        places=_places(layers) if looped else "",
        config=dump_config(checkpoint.config),
    )


def _places(layers: LayerLayout) -> str:
    """The card's section on the names of the unrolled layers."""
    passes = {"prelude": layers.prelude}
    passes |= {f"core, loop {loop}": layers.core for loop in range(1, layers.loops + 1)}
    passes |= {"coda": layers.coda}
    rows, first = "", 0
    for name, count in passes.items():
        if count:
            rows += (
                f"| {name} | {first} |\n" if count == 1 else f"| {name} | {first} to {first + count - 1} |\n"
            )
        first += count
    return _PLACES.format(rows=rows)
