"""Models whose vocabulary was resized in transformers convert to checkpoints, run in parallel, and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXForCausalLM

from megatron_mesh.checkpoint.offline import open_checkpoint
from megatron_mesh.config.layout import padded_vocab_size
from megatron_mesh.config.resolve.parallel import check_tensor_parallel
from megatron_mesh.config.schema import ParallelConfig
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import import_model
from megatron_mesh.parallel import build_stage
from tests.exports import export_config, load_weights
from tests.helpers import one_process, relative_error
from tests.unit.hf.test_bring_in import stock
from tests.unit.hf.test_logits import load, weights_of

SIZES: list[dict[str, Any]] = [
    {"new_num_tokens": 131},
    {"new_num_tokens": 101},
    {"new_num_tokens": 129, "pad_to_multiple_of": 24},
]
TOKENS = torch.randint(0, 101, (3, 16), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model(tmp_path: Path, sizes: dict[str, int], tied: bool) -> None:
    model = stock(tmp_path / "stock", num_hidden_layers=2, tie_word_embeddings=tied)
    model.resize_token_embeddings(**sizes)
    model.save_pretrained(tmp_path / "resized")
    rows = model.config.vocab_size
    settings = import_model(tmp_path / "resized", tmp_path / "megatron")
    assert (settings.vocab_size, settings.make_vocab_size_divisible_by) == (rows, 128)
    for ranks in (2, 4, 8):
        heads = {"num_attention_heads": 8, "ffn_hidden_size": 128}  # valid for all these ranks
        check_tensor_parallel(ParallelConfig(tensor_model_parallel_size=ranks), replaced(settings, heads))
    found = weights_of(tmp_path / "megatron")
    expected = {"embedding.word_embeddings.weight": model.gpt_neox.embed_in.weight}
    if not tied:
        expected["output_layer.weight"] = model.get_output_embeddings().weight
    for name, weight in expected.items():
        assert len(found[name]) == padded_vocab_size(settings) and torch.equal(found[name][:rows], weight)
    assert relative_error(loss_of_run(tmp_path), loss_of(model)) < 1e-5
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    back = GPTNeoXForCausalLM.from_pretrained(tmp_path / "back")
    for name, weight in model.state_dict().items():
        assert torch.equal(back.state_dict()[name][: len(weight)], weight), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_import_starts_a_run(tmp_path: Path, dtype: torch.dtype) -> None:
    """In float32, the run has the loss of the source."""
    model = stock(tmp_path / "stock", num_hidden_layers=2).to(dtype)
    model.save_pretrained(tmp_path / "stock")
    import_model(tmp_path / "stock", tmp_path / "megatron")
    assert relative_error(loss_of_run(tmp_path), loss_of(model.float())) < 1e-5


@pytest.mark.parametrize("recurrence", ["mesh", "vanilla"])
@pytest.mark.parametrize("rows", [120, 90])
def test_an_export(exported: Callable[..., Any], tmp_path: Path, recurrence: str, rows: int) -> None:
    """Even if the new size is within the padded size of the training, all its rows are preserved."""
    _, directory, _ = exported(recurrence=recurrence, layers="1+1R2+1" if recurrence == "mesh" else "3")
    model = load(directory, dtype=torch.float32)
    model.resize_token_embeddings(rows)
    model.save_pretrained(tmp_path / "resized")
    settings = import_model(tmp_path / "resized", tmp_path / "megatron")
    assert settings.vocab_size == rows
    found = weights_of(tmp_path / "megatron")["output_layer.weight"]
    assert torch.equal(found[:rows], model.get_output_embeddings().weight)


def replaced(settings: Any, changes: dict[str, Any]) -> Any:
    return type(settings)(**{**vars(settings), **changes})


@torch.no_grad()
def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """Return the source's losses [B, S - 1], computed by transformers."""
    logits = model.eval()(TOKENS).logits
    return cross_entropy(logits[:, :-1].transpose(1, 2), TOKENS[:, 1:], reduction="none")


def loss_of_run(tmp_path: Path) -> torch.Tensor:
    """Return the same losses, computed by a run that starts from the imported model."""
    model = open_checkpoint(tmp_path / "megatron").config.model
    config = export_config(tmp_path / "run", **vars(model))
    with one_process(config):
        stage = build_stage(config)
        load_weights(stage, tmp_path / "megatron")
        positions = torch.arange(15).expand(3, 15)
        with torch.no_grad():
            return stage.modules[0](TOKENS[:, :-1], positions, None, labels=TOKENS[:, 1:].contiguous())
