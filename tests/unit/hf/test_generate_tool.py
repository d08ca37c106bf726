"""tools/generate.py: its output for a directory and for a checkpoint, and its errors."""

import io
import shutil
from pathlib import Path

import pytest
import sentencepiece
import torch

from megatron_mesh.data.tokenizer import build_tokenizer
from megatron_mesh.errors import UserError
from megatron_mesh.hf.convert.export import export_checkpoint
from megatron_mesh.hf.convert.open_model import open_model
from tests.commands import tool
from tests.exports import saved_with_logits
from tests.unit.hf.test_open_model import TOKENIZER

pytestmark = pytest.mark.versions

ROOT = Path(__file__).resolve().parents[3]
main = tool("generate")
GREEDY = ["--temperature", "0", "--max-new-tokens", "9"]


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with a SentencePiece tokenizer, whose pieces start with spaces, and its export."""
    directory = tmp_path_factory.mktemp("looped")
    lines = (ROOT / "megatron_mesh/hf/modeling/modeling_mesh.py").read_text(encoding="utf-8").splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(directory / "spm"), vocab_size=400,
        model_type="bpe", normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    model = {"recurrence": "base", "layers": "1+1R2+1", "vocab_size": 400}
    checkpoint, _ = saved_with_logits(
        directory / "run", tokenizer_model=str(directory / "spm.model"), seq_length=64, **model
    )
    export_checkpoint(checkpoint, directory / "hf")
    return checkpoint, directory / "hf"


def written(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    main([*GREEDY, *map(str, arguments)])
    return capsys.readouterr().out


def test_prints_the_models_text(looped, capsys) -> None:
    """Including the space before the first new word."""
    model, tokenizer = open_model(looped[1], dtype=torch.float32)
    for prompt in ("the value", "def forward(self"):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=9, do_sample=False)[0]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert written(capsys, "--model", looped[1], "--prompt", prompt) == f"{expected}\n\n"


def test_a_new_word_keeps_its_space(looped, capsys, monkeypatch) -> None:
    from megatron_mesh.hf.modeling.modeling_mesh import MeshForCausalLM

    _, tokenizer = open_model(looped[1])
    new = tokenizer(" return", return_tensors="pt")["input_ids"]

    def generate(self, input_ids, **options):
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(MeshForCausalLM, "generate", generate)
    text = written(capsys, "--model", looped[1], "--prompt", "the value")
    assert text == tokenizer.decode(tokenizer("the value")["input_ids"] + new[0].tolist()) + "\n\n"
    assert text.split() == ["the", "value", "return"]


def test_ways_in(looped, capsys, tmp_path, monkeypatch) -> None:
    """A directory or a checkpoint, with prompts on the command line, in a file, or in a dialogue."""
    checkpoint, directory = looped
    text = written(capsys, "--model", directory, "--prompt", "def", "--prompt", "class")
    assert text == written(capsys, "--load", checkpoint.parent, "--prompt", "def", "--prompt", "class")
    (tmp_path / "prompts.txt").write_text("def\nclass\n")
    output = tmp_path / "output.txt"
    ways = ["--prompt-file", tmp_path / "prompts.txt", "--output", output]
    assert written(capsys, "--model", directory, *ways) == text == output.read_text()
    monkeypatch.setattr("sys.stdin", io.StringIO("def\nclass\n\nnot this\n"))
    assert written(capsys, "--model", directory).replace("> ", "") == text


def test_lines_of_a_prompt_file(tmp_path) -> None:
    """Only line feeds end a prompt. A carriage return before them is dropped."""
    from tools.generate import Options, _given

    path = tmp_path / "prompts.txt"

    def prompts(text: str) -> list[str]:
        path.write_bytes(text.encode())
        return list(_given(Options(prompt_file=path)))

    odd = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei\rj "
    assert prompts(f"{odd}\nb\r\n\n\ufeffc") == [odd, "b", "", "\ufeffc"]
    assert prompts("a\n") == prompts("a") == ["a"] and prompts("") == [] and prompts("\n") == [""]
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"--prompt-file .*prompts\.txt cannot be read: 'utf-8'"):
        list(_given(Options(prompt_file=path)))
    with pytest.raises(
        UserError, match=r"--prompt 'a\\udcff' is not UTF-8; give it in a UTF-8 --prompt-file"
    ):
        list(_given(Options(prompt=("a\udcff",))))


def test_a_checkpoint_and_its_export_get_the_ids_of_the_training(looped, monkeypatch) -> None:
    from megatron_mesh.hf.modeling.modeling_mesh import MeshForCausalLM

    checkpoint, directory = looped
    trained = build_tokenizer(None, str(checkpoint.parents[1] / "spm.model"))
    prompts = ["", "a </s> b", "<s>x", "<unk> z", "\ufeffa\xa0b\u2028 ", "the value  "]
    expected = [trained.tokenize(prompt) or [trained.eod] for prompt in prompts]
    got: list[list[int]] = []

    def generate(self, input_ids, **options):
        got.append(input_ids[0].tolist())
        return input_ids

    monkeypatch.setattr(MeshForCausalLM, "generate", generate)
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    for source in (["--load", str(checkpoint)], ["--model", str(directory)]):
        main([*source, *given])
        assert got == expected
        got.clear()


def test_other_loops_and_beams(looped, capsys) -> None:
    prompt = ["--model", looped[1], "--prompt", "the value", "--temperature", 1]
    same = written(capsys, *prompt, "--num-loops", 2)
    assert same == written(capsys, *prompt) != written(capsys, *prompt, "--num-loops", 5)
    assert written(capsys, *prompt, "--num-beams", 3).startswith("the value")


def test_mistakes(looped, exported, tmp_path) -> None:
    checkpoint, directory = looped

    def refused(message: str, *arguments: object) -> None:
        with pytest.raises(UserError, match=message):
            main([*map(str, arguments), "--prompt", "x"])

    (tmp_path / "empty.txt").touch()
    refused("either --model", "--model", directory, "--load", checkpoint)
    refused(r"has no config\.json; give a directory written by", "--model", checkpoint)
    refused("is not a directory; give a run's --save", "--load", tmp_path / "nowhere")
    refused("--num-beams 0 must be at least 1", "--model", directory, "--num-beams", 0)
    refused(
        "cannot open the model .*: FlashAttention2",
        "--model",
        directory,
        "--attn-implementation",
        "flash_attention_2",
    )
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        main(["--model", str(directory), "--prompt-file", str(tmp_path / "empty.txt")])
    refused("without a tokenizer; .*--tokenizer-model", "--load", exported()[0])
    plain = shutil.copytree(exported(recurrence="vanilla", layers="4")[1], tmp_path / "plain")
    refused(r"has no tokenizer\.json", "--model", plain)
    shutil.copy(directory / "tokenizer.json", plain)
    refused(
        "--num-loops is for recursive models, .* a plain gpt_neox; leave it out",
        "--model",
        plain,
        "--num-loops",
        2,
    )
    (plain / "tokenizer.json").write_text(TOKENIZER)  # has no end-of-text token
    with pytest.raises(UserError, match="the prompt is empty"):
        main(["--model", str(plain), "--prompt", ""])
