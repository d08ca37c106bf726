"""Heads for classification and question answering match those of a stock GPT-NeoX with the same weights."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
)

from megatron_mesh.hf.modeling.modeling_mesh import (
    MeshForQuestionAnswering,
    MeshForSequenceClassification,
    MeshForTokenClassification,
)
from tests.helpers import relative_error
from tests.unit.hf.models import IDS, PADDING, SCHEMES, looped, unrolled_twin

pytestmark = pytest.mark.versions
LAYERS = {"vanilla+mesh": "1+2+2+1"}
SEQUENCE = (MeshForSequenceClassification, GPTNeoXForSequenceClassification)
TOKEN = (MeshForTokenClassification, GPTNeoXForTokenClassification)
QUESTION = (MeshForQuestionAnswering, GPTNeoXForQuestionAnswering)
CASES: dict[str, tuple[tuple[Any, Any], int, dict[str, Any]]] = {
    "one of three classes": (SEQUENCE, 3, {"labels": torch.tensor([2, 0])}),
    "several of three": (SEQUENCE, 3, {"labels": torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])}),
    "a number": (SEQUENCE, 1, {"labels": torch.tensor([0.5, -1.0])}),
    "tokens": (TOKEN, 4, {"labels": IDS % 4}),
    "answers": (
        QUESTION,
        2,
        {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 7])},
    ),
}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_stock_head(case, padding) -> None:
    """Logits, loss and gradients."""
    (ours, theirs), labels, targets = CASES[case]
    model = looped("base", ours, num_labels=labels)
    twin = unrolled_twin(model, theirs)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    if padding != "none":
        here = slice(0, 3) if padding == "left" else slice(5, 8)
        ids[0, here], mask[0, here] = PADDING, 0
    outputs = [m(input_ids=ids, attention_mask=mask, **targets) for m in (model, twin)]
    for output in outputs:
        output.loss.backward()
    one, other = outputs
    assert relative_error(one.loss, other.loss) < 1e-5
    for name in set(one) & {"logits", "start_logits", "end_logits"}:
        values = [o[name][mask.bool()] if o[name].shape[:2] == mask.shape else o[name] for o in outputs]
        assert relative_error(*values) < 1e-5, name
    copies = [layer.attention.dense.weight.grad for layer in twin.base_model.layers]
    core = model.model.core[0].attention.dense.weight.grad
    assert relative_error(core, copies[1] + copies[3]) < 1e-5
    for name, parameter in model.named_parameters():
        if not name.startswith("model."):
            assert relative_error(parameter.grad, twin.get_parameter(name).grad) < 1e-5, name


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (AutoModelForSequenceClassification, {"score.weight"}),
        (AutoModelForTokenClassification, {"classifier.weight", "classifier.bias"}),
        (AutoModelForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
        (AutoModel, set()),
    ],
    ids=["sequence", "token", "question", "none"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_heads_of_an_export(exported, tmp_path, scheme, auto, head) -> None:
    """Only the head is initialized, and the model loads completely after saving."""
    directory = exported(recurrence=scheme, layers=LAYERS.get(scheme, "1+2R2+1"))[1]
    options = {"trust_remote_code": True, "output_loading_info": True}
    model, info = auto.from_pretrained(directory, **options, pad_token_id=0)
    assert set(info["missing_keys"]) == head
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    model.eval().save_pretrained(tmp_path / "saved")
    again, info = auto.from_pretrained(tmp_path / "saved", **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(IDS)[0], model(IDS)[0])
