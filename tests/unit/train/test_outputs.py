"""The output of a run: configuration, metrics.jsonl, TensorBoard events, console lines."""

import io
import json
import math
import sys
from dataclasses import asdict
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mesh.checkpoint.content import TrainState
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import read_yaml, with_values
from megatron_mesh.config.sizes import flops_per_token
from megatron_mesh.metrics.console import Bar, Lines, Record
from megatron_mesh.metrics.log import JsonLines, Log
from megatron_mesh.metrics.meters import RouterMeter
from megatron_mesh.runtime import exits
from megatron_mesh.runtime.stopping import write_status
from megatron_mesh.train import pretrain
from megatron_mesh.train.data import open_batches
from megatron_mesh.train.loop import build_run
from megatron_mesh.train.output import open_outputs
from megatron_mesh.train.step import run_batch
from tests.helpers import one_process, randomise


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_and_tensorboard(tiny, tmp_path, capsys):
    config = tiny(
        log_interval=2,
        eval_interval=3,
        output_dir=str(tmp_path / "out"),
        tensorboard_dir=str(tmp_path / "events"),
        train_iters=5,
    )
    assert pretrain(config) == exits.DONE
    records = read(tmp_path / "out" / "metrics.jsonl")
    kinds = [(record["kind"], record["step"]) for record in records]
    train = [("train", step) for step in (1, 2, 4, 5)]
    assert kinds == [*train[:2], ("valid", 3), *train[2:], ("valid", 5), ("test", 5), ("summary", 5)]
    last, summary = records[-4], records[-1]
    assert last["consumed_samples"] == 40
    assert last["consumed_tokens"] == 640
    assert last["tokens_per_second"] == pytest.approx(8 * 16 / last["step_seconds"])
    flops = flops_per_token(config.model) * last["tokens_per_second"]
    assert last["tflops_per_device"] == pytest.approx(flops / 1e12)
    assert last["peak_memory_bytes"] > 2**20
    assert "share_of_peak" not in last  # a CPU has no data sheet
    assert summary["train_loss"] == last["loss"]
    assert summary["valid_loss"] == records[-3]["loss"]
    assert records[-3]["perplexity"] == pytest.approx(math.exp(summary["valid_loss"]))
    assert summary["tokens"] == 640

    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    loss = {event.step: event.value for event in events.Scalars("train/loss")}
    assert loss == pytest.approx({r["step"]: r["loss"] for r in records if r["kind"] == "train"})
    slot = events.Scalars("train/router/read/cycle1/slot2")[-1]
    assert slot.value == pytest.approx(last["router"]["read"][1][2])
    assert events.Scalars("train/router/write_entropy/cycle0")[-1].step == 5

    out = capsys.readouterr().out
    assert f"step 5/5 | loss {last['loss']:.4f} | lr " in out
    assert "step 5/5 | validation loss" in out
    assert str(tmp_path / "out" / "metrics.jsonl") in out


def test_a_full_disk_does_not_end_the_run(tmp_path, caplog):
    """/dev/full behaves like a full disk."""
    taken = Lines(9, io.StringIO())
    with Log([JsonLines(Path("/dev/full")), taken]) as log:
        log.record("valid", 3, loss=1.0, perplexity=2.7)
    assert "validation loss 1.0000" in taken.file.getvalue()
    (tmp_path / "run_status.txt.partial").symlink_to("/dev/full")
    write_status(str(tmp_path), "done")
    assert caplog.text.count("No space left on device") == 3  # a record, the end of the log, the status


def test_router_metrics(tiny):
    """They equal the softmax of the routers' outputs over all micro-batches."""
    config = tiny()
    with one_process(config):
        parts = build_run(config)
        model = parts.stage.modules[0]
        randomise(model)
        scheme, seen = model.decoder.recurrence, {}
        for kind in ("write", "read"):
            for cycle, router in enumerate(getattr(scheme, kind)):
                logits = seen.setdefault((kind, cycle), [])
                router.register_forward_hook(lambda module, x, y, logits=logits: logits.append(y.detach()))
        meter = RouterMeter(scheme)
        batches = open_batches(config, parts.data.train)
        with meter.observing(False):
            run_batch(parts.stage, batches, config.training)
        for logits in seen.values():
            logits.clear()
        with meter.observing():
            run_batch(parts.stage, batches, config.training)
        router = meter.read()["router"]
        assert scheme.observer is None
    for (kind, cycle), logits in seen.items():
        weights = torch.softmax(torch.cat([y.flatten(0, 1) for y in logits]).double(), dim=-1)
        assert len(weights) == 8 * 16
        assert router[kind][cycle] == pytest.approx(weights.mean(0).tolist(), rel=1e-5)
        entropy = -(weights * weights.log()).sum(-1).mean().item()
        assert router[f"{kind}_entropy"][cycle] == pytest.approx(entropy, rel=1e-5)
    assert len(router["read"]) == 3
    assert len(router["read"][0]) == 5


