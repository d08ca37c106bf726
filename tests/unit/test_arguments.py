import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mesh.arguments import parse_args
from megatron_mesh.config.resolve import resolve
from megatron_mesh.config.schema import Config
from megatron_mesh.config.settings import SETTINGS, dump_config, flag, flatten
from megatron_mesh.errors import UserError
from megatron_mesh.recurrence import SCHEMES


def _file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_no_arguments_give_the_defaults() -> None:
    arguments = parse_args([])
    assert arguments.config == Config()
    assert not arguments.dry_run


def test_precedence(tmp_path: Path) -> None:
    path = _file(tmp_path, "hidden_size: 64\nseq_length: 128\nlr: 1e-2")
    config = parse_args(["--seq-length", "32", "--config", path]).config
    assert (config.model.hidden_size, config.model.seq_length) == (64, 32)
    assert config.optimizer.lr == 0.01
    assert config.optimizer.min_lr == Config().optimizer.min_lr


def test_flags_of_every_kind() -> None:
    line = (
        "--data-path 0.3 a 0.7 b --bf16 --no-load-optim --lr=1e-3 --mesh_slots 4 "
        "--recompute-granularity full --recompute-modules core_attn mlp --dry-run"
    )
    arguments = parse_args(line.split())
    settings = flatten(arguments.config)
    assert arguments.dry_run
    assert settings["data_path"] == ["0.3", "a", "0.7", "b"]
    assert (settings["bf16"], settings["load_optim"], settings["load_rng"]) == (True, False, True)
    assert (settings["lr"], settings["mesh_slots"]) == (1e-3, 4)
    assert settings["recompute_granularity"] == "full"
    assert settings["recompute_modules"] == ["core_attn", "mlp"]


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("layers: 4+8R2+4", "--num-loops 3", "4+8R3+4"),
        ("layers: 4+8R2+4", "--layers 1+2R2+1", "1+2R2+1"),
        (
            "{prelude_layers: 1, core_layers: 2, num_loops: 2, coda_layers: 1}",
            "--coda-layers 5",
            "1+2R2+5",
        ),
        ("num_loops: 7", "--layers 1+2R2+1", "1+2R2+1"),
    ],
)
def test_layers_from_two_sources(tmp_path: Path, text: str, flags: str, expected: str) -> None:
    line = ["--config", _file(tmp_path, text), *flags.split(), "--train-iters", "5", "--vocab-size", "9"]
    assert resolve(parse_args(line).config).model.layers == expected


@pytest.mark.parametrize("where", ["file", "flags"])
def test_two_ways_to_give_the_layers_in_one_source(tmp_path: Path, where: str) -> None:
    line = (
        ["--config", _file(tmp_path, "{layers: 1+2R2+1, num_loops: 3}")]
        if where == "file"
        else ["--config", _file(tmp_path, "layers: 4+8R2+4"), "--layers", "1+2R2+1", "--num-loops", "3"]
    )
    with pytest.raises(UserError, match="--layers and --num-loops are both given"):
        resolve(parse_args(line).config)


def test_flags_replace_alternatives_in_the_file(tmp_path: Path) -> None:
    path = _file(tmp_path, "train_iters: 100\nlr_warmup_fraction: 0.5")
    config = parse_args(["--config", path, "--train-samples", "8", "--lr-warmup-samples", "2"]).config
    assert (config.training.train_iters, config.training.train_samples) == (None, 8)
    assert (config.optimizer.lr_warmup_fraction, config.optimizer.lr_warmup_samples) == (None, 2)


def test_another_tokenizer_on_the_command_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "tokenizer_type: HuggingFaceTokenizer\nlr: 1e-2")
    data = parse_args(["--config", path, "--tokenizer-model", "b.model"]).config.data
    assert (data.tokenizer_type, data.tokenizer_model) == (None, "b.model")
    assert parse_args(["--config", path]).config.data.tokenizer_type == "HuggingFaceTokenizer"


