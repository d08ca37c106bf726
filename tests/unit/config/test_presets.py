from pathlib import Path

import pytest
import yaml

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.layout import layout
from megatron_mesh.config.presets import PAPER_SCHEMES, SIZES, cluster_presets, main, presets
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config

ON_DISK = Path(__file__).resolve().parents[3] / "examples" / "configs"
PRESETS = dict(presets())


def preset(name: str, *flags: str) -> Config:
    """The configuration of a preset on disk with ``flags``, not resolved."""
    return parse_args(["--config", str(ON_DISK / name), *flags]).config


def test_the_files_are_what_the_table_gives() -> None:
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in ON_DISK.glob("*.yaml")}
    assert on_disk.keys() == PRESETS.keys(), "run: make configs"
    for name, text in PRESETS.items():
        assert on_disk[name] == text, f"{name}: run make configs"


def test_one_file_per_size_and_split() -> None:
    sizes = ["70m", "160m", "410m", "410m-3+6R3+3", "1b", "1.4b", "2.8b", "6.9b", "6.9b-5+11R2+5"]
    assert PRESETS.keys() == {f"pythia-{size}.yaml" for size in sizes}


@pytest.mark.parametrize("name", PRESETS)
def test_every_split_has_the_depth_of_the_plain_model(name: str) -> None:
    depths = {"70m": 6, "160m": 12, "410m": 24, "1b": 16, "1.4b": 24, "2.8b": 32, "6.9b": 32}  # Pythia's
    for scheme in PAPER_SCHEMES:
        model = resolve(preset(name, "--recurrence", scheme)).model
        assert layout(model).depth == depths[name.removesuffix(".yaml").split("-")[1]]
        assert (model.layers == str(layout(model).depth)) == (scheme == "vanilla")


def test_vanilla_of_a_preset_is_the_plain_model_given_by_its_depth() -> None:
    by_split = resolve(preset("pythia-1.4b.yaml", "--recurrence", "vanilla"))
    by_depth = resolve(preset("pythia-1.4b.yaml", "--recurrence", "vanilla", "--layers", "24"))
    assert by_split == by_depth


def test_the_head_has_the_papers_counts() -> None:
    lines = [
        "    805,797,918  mesh",
        "    805,736,448  anchor-emb, anchor, residual, base",
        "  1,208,602,624  vanilla (24 layers)",
    ]
    assert all(f"# {line}" in PRESETS["pythia-1.4b.yaml"] for line in lines)


def test_the_paper_s_settings() -> None:
    config = resolve(preset("pythia-1.4b.yaml"))
    assert (config.optimizer.lr, config.optimizer.min_lr) == (2e-4, 2e-5)
    assert config.optimizer.lr_warmup_iters == 1208
    assert config.training.global_batch_size == 512
    assert 250e9 < 512 * 4096 * (config.training.train_iters or 0) < 254e9
    for size in SIZES:
        settings = yaml.safe_load(PRESETS[f"pythia-{size.name}.yaml"])
        assert settings["min_lr"] == pytest.approx(size.lr / 10, rel=1e-12)
        assert settings["recurrence"] == "mesh"


def test_a_short_run_of_a_preset() -> None:
    line = "--data-path D --seq-length 256 --global-batch-size 8 --train-iters 20"
    config = resolve(preset("pythia-160m.yaml", *line.split()))
    assert (config.model.vocab_size, config.model.layers, config.model.mesh_slots) == (50277, "2+4R2+2", 5)
    assert (config.model.seq_length, config.training.train_iters) == (256, 20)


def test_main_writes_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["presets", str(tmp_path)])
    main()
    written = {
        path.relative_to(tmp_path).as_posix(): path.read_text("utf-8") for path in tmp_path.rglob("*.yaml")
    }
    configs = {f"configs/{name}": text for name, text in PRESETS.items()}
    assert written == configs | {f"slurm/6.9b/{name}": text for name, text in cluster_presets()}
