"""Writes the descriptions in an export: config.json, generation_config.json and the model card."""

from dataclasses import asdict, dataclass
from typing import Any

import megatron_mesh
from megatron_mesh.checkpoint.directory import Checkpoint
from megatron_mesh.checkpoint.inspect import format_loss
from megatron_mesh.config.layout import LayerLayout, layout
from megatron_mesh.config.schema import ModelConfig
from megatron_mesh.config.settings import dump_config
from megatron_mesh.config.sizes import non_embedding_parameters
from megatron_mesh.hf.convert.ship import AUTO_MAP
from megatron_mesh.hf.convert.tensors import is_folded
from megatron_mesh.hf.modeling.versions import OLDEST, TESTED
from megatron_mesh.model.transformer_config import recurrence_options
from megatron_mesh.recurrence import SCHEMES

SETTINGS_KEY = "megatron_mesh_settings"
"""Key in config.json of our own model settings, from which a checkpoint can be restored."""
TESTED_KEY = "transformers_tested"
"""Key in config.json of the transformers versions that the export's code was tested with."""


@dataclass(frozen=True)
class ExportVocabulary:
    """Size and special tokens of an export's vocabulary."""

    rows: int
    """Number of ids, which is the number of rows of the embedding."""
    end_of_text: int | None = None
    """Id of the token that ends a document; None without a tokenizer."""
    padding: int | None = None
    """Id of the padding token; None without a tokenizer."""


def config_json(model: ModelConfig, dtype: str, vocabulary: ExportVocabulary) -> dict[str, Any]:
    """Return the contents of config.json, with the field names of both transformers 4.57 and 5.x.

    Args:
        model: settings of the model.
        dtype: dtype of the weights, e.g. "bfloat16".
        vocabulary: the export's vocabulary.
    """
    looped = SCHEMES[model.recurrence].has_loop
    rotary = {"rotary_pct": model.rotary_percent, "rotary_emb_base": model.rotary_base}  # transformers 4.57
    rope = {  # transformers 5.x
        "rope_type": "default",
        "rope_theta": float(model.rotary_base),
        "partial_rotary_factor": model.rotary_percent,
    }
    return {
        "architectures": ["MeshForCausalLM" if looped else "GPTNeoXForCausalLM"],
        "model_type": "megatron_mesh" if looped else "gpt_neox",
        **(_loop_fields(model) if looped else {}),
        "hidden_size": model.hidden_size,
        "num_hidden_layers": layout(model).depth,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": "gelu",
        "vocab_size": vocabulary.rows,
        "max_position_embeddings": model.seq_length,
        "layer_norm_eps": model.norm_epsilon,
        "use_parallel_residual": True,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": _is_tied(model),
        **rotary,
        "rope_parameters": rope,
        "bos_token_id": vocabulary.end_of_text,
        "eos_token_id": vocabulary.end_of_text,
        "pad_token_id": vocabulary.padding,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        TESTED_KEY: list(TESTED),
        SETTINGS_KEY: asdict(model),
    }


def _is_tied(model: ModelConfig) -> bool:
    """Whether embedding and output projection are one tensor in the export (see ``names.entries``)."""
    return not model.untie_embeddings_and_output_weights and not is_folded(model)


def _loop_fields(model: ModelConfig) -> dict[str, Any]:
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


def generation_json(vocabulary: ExportVocabulary) -> dict[str, Any]:
    """Return the contents of generation_config.json, which suppresses the padding token."""
    known = {
        "bos_token_id": vocabulary.end_of_text,
        "eos_token_id": vocabulary.end_of_text,
        "pad_token_id": vocabulary.padding,
        "suppress_tokens": None if vocabulary.padding is None else [vocabulary.padding],
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

A GPT-NeoX model with the layer layout {layers} and the recurrence scheme `{scheme}`, pretrained with
megatron_mesh {version}.
{explanation}
| | |
|---|---|
| non-embedding parameters | {parameters:,} |
| layers that a token passes through | {depth} |
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
{layer_table}## Training configuration

```yaml
{config}```
"""
_TRUST = ", trust_remote_code=True"
_TOKENS = """
The tokenizer gives the same ids as in training and adds no tokens at the start or end of a text. In training,
an end-of-text token follows each document, so append it (`tokenizer.eos_token_id`) to each text that you
fine-tune on. The padding token is a different one, so a fine-tuned model can learn to stop. If
`tokenizer.split_special_tokens` is True, special tokens in a text are read as ordinary text, as in training.
Set it to False for a chat template that contains such tokens.
"""
_TOKENIZER_CODE = """
The tokenizer calls SentencePiece through a class in this directory. It needs `pip install sentencepiece` and
`trust_remote_code=True`.
"""
_SHARED = """
The core has one set of weights and runs {loops} times. See the MeSH paper, arXiv 2510.07739.
"""
_CODE = """
The code in this directory needs only torch and transformers {oldest} or newer. transformers runs it only with
`trust_remote_code=True`.
"""
_REFRESH = """
If the code fails with a newer version, upgrade megatron_mesh and run
`tools/convert_to_hf.py --refresh-code DIRECTORY`, which updates the code and leaves the weights unchanged."""
_LAYERS = """\
## Layers and hidden states

Each application of a layer has its own module, on which you can register hooks: `model.unrolled.<i>` returns
the output of layer i, and `model.unrolled.<i>.attention` computes its attention. In the model's
`hidden_states`, entry 0 is the input of layer 0, and entry i + 1 is the output of layer i before the
recurrence mixes it. The last entry has passed the final norm.

| pass | layers i |
|---|---|
{rows}
Two pitfalls of transformers: without `trust_remote_code=True`, `AutoTokenizer` may ask interactively whether
to trust the code. And two models whose directories have the same name share one class within a process, even
if their code differs.

"""


def model_card(checkpoint: Checkpoint, vocabulary: ExportVocabulary, tokenizer_needs_code: bool) -> str:
    """Return the contents of README.md: sizes, final losses, usage, and the training configuration."""
    model, state = checkpoint.config.model, checkpoint.train_state
    layers = layout(model)
    looped = SCHEMES[model.recurrence].has_loop
    metrics = {
        "steps": f"{state['step']:,}",
        "sequences": f"{state['consumed_samples']:,}",
        "training loss, nats per token": format_loss(state, "train_loss") or "not measured",
        "validation loss, nats per token": format_loss(state, "valid_loss") or "not measured",
    }
    tokens = _TOKENS + (_TOKENIZER_CODE if tokenizer_needs_code else "")
    if vocabulary.padding is None:
        tokens = ""
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
        vocabulary=vocabulary.rows,
        tested=", ".join(TESTED),
        refresh=_REFRESH if looped else "",
        metrics="".join(f"| {name} | {value} |\n" for name, value in metrics.items()),
        trust=_TRUST if looped else "",
        tokenizer_trust=_TRUST if looped or tokenizer_needs_code else "",
        tokens=tokens,
        layer_table=_layer_table(layers) if looped else "",
        config=dump_config(checkpoint.config),
    )


def _layer_table(layers: LayerLayout) -> str:
    """Return the card's section on the unrolled layers."""
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
    return _LAYERS.format(rows=rows)
