"""Planning and resuming evaluations, and their errors."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_mesh.errors import UserError
from megatron_mesh.evaluation import harness, model_source, run
from megatron_mesh.evaluation.results import Result
from megatron_mesh.evaluation.run import Settings, run_evaluation
from megatron_mesh.evaluation.tasks import LocalTask, Task, choose_tasks
from tests.commands import tool

main = tool("evaluate")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Log every model that would be opened and every task that would be run."""
    log: list[str] = []

    @contextmanager
    def opened(source: model_source.ModelSource, how: Mapping[str, Any], engine: str) -> Iterator[None]:
        log.append(f"open {source.path.name}")
        yield None

    def run_task(lm: Any, task: Task, shots: int, *, limit: int | None, local: LocalTask | None) -> Result:
        log.append(f"{task.name} {shots}")
        if log.count("stop") and len(log) > 3:
            raise KeyboardInterrupt
        return Result(task.name, shots, local.data if local else "hub", {task.metric: 0.5}, {}, 10, 1.0)

    monkeypatch.setattr(harness, "check_installed", lambda engine: None)
    monkeypatch.setattr(harness, "harness_version", lambda: "0")
    monkeypatch.setattr(model_source, "opened", opened)
    monkeypatch.setattr(harness, "run_task", run_task)
    return log


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path) -> Settings:
    return Settings(tmp_path / "out", model=model_dir, tasks=choose_tasks(["piqa", "sciq"]), device="cpu")


def test_resumes_after_an_interruption(asked: list[str], settings: Settings) -> None:
    asked.append("stop")
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(settings)
    assert asked == ["stop", "open " + settings.model.name, "piqa 0", "sciq 0"]
    asked.clear()
    results = run_evaluation(settings)
    assert asked == ["open " + settings.model.name, "sciq 0", "piqa 5", "sciq 5"]
    asked.clear()
    assert run_evaluation(settings).finished == results.finished
    assert asked == [], "with nothing left to do, the model is not loaded"
    run_evaluation(replace(settings, tasks=choose_tasks(["piqa", "winogrande"]), num_fewshot=(0,)))
    assert asked[1:] == ["winogrande 0"]


@pytest.mark.parametrize(
    "change", [{"limit": 5}, {"max_length": 9}, {"dtype": "float32"}, {"model": "other"}]
)
def test_results_of_another_run_are_kept(
    asked: list[str], settings: Settings, change: dict[str, Any]
) -> None:
    if change.get("model"):
        change = {"model": settings.output_dir.parent / "other"}
        shutil.copytree(settings.model, change["model"])
        (change["model"] / "generation_config.json").write_text("{}")
    run_evaluation(settings)
    before = (settings.output_dir / "results.json").read_text()
    with pytest.raises(
        UserError, match=rf"a different run \({next(iter(change))}: .*choose another --output-dir"
    ):
        run_evaluation(replace(settings, **change))
    assert (settings.output_dir / "results.json").read_text() == before


def test_a_moved_model_is_the_same(asked: list[str], settings: Settings) -> None:
    run_evaluation(settings)
    moved = settings.output_dir.parent / "moved"
    shutil.copytree(settings.model, moved)
    (moved / "README.md").write_text("a card")
    asked.clear()
    run_evaluation(replace(settings, model=moved))
    assert asked == []


def test_results_from_before_there_were_engines(asked: list[str], settings: Settings) -> None:
    """They were measured with transformers."""
    path = run_evaluation(settings).path
    content = json.loads(path.read_text())
    assert content["run"].pop("engine") == "transformers"
    path.write_text(json.dumps(content))
    asked.clear()
    run_evaluation(settings)
    assert asked == []
    with pytest.raises(UserError, match=r"a different run \(engine: transformers there, vllm here\)"):
        run_evaluation(replace(settings, engine="vllm", device=None))


def test_other_data_are_refused(asked: list[str], settings: Settings, local_data: Path) -> None:
    run_evaluation(settings)
    with pytest.raises(UserError, match=r"contains piqa, 0-shot for different data \(hub there, .* here\)"):
        run_evaluation(replace(settings, local_data=local_data))


def test_broken_results_are_not_overwritten(asked: list[str], settings: Settings) -> None:
    settings.output_dir.mkdir()
    (settings.output_dir / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read the results in .*results\.json"):
        run_evaluation(settings)
    assert (settings.output_dir / "results.json").read_text() == "{"


BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"load": Path("x")}, "either --model"),
    ({"model": None}, "either --model"),
    ({"tokenizer_model": "t.json"}, "--tokenizer-model is only for --load"),
    ({"tasks": []}, "nothing to evaluate"),
    ({"limit": 0}, "--limit 0 must be at least 1"),
    ({"max_length": -1}, "--max-length -1 must be at least 1"),
    ({"num_fewshot": (0, -1)}, "--num-fewshot -1"),
    ({"batch_size": 0}, "--batch-size 0"),
    ({"device": "gpu"}, "--device gpu is not a device of torch"),
    ({"device": "meta"}, "--device meta doesn't exist"),
    ({"engine": "llama.cpp"}, "--engine llama.cpp is unknown; choose from transformers, vllm"),
    ({"engine": "vllm"}, "--device cpu is only for --engine transformers"),
    ({"text": ("nothing.jsonl",)}, "--text nothing.jsonl: no such file"),
    ({"local_data": Path("nowhere")}, "--local-data nowhere: no such directory"),
    ({"model": Path("nowhere")}, "no such directory; give one written by tools/convert_to_hf.py"),
    ({"model": None, "load": Path("nowhere")}, "--load nowhere does not exist"),
]