@pytest.mark.parametrize(
    ("recurrence", "layers", "log"), [("base", "1+1R2+1", True), ("mesh", "1+1R2+1", False)]
)
def test_no_router_metrics(tiny, tmp_path, recurrence, layers, log):
    config = tiny(
        recurrence, layers, log_routers=log, train_iters=1, lr_warmup_fraction=None, output_dir=str(tmp_path)
    )
    pretrain(config)
    assert "router" not in read(tmp_path / "metrics.jsonl")[0]


def test_default_output_directory(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain(tiny("anchor", train_iters=1, lr_warmup_fraction=None))
    (directory,) = (tmp_path / "runs").iterdir()
    assert directory.name.startswith("anchor-2")
    assert sorted(path.name for path in directory.iterdir()) == ["config.yaml", "metrics.jsonl"]


def test_earlier_files_are_kept(tiny, tmp_path):
    """A second run in the same directory renames them; an equal configuration is not stored twice."""
    first = tiny(train_iters=1, lr_warmup_fraction=None, output_dir=str(tmp_path))
    second = with_values(first, {"seed": 99})
    pretrain(first)
    pretrain(first)
    assert not (tmp_path / "config.1.yaml").exists()
    pretrain(second)
    pretrain(first)
    configs = [read_yaml(tmp_path / name) for name in ("config.1.yaml", "config.2.yaml", "config.yaml")]
    assert [with_values(Config(), values) for values in configs] == [first, second, first]
    losses = [read(tmp_path / f"metrics{n}.jsonl")[0]["loss"] for n in (".1", ".2", ".3", "")]
    assert losses[0] == losses[1] == losses[3] != losses[2]


def test_resuming_appends(tiny, tmp_path):
    pretrain(tiny(save=str(tmp_path), train_iters=2, lr_decay_iters=6))
    pretrain(tiny(save=str(tmp_path), load=str(tmp_path), train_iters=3, lr_decay_iters=6))
    assert [r["step"] for r in read(tmp_path / "metrics.jsonl") if r["kind"] == "train"] == [1, 2, 3]
    assert not (tmp_path / "metrics.1.jsonl").exists()


TRAIN = {
    "loss": 3.25,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_second": 1234.5,
    "tflops_per_device": 0.25,
    "step_seconds": 2.0,
    "peak_memory_bytes": 3 * 2**30,
}


def test_lines():
    lines = Lines(200)
    assert lines.text(Record("train", 20, TRAIN)) == (
        "step  20/200 | loss 3.2500 | lr 1.000e-03 | grad norm 0.500 | 1,234 tokens/s | 0.25 TFLOP/s"
        " | 2 s/step | 3.0 GiB | eta 0:06:00"
    )
    valid = Record("valid", 200, {"loss": 2.0, "perplexity": math.exp(2)})
    assert lines.text(valid) == "step 200/200 | validation loss 2.0000 | perplexity 7.39"


def test_live_bar():
    file = io.StringIO()
    bar = Bar(Console(file=file, force_terminal=True, width=160), step=10, last=200)
    bar.tick(19)
    bar.write(Record("train", 20, {**TRAIN, "share_of_peak": 0.41}))
    bar.progress.refresh()
    bar.write(Record("valid", 20, {"loss": 2.0, "perplexity": math.exp(2)}))
    bar.write(Record("summary", 20, {"steps": 20, "tokens": 2560, "config": "out/config.yaml"}))
    bar.close()
    text = file.getvalue()
    for part in ("20/200", "loss 3.2500", "41.0% of peak", "validation loss 2.0000", "out/config.yaml"):
        assert part in text, part


class Wandb(ModuleType):
    """Stands in for the package: records calls, and raises errors at chosen calls."""

    class CommError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.calls: list[tuple] = []
        self.fails_at: set[object] = set()

    def _call(self, name: str, *values: object) -> None:
        self.calls.append((name, *values))
        if self.fails_at & {name, *values[:1]} or "always" in self.fails_at:
            raise self.CommError("no answer\nfrom the server")

    def init(self, **settings: object) -> "Wandb":
        self.calls.append(("init", settings))
        if "init" in self.fails_at:
            raise self.CommError("no account")
        return self

    def log(self, values: dict, step: int) -> None:
        self._call("log", step, values)

    def finish(self) -> None:
        self._call("finish")


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    package = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    return package


def test_weights_and_biases(tiny, tmp_path, wandb):
    """A tracker run is started with the settings, gets the flat values of each step, and is finished."""
    config = tiny(wandb_project="p", train_iters=1, lr_warmup_fraction=None, output_dir=str(tmp_path))
    pretrain(config)
    name, settings = wandb.calls[0]
    number = settings.pop("id")
    assert name == "init" and (tmp_path / "wandb_run_id.txt").read_text() == f"{number}\n"
    assert settings == {
        "project": "p",
        "name": None,
        "config": asdict(config),
        "dir": tmp_path,
        "resume": "allow",
    }
    assert wandb.calls[1][:2] == ("log", 1)
    record = read(tmp_path / "metrics.jsonl")[0]
    assert wandb.calls[1][2]["train/loss"] == record["loss"]
    assert wandb.calls[1][2]["train/router/write/cycle2/slot4"] == record["router"]["write"][2][4]
    assert wandb.calls[-1] == ("finish",)


def test_a_resumed_run_stays_the_same_run_of_the_tracker(tiny, tmp_path, wandb, monkeypatch):
    """Restarts use the same id, and a new run gets a new one. WANDB_RUN_ID overrides both."""
    settings = {"wandb_project": "p", "lr_decay_iters": 6, "output_dir": str(tmp_path / "out")}
    for steps in (2, 3, 4):
        pretrain(tiny(save=str(tmp_path / "a"), load=str(tmp_path / "a"), train_iters=steps, **settings))
    pretrain(tiny(train_iters=2, **settings))
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    pretrain(tiny(train_iters=2, **settings))
    first, second, third, new, given = [call[1]["id"] for call in wandb.calls if call[0] == "init"]
    assert first == second == third != new and given == "mine"


def test_a_restart_before_the_first_checkpoint_is_the_same_run(tiny, tmp_path, wandb):
    """It appends to the metrics and reuses the tracker's id, unless the output is another run's."""
    interrupted = {"train_iters": 6, "output_dir": str(tmp_path / "out"), "wandb_project": "p"}
    run = tiny(save=str(tmp_path / "a"), load=str(tmp_path / "a"), **interrupted)
    for _ in range(2):
        with one_process(run), open_outputs(run, TrainState(None)) as log:
            log.record("train", 1, **TRAIN)
    other = with_values(run, {"save": str(tmp_path / "b"), "load": str(tmp_path / "b")})
    for config in (other, with_values(other, {"load": None})):
        with one_process(config), open_outputs(config, TrainState(None)):
            pass
    first, second, third, fourth = [call[1]["id"] for call in wandb.calls if call[0] == "init"]
    assert first == second and len({first, third, fourth}) == 3
    assert len(read(tmp_path / "out/metrics.1.jsonl")) == 2


def test_a_tracker_that_calls_exit_cannot_end_a_run(tiny, tmp_path, wandb, caplog):
    wandb.CommError = SystemExit
    wandb.fails_at = {"log"}
    assert pretrain(tiny(wandb_project="p", output_dir=str(tmp_path))) == exits.DONE
    assert caplog.text.count("WeightsAndBiases: numbers were not logged: SystemExit: no answer") == 1
    wandb.fails_at = {"init"}
    assert pretrain(tiny(wandb_project="p", output_dir=str(tmp_path))) == exits.DONE
    assert "cannot start Weights & Biases: SystemExit: no account" in caplog.text


@pytest.mark.parametrize("fails_at", ["init", 3, "finish", "log"])
def test_a_tracker_cannot_end_a_run(tiny, tmp_path, wandb, fails_at, caplog):
    """Whether it fails at init, at one step, at the end or at each step: one line, and the run continues."""
    wandb.fails_at = {fails_at}
    config = tiny(wandb_project="p", output_dir=str(tmp_path / "out"), save=str(tmp_path / "save"))
    assert pretrain(config) == exits.DONE
    assert (tmp_path / "save/run_status.txt").read_text() == "done\n"
    assert (tmp_path / "save/iter_0000006").is_dir()
    assert [r["step"] for r in read(tmp_path / "out/metrics.jsonl") if r["kind"] == "train"] == [*range(1, 7)]
    errors = [record.message for record in caplog.records if "Biases" in record.message]
    cause = "CommError: no account" if fails_at == "init" else "CommError: no answer"
    assert len([line for line in errors if cause in line]) == 1 and "server" not in "".join(errors)
    if fails_at == 3:
        assert errors[1] == "WeightsAndBiases works again; records lost: 1"
    if fails_at == "log":  # reported once, not at each of six steps; and how much is missing
        lost = len([call for call in wandb.calls if call[0] == "log"])
        assert lost >= 6 and errors[1:] == [f"WeightsAndBiases is closed; records lost: {lost}"]


def test_tensorboard_cannot_end_a_run(tiny, tmp_path, monkeypatch, caplog):
    from torch.utils import tensorboard

    def broken(*args, **kwargs):
        raise TypeError("MessageToJson() got an unexpected keyword argument")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", broken)
    assert pretrain(tiny(output_dir=str(tmp_path), tensorboard_dir=str(tmp_path / "events"))) == exits.DONE
    assert caplog.text.count("TensorBoard: numbers were not logged: TypeError: MessageToJson()") == 1
    monkeypatch.setattr(tensorboard, "SummaryWriter", broken)
    assert pretrain(tiny(output_dir=str(tmp_path), tensorboard_dir=str(tmp_path / "events"))) == exits.DONE
    assert "cannot start TensorBoard: TypeError: MessageToJson()" in caplog.text
