from pathlib import Path

import pytest
import yaml

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.checks import resolve
from megatron_mesh.config.derived import layout
from megatron_mesh.config.presets import SIZES, main, presets

ON_DISK = Path(__file__).resolve().parents[3] / "examples" / "configs"
PRESETS = dict(presets())


def test_the_files_are_what_the_table_gives() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in ON_DISK.glob("*.yaml")}
    assert on_disk.keys() == PRESETS.keys(), "run: python -m megatron_mesh.config.presets examples/configs"
    for name, text in PRESETS.items():
        assert on_disk[name] == text, f"{name}: run python -m megatron_mesh.config.presets examples/configs"


def test_the_names() -> None:
    schemes = ["vanilla", "base", "residual", "anchor", "anchor-emb", "mesh"]
    sizes = ["70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b"]
    first = {f"pythia-{size}-{scheme}.yaml" for size in sizes for scheme in schemes}
    second = {f"pythia-{size}-{s}.yaml" for size in ("410m-3+6R3+3", "6.9b-5+11R2+5") for s in schemes}
    assert PRESETS.keys() == first | second


def test_every_split_has_the_depth_of_the_plain_model() -> None:
    depths = {size.name: size.vanilla_layers for size in SIZES}
    for name in PRESETS:
        config = resolve(parse_args(["--config", str(ON_DISK / name)]).config)
        assert layout(config.model).depth == depths[name.split("-")[1]], name


def test_the_paper_s_settings() -> None:
    config = resolve(parse_args(["--config", str(ON_DISK / "pythia-1.4b-mesh.yaml")]).config)
    assert (config.optimizer.lr, config.optimizer.min_lr) == (2e-4, 2e-5)
    assert config.optimizer.lr_warmup_iters == 1208
    assert config.training.global_batch_size == 512
    assert 250e9 < 512 * 4096 * (config.training.train_iters or 0) < 254e9
    for size in SIZES:
        settings = yaml.safe_load(PRESETS[f"pythia-{size.name}-mesh.yaml"])
        assert settings["min_lr"] == pytest.approx(size.lr / 10, rel=1e-12)
        assert settings["recurrence"] == "mesh"


def test_a_short_run_of_a_preset() -> None:
    preset = str(ON_DISK / "pythia-160m-mesh.yaml")
    line = f"--config {preset} --data-path D --seq-length 256 --global-batch-size 8 --train-iters 20"
    config = resolve(parse_args(line.split()).config)
    assert (config.model.vocab_size, config.model.layers, config.model.mesh_slots) == (50277, "2+4R2+2", 5)
    assert (config.model.seq_length, config.training.train_iters) == (256, 20)


def test_main_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["presets", str(tmp_path / "new")])
    main()
    assert {path.name for path in (tmp_path / "new").iterdir()} == PRESETS.keys()
