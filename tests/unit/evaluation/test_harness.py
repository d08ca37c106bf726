"""Metrics equal those of lm-eval, and acc_bytes equals what follows from lm-eval's samples."""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")

import datasets
import lm_eval
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation import harness
from megatron_mesh.evaluation.results import Results
from megatron_mesh.evaluation.run import Settings, run_evaluation
from megatron_mesh.evaluation.tasks import AVERAGED, TASKS, choose_tasks
from tests.unit.evaluation.samples import choices, sentence, write_jsonl


@pytest.fixture(autouse=True)
def cached_data_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def by_hand(model_dir: Path, local_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run lm-eval directly on the task files, in a directory where their relative paths are valid."""
    there = tmp_path / "hand"
    there.mkdir()
    (there / "elsewhere").symlink_to(local_data)
    for file in local_data.glob("*.gz"):
        (there / file.name).symlink_to(file)

    def run(tasks: Sequence[str], shots: int) -> dict[str, Any]:
        with monkeypatch.context() as patch:
            patch.chdir(there)
            output = lm_eval.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(model_dir), "dtype": "float32"},
                tasks=list(tasks),
                num_fewshot=shots,
                batch_size=4,
                device="cpu",
                task_manager=TaskManager(include_path=local_data / "tasks", include_defaults=False),
            )
        assert output is not None
        return dict(output)

    return run


def measured(model_dir: Path, local_data: Path, output: Path, **settings: Any) -> Results:
    return run_evaluation(
        Settings(
            output_dir=output,
            model=model_dir,
            local_data=local_data,
            batch_size=4,
            device="cpu",
            dtype="float32",
            **settings,
        )
    )


def right(samples: list[dict[str, Any]], lengths: Any) -> float:
    """Return the accuracy if log-likelihoods are divided by ``lengths`` of the choices."""
    hits = []
    for sample in samples:
        scores = [response[0] for response in sample["filtered_resps"]]
        texts = [arguments[1].removeprefix(" ") for arguments in sample["arguments"]]
        hits.append(int(np.argmax([s / lengths(t) for s, t in zip(scores, texts, strict=True)])))
    return float(np.mean([hit == int(s["target"]) for hit, s in zip(hits, samples, strict=True)]))


def test_the_numbers_are_lm_evals(by_hand: Any, model_dir: Path, local_data: Path, tmp_path: Path) -> None:
    results = measured(model_dir, local_data, tmp_path / "out")
    zero = by_hand(["arc_easy_local", "piqa", "lambada_openai_local"], 0)
    five = by_hand(["piqa"], 5)
    for label, output, name in (
        ("arc_easy, 0-shot", zero, "arc_easy_local"),
        ("piqa, 0-shot", zero, "piqa"),
        ("lambada_openai, 0-shot", zero, "lambada_openai_local"),
        ("piqa, 5-shot", five, "piqa"),
    ):
        ours = results.finished[label]
        theirs = output["results"][name]
        assert ours.documents == len(output["samples"][name])
        for metric in ("acc", "acc_norm", "perplexity"):
            assert (metric in ours.metrics) == (f"{metric},none" in theirs)
            if metric in ours.metrics:
                assert ours.metrics[metric] == pytest.approx(theirs[f"{metric},none"], rel=1e-6)
        assert ours.stderr["acc"] == pytest.approx(theirs["acc_stderr,none"], rel=1e-6)
    assert set(results.finished) == {
        "arc_easy, 0-shot", "piqa, 0-shot", "lambada_openai, 0-shot", "piqa, 5-shot"
    }  # fmt: skip
    by_bytes = {}
    for label, samples in (
        ("arc_easy, 0-shot", zero["samples"]["arc_easy_local"]),
        ("piqa, 0-shot", zero["samples"]["piqa"]),
        ("piqa, 5-shot", five["samples"]["piqa"]),
    ):
        metrics = results.finished[label].metrics
        by_bytes[label] = right(samples, lambda text: len(text.encode()))
        assert metrics["acc"] == pytest.approx(right(samples, lambda text: 1))
        assert metrics["acc_norm"] == pytest.approx(right(samples, len))
        assert metrics["acc_bytes"] == pytest.approx(by_bytes[label])
    norms = {label: results.finished[label].metrics["acc_norm"] for label in by_bytes}
    assert norms != by_bytes, "the data must distinguish characters from bytes"


def test_missing_local_data_are_reported(model_dir: Path, local_data: Path, tmp_path: Path) -> None:
    results = measured(
        model_dir,
        local_data,
        tmp_path / "out",
        tasks=choose_tasks(["lambada_openai", "sciq", "wikitext"]),
        limit=2,
    )
    assert set(results.finished) == {"lambada_openai, 0-shot"}
    assert results.finished["lambada_openai, 0-shot"].documents == 2
    reasons = {(s.name, s.shots): s.reason for s in results.skipped}
    assert set(reasons) == {("sciq", 0), ("wikitext", 0), ("sciq", 5), ("lambada_openai", 5)}
    assert "no task file" in reasons["sciq", 0]
    assert "training_split" in reasons["lambada_openai", 5]


def official_row(dataset: str, i: int) -> dict[str, Any]:
    """Return a row with the columns of a dataset on the hub."""
    text, options = sentence(i, 8), choices(i)
    return {
        "baber/piqa": {"goal": text, "sol1": options[0], "sol2": options[1], "label": i % 2},
        "Rowan/hellaswag": {
            "ctx_a": text, "ctx_b": "he", "activity_label": "Cat", "endings": options, "label": str(i % 4)
        },
        "allenai/ai2_arc": {
            "question": text, "choices": {"text": options, "label": list("ABCD")}, "answerKey": "ABCD"[i % 4]
        },
        "allenai/sciq": {
            "support": text, "question": text, "correct_answer": options[0], "distractor1": options[1],
            "distractor2": options[2], "distractor3": options[3],
        },
        "EleutherAI/lambada_openai": {"text": text},
        "cimec/lambada": {"text": text},
        "allenai/winogrande": {
            "sentence": f"{text} _ fell", "option1": "cat", "option2": "mat", "answer": str(1 + i % 2)
        },
        "cais/mmlu": {"question": text, "choices": options, "answer": i % 4},
        "EleutherAI/wikitext_document_level": {"page": text},
    }[dataset]  # fmt: skip


def test_answers_longer_than_the_model_accepts(model_dir: Path, local_data: Path, tmp_path: Path) -> None:
    """Such a task is skipped and reported, and the others still run. A larger max_length allows it."""
    long = [{"goal": "a", "sol1": sentence(0, 60), "sol2": "the", "label": 0}]
    write_jsonl(local_data / "piqa.jsonl.gz", long)
    asked: dict[str, Any] = {"tasks": choose_tasks(["piqa", "lambada_openai"]), "num_fewshot": (0,)}
    results = measured(model_dir, local_data, tmp_path / "out", **asked)
    assert results.finished.keys() == {"lambada_openai, 0-shot"}
    assert [(s.name, s.shots) for s in results.skipped] == [("piqa", 0)]
    assert "tokens, but the model accepts 48; increase --max-length" in results.skipped[0].reason
    longer = measured(model_dir, local_data, tmp_path / "longer", max_length=200, **asked)
    assert longer.finished["piqa, 0-shot"].documents == 1 and longer.skipped == []


def test_tasks_of_the_hub(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's own task files, on made-up rows of their datasets, report the paper's metric."""

    def load_dataset(path: str, **kwargs: Any) -> datasets.DatasetDict:
        rows = datasets.Dataset.from_list([official_row(path, i) for i in range(6)])
        return datasets.DatasetDict(dict.fromkeys(("train", "dev", "validation", "test"), rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = Settings(tmp_path, model=model_dir, num_fewshot=(0, 2), device="cpu", limit=2)
    results = run_evaluation(settings)
    assert results.finished.keys() == {
        *(f"{name}, {shots}-shot" for name in AVERAGED for shots in (0, 2)), "wikitext, 0-shot"
    }  # fmt: skip
    for result in results.finished.values():
        task = TASKS[result.name]
        assert task.metric in result.metrics and result.data == "hub"
        assert ({"acc_norm", "acc_bytes"} <= result.metrics.keys()) == task.normalised
        assert result.documents == (2 * 57 if task.name == "mmlu_continuation" else 2)
    assert {shots: average.missing for shots, average in results.averages().items()} == {0: [], 2: []}


def test_lm_eval_knows_every_task() -> None:
    """And our metric list, which replaces lm-eval's, drops none of its metrics."""
    manager = harness._manager()
    for task in TASKS.values():
        assert task.name in manager.all_tasks
        if task.normalised:
            config = manager.task_index[task.name].cfg
            assert config is not None
            assert [m["metric"] for m in config["metric_list"]] == ["acc", "acc_norm"]


def test_hub_out_of_reach(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **kwargs: Any) -> None:
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = Settings(tmp_path, model=model_dir, tasks=choose_tasks(["sciq"]), device="cpu")
    with pytest.raises(
        UserError, match=r"cannot load the data of sciq .*Couldn't reach 'allenai/sciq'.*--local-data"
    ):
        run_evaluation(settings)


def test_packed_text_matches_a_plain_loop(model_dir: Path, tmp_path: Path) -> None:
    """For a compressed file, several windows, and an incomplete last batch."""
    documents = [sentence(i, 7 + 11 * i) for i in range(5)]
    file = tmp_path / "valid.jsonl.gz"
    write_jsonl(file, [{"body": text} for text in [*documents, ""]])
    settings = Settings(
        tmp_path / "out",
        model=model_dir,
        tasks=[],
        text=(str(file),),
        json_keys="body",
        batch_size=2,
        device="cpu",
        dtype="float32",
    )
    result = run_evaluation(settings).finished["text valid.jsonl.gz"]

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).double()
    ids = [0]
    for text in documents:
        ids += [*tokenizer.encode(text), 0]
    nats = 0.0
    for begin in range(0, len(ids) - 1, 48):
        window = torch.tensor(ids[begin : begin + 49])
        with torch.no_grad():
            logits = model(window[None, :-1]).logits[0]
        nats -= F.log_softmax(logits, -1).gather(1, window[1:, None]).sum().item()
    assert (len(ids) - 1) % 48 and (len(ids) - 1) // 48 % 2, "the last window and batch should be short"
    words = sum(len(text.split()) for text in documents)
    size = sum(len(text.encode()) for text in documents)
    assert (result.documents, result.metrics["tokens"]) == (5, len(ids) - 1)
    for metric, parts in (
        ("token_perplexity", len(ids) - 1),
        ("word_perplexity", words),
        ("byte_perplexity", size),
    ):
        assert result.metrics[metric] == pytest.approx(np.exp(nats / parts), rel=1e-4)
    assert result.metrics["bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-5)


def test_text_that_cannot_be_measured(model_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "valid.jsonl"
    settings = Settings(tmp_path / "out", model=model_dir, tasks=[], text=(str(file),), device="cpu")
    for content, message in (
        ('{"text": ""}', r"valid\.jsonl: all documents are empty"),
        ('{"text": "a"}\n{"txt": "a"}', r"valid\.jsonl, line 2: no text under the key 'text'"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            run_evaluation(settings)


def test_tokenizer_of_another_model(model_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_dir, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([f"new{i}" for i in range(50)])
    tokenizer.save_pretrained(other)
    settings = Settings(tmp_path / "out", model=other, tasks=[], text=(__file__,), device="cpu")
    with pytest.raises(UserError, match=r"\.py: unknown suffix"):
        run_evaluation(settings)
    text = shutil.copy(__file__, tmp_path / "text.txt")
    with pytest.raises(UserError, match=r"has 354 entries, but the model's vocabulary only 352"):
        run_evaluation(replace(settings, text=(str(text),)))


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else name)
    with pytest.raises(UserError, match=r"lm_eval is not installed: pip install 'megatron_mesh\[eval\]'"):
        harness.check_installed()


def test_missing_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None if name == "vllm" else name)
    harness.check_installed()
    with pytest.raises(UserError, match="--engine vllm: vLLM is not installed; install it"):
        harness.check_installed("vllm")


def test_lm_evals_warnings_are_silenced() -> None:
    harness.silence_warnings()
    assert logging.getLogger("lm_eval").getEffectiveLevel() == logging.ERROR