@pytest.mark.parametrize("change,message", BAD_SETTINGS, ids=[m for _, m in BAD_SETTINGS])
def test_bad_settings(asked: list[str], settings: Settings, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_evaluation(replace(settings, **change))
    assert asked == [] and not settings.output_dir.exists()


def _edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def _delete(*names: str) -> Callable[[Path], None]:
    return lambda directory: [(directory / name).unlink() for name in names] and None


def _checkpoint(directory: Path) -> None:
    _delete("config.json")(directory)
    (directory / "iter_0000010").mkdir()


def _shards(directory: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


BAD_MODELS: list[tuple[Callable[[Path], Any], str]] = [
    (_delete("config.json"), "not a Hugging Face model directory"),
    (_checkpoint, "is a training checkpoint; use --load"),
    (_delete("model.safetensors"), "has no weights"),
    (_shards, "incomplete: .* lists model-00001-of-00002.safetensors"),
    (_delete("tokenizer.json"), "has no tokenizer"),
    (lambda d: (d / "config.json").write_text("["), "cannot read .*config.json"),
    (_edit("config.json", auto_map={"AutoConfig": "evil.Config"}), "auto_map .*--trust-remote-code"),
    (
        _edit("tokenizer_config.json", model_type="x", auto_map={"AutoTokenizer": "evil.T"}),
        "auto_map .*--trust-remote-code",
    ),
]


@pytest.mark.parametrize("damage,message", BAD_MODELS, ids=[m for _, m in BAD_MODELS])
def test_bad_models(
    asked: list[str], settings: Settings, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(settings.model, broken)
    damage(broken)
    with pytest.raises(UserError, match=message):
        run_evaluation(replace(settings, model=broken))
    assert asked == []


def test_trusted_code_and_the_two_directories(settings: Settings, tmp_path: Path) -> None:
    directory = tmp_path / "remote"
    shutil.copytree(settings.model, directory)
    _edit("config.json", auto_map={"AutoConfig": "mine.Config"})(directory)
    assert model_source.huggingface_source(directory, trust_remote_code=True).trust_remote_code
    with pytest.raises(UserError, match="is a Hugging Face directory; use --model"):
        model_source.checkpoint_source(directory, None)
    unfinished = tmp_path / "iter_0000010.partial"
    unfinished.mkdir()
    with pytest.raises(UserError, match=r"partial is not a complete checkpoint .*--load another one"):
        model_source.checkpoint_source(unfinished, None)


BAD_DATA: list[tuple[Callable[[Path], Any], str]] = [
    (lambda d: shutil.rmtree(d / "tasks"), "contains no task file"),
    (lambda d: (d / "arc_easy.jsonl.gz").unlink(), "elsewhere/arc_easy.jsonl.gz, which is not in"),
    (
        lambda d: (d / "tasks/a.yaml").write_text("task: piqa\nprocess_docs: !function x.y"),
        "without !function",
    ),
    (lambda d: (d / "tasks/a.yaml").write_text("task: sciq\n"), "has no data_files"),
    (lambda d: shutil.copy(d / "tasks/piqa.yaml", d / "again.yaml"), "both define the task piqa"),
]


@pytest.mark.parametrize("damage,message", BAD_DATA, ids=[m for _, m in BAD_DATA])
def test_bad_local_data(
    settings: Settings, local_data: Path, damage: Callable[[Path], Any], message: str
) -> None:
    damage(local_data)
    with pytest.raises(UserError, match=message):
        run.plan(replace(settings, local_data=local_data))


def test_nothing_can_be_run(settings: Settings, local_data: Path) -> None:
    with pytest.raises(UserError, match="no task can be run: sciq: no task file in the local data"):
        run.plan(replace(settings, local_data=local_data, tasks=choose_tasks(["sciq"])))


def test_command_line(asked: list[str], settings: Settings, capsys: pytest.CaptureFixture) -> None:
    common = ["--model", str(settings.model), "--output-dir", str(settings.output_dir)]
    with pytest.raises(UserError, match=r"--tasks arc_esy: unknown task \(did you mean arc_easy\?\)"):
        main([*common, "--tasks", "arc_esy"])
    main([*common, "--tasks", "winogrande", "piqa", "--num-fewshot", "0"])
    assert asked[1:] == ["piqa 0", "winogrande 0"]
    out = capsys.readouterr().out
    assert "PIQA" in out and "50.00" in out and "mean of 2 of the 9" in out
    assert (settings.output_dir / "results.md").is_file()
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "python tools/evaluate.py --load" in capsys.readouterr().out