def test_a_tilde_that_the_shell_did_not_expand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse_args(["--save=~/x", "--data-path", "~/a"]).config.checkpoint.save == "/home/me/x"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--hiden-size 5", ["--hiden-size", "did you mean --hidden-size?"]),
        ("--hiden-size=5", ["--hiden-size;", "did you mean --hidden-size?"]),
        ("--no-load-optm", ["--no-load-optm", "did you mean --no-load-optim?"]),
        ("--confg x.yaml", ["did you mean --config?"]),
        ("--zzzz", ["unknown setting --zzzz", "--help"]),
        ("--cpu-offloading", ["--cpu-offloading is not supported", "layer running once"]),
        ("--cpu-offloading-num-layers 2", ["--cpu-offloading-num-layers is not", "layer running once"]),
        ("--fp16", ["use --bf16"]),
        ("--num-layers 24", ["use --layers"]),
        ("--num-layers-per-virtual-pipeline-stage 2", ["--num-virtual-stages-per-pipeline-rank"]),
        ("--virtual-pipeline-model-parallel-size 2", ["--num-virtual-stages-per-pipeline-rank"]),
        ("--config absent.yaml", ["--config absent.yaml cannot be read", "No such file"]),
    ],
)
def test_bad_flags(line: str, named: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_args(line.split())
    for part in named:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--hidden-size abc", "--hidden-size"),
        ("--num-loops 1.5", "--num-loops"),
        ("--hidden-size", "--hidden-size"),
        ("--lr-decay-style cos", "cosine"),
        ("--recompute-granularity none", "selective"),
        ("stray", "stray"),
        ("--config", "--config"),
    ],
)
def test_values_of_the_wrong_type(line: str, named: str) -> None:
    with pytest.raises(UserError) as error:
        parse_args(line.split())
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, "hidden_size: 4321")
    with pytest.raises(SystemExit) as exit_:
        parse_args(["--config", path, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "python pretrain_mesh.py --config examples/configs/pythia-160m.yaml" in text
    for name in (*(flag(setting) for setting in SETTINGS), *SCHEMES, "model options", "data options"):
        assert name in text
    assert "(default: 4321)" in text
    assert "None" not in text


def test_the_resolved_config_starts_the_same_run_again(tmp_path: Path) -> None:
    line = (
        "--recurrence mesh --prelude-layers 1 --core-layers 2 --num-loops 2 --coda-layers 1 --vocab-size 100 "
        "--train-samples 64 --micro-batch-size 2 --lr-warmup-fraction 0.25 --data-path 0.5 a 0.5 b:c "
        "--recompute-granularity selective --no-load-rng --norm-epsilon 1e-6 --save runs/nöel "
        "--wandb-project no --output-dir runs/$x"
    )
    first = resolve(parse_args(line.split()).config)
    text = dump_config(first)
    again = parse_args(["--config", _file(tmp_path, text)]).config
    assert again == first
    assert resolve(again) == first
    assert all(f"\n{name}:" in text for name in SETTINGS)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("--seq-length x", "--seq-length"),
        ("--layers 4+8R2+4 --num-attention-heads 10", "error: --hidden-size 768 is not divisible"),
    ],
)
def test_exit_code_and_output_of_the_program(line: str, named: str) -> None:
    program = Path(__file__).resolve().parents[2] / "pretrain_mesh.py"
    command = [sys.executable, str(program), *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not done.stdout


def test_help_shows_one_default_per_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*line: str) -> str:
        with pytest.raises(SystemExit):
            parse_args([*line, "--help"])
        return " ".join(capsys.readouterr().out.replace("│", " ").split())

    assert "Keep this many of the newest checkpoints. (default: all)" in shown()
    assert "Directory to save checkpoints to. (default: unset)" in shown()
    path = _file(tmp_path, "keep_last: 3")
    assert "Keep this many of the newest checkpoints. (default: 3)" in shown("--config", path)
    # Two lines in the source are one sentence here.
    assert "if a save blocks training for this long. --watchdog-timeout-minutes 0 disables it." in shown()
