"""Fine-tuning with PEFT's adapters and TRL's SFTTrainer, and quantization to int8."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.import_model import import_model
from megatron_mesh.hf.modeling.modeling_mesh import MeshForCausalLM
from tests.exports import TOKENS
from tests.helpers import relative_error
from tests.unit.hf.models import IDS, ROUTED, SCHEMES, looped, mesh_config, unrolled_twin
from tests.unit.hf.test_logits import load

LAYERS = {"vanilla+mesh": "1+2+2+1"}
BY_NAME = r".*\.(query_key_value|dense|(write|read|maps)\.\d+)"
"""Attention and routers, as PEFT's regular expression."""


def with_adapters(model: Any, targets: str) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that adapters of tied embeddings cannot be merged
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    "targets",
    [pytest.param("all-linear", marks=pytest.mark.versions), BY_NAME],
    ids=["all-linear", "by-name"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters(exported, tmp_path, scheme, targets) -> None:
    """New adapters change nothing. Trained ones survive saving, merging, and conversion to a checkpoint."""
    directory = exported(recurrence=scheme, layers=LAYERS.get(scheme, "1+2R2+1"))[1]
    model = load(directory)
    routers = [
        name for name, module in model.model.recurrence.named_modules() if isinstance(module, nn.Linear)
    ]
    assert bool(routers) == (scheme in ROUTED and scheme != "static")
    with torch.no_grad():
        before = model(TOKENS).logits
        adapted = with_adapters(model, targets)
        assert torch.equal(adapted(TOKENS).logits, before)
    trained = _train(adapted)
    assert all(any(f"recurrence.{router}." in name for name in trained) for router in routers)
    with torch.no_grad():
        after = adapted(TOKENS).logits
        assert relative_error(after, before) > 1e-2
        adapted.save_pretrained(tmp_path / "adapters")
        again = pytest.importorskip("peft").PeftModel.from_pretrained(load(directory), tmp_path / "adapters")
        assert torch.equal(again(TOKENS).logits, after)
        merged = adapted.merge_and_unload()
        assert relative_error(merged(TOKENS).logits, after) < 1e-4
        merged.save_pretrained(tmp_path / "merged")
        import_model(tmp_path / "merged", tmp_path / "back")
        export_checkpoint(tmp_path / "back", tmp_path / "again")
        for path in ("merged", "again"):
            assert torch.equal(load(tmp_path / path)(TOKENS).logits, merged(TOKENS).logits)


def _train(model: Any) -> dict[str, torch.Tensor]:
    """Train for five steps. The loss must fall and every trained parameter must change."""
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in start.items())
    return start


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer for the words w0 to w89, whose ids start at 4."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {
        name: place for place, name in enumerate(["u", "x", "END", "PAD"] + [f"w{n}" for n in range(90)])
    }
    of_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="u"))
    of_words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=of_words, eos_token="END", pad_token="PAD")


def sft(model: Any, directory: Path, **settings: Any) -> list[float]:
    """Return the losses of five steps with TRL's trainer."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    generator = torch.Generator().manual_seed(3)
    texts = [" ".join(f"w{n}" for n in torch.randint(9, (k,), generator=generator)) for k in range(6, 18)]
    how = {
        "output_dir": str(directory),
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        **settings,
    }
    data = datasets.Dataset.from_list([{"text": text} for text in texts])
    trainer = trl.SFTTrainer(
        model, args=trl.SFTConfig(**how), train_dataset=data, processing_class=tokenizer()
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.versions
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_trainer_of_trl(tmp_path, scheme) -> None:
    """It trains every parameter, with the same result if activations are recomputed."""
    model, recomputed = looped(scheme), looped(scheme)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = sft(model, tmp_path)
    assert len(losses) == 5 and losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, start[name]), name
    assert sft(recomputed, tmp_path, gradient_checkpointing=True) == pytest.approx(losses, rel=1e-4)
    trained = dict(recomputed.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative_error(trained[name], parameter) < 1e-3, name


def test_trl_trains_a_single_loop_as_a_stock_model(tmp_path) -> None:
    model = looped("base", num_loops=1, embedding_scale=1.0)
    twin = unrolled_twin(model)
    assert sft(model, tmp_path) == pytest.approx(sft(twin, tmp_path), rel=1e-4)
    assert relative_error(model(IDS).logits, twin(IDS).logits) < 1e-3


@pytest.mark.versions
def test_label_smoothing_as_for_a_stock_model(tmp_path) -> None:
    """The trainer of transformers shifts labels only for models in its table."""
    pytest.importorskip("accelerate")
    how = TrainingArguments(str(tmp_path), label_smoothing_factor=0.2, use_cpu=True, report_to=[])
    model = looped("base")
    losses = []
    for one in (model, unrolled_twin(model)):
        inputs = {"input_ids": IDS, "labels": IDS.clone()}
        losses.append(Trainer(one, how).compute_loss(one, inputs).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def like_a_new_model(scheme: str) -> Any:
    """Return a model with weights of usual size, which suit quantization, and with active routers."""
    torch.manual_seed(0)
    model = MeshForCausalLM(mesh_config(scheme, initializer_range=0.02)).eval()
    for parameter in model.model.recurrence.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dynamic_int8_quantization(scheme) -> None:
    """torch quantizes every linear layer, including routers. Coefficients stay in float32."""
    model = like_a_new_model(scheme)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not [name for name, module in quantized.named_modules() if type(module) is nn.Linear]
    _check_quantized(model, quantized)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_torchao_int8_weights(scheme) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model, quantized = like_a_new_model(scheme), like_a_new_model(scheme)
    quantization.quantize_(quantized, quantization.Int8WeightOnlyConfig())
    linear = [module for module in quantized.modules() if isinstance(module, nn.Linear)]
    assert linear and all(type(module.weight) is not nn.Parameter for module in linear)
    _check_quantized(model, quantized)


@torch.no_grad()
def _check_quantized(model: Any, quantized: Any) -> None:
    exact = model(IDS).logits
    assert 1e-5 < relative_error(quantized(IDS).logits, exact) < 0.05
    assert quantized.generate(IDS, max_new_tokens=4).shape[1] > IDS.shape[1]
