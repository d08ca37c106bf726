"""The README and the pages that continue it tell the truth: table of schemes, files, flags."""

import re
from pathlib import Path

import pytest

from megatron_mesh.config.settings import NEGATED, SETTINGS, flag
from megatron_mesh.recurrence import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("examples/*/README.md")),
]


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def scheme_table() -> str:
    rows = [f"| `{name}` | {scheme.formula} |" for name, scheme in SCHEMES.items()]
    return "\n".join(["| `--recurrence` | next state |", "|---|---|", *rows])


def test_the_table_of_schemes_is_the_registry() -> None:
    page = "examples/training/README.md"
    assert scheme_table() in text_of(page), f"{page} should contain:\n{scheme_table()}"


@pytest.mark.parametrize("page", PAGES)
def test_linked_and_named_files_exist(page: str) -> None:
    text = text_of(page)
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    commands = re.findall(r"python ((?![-/])\S+\.py)", text)
    configs = re.findall(r"--config (examples/\S+\.yaml)", text)
    modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (tools\.bench\.\w+)", text)]
    for name in {*commands, *configs, *modules}:
        assert (ROOT / name).exists(), name


def test_the_readme_shows_commands() -> None:
    """The test above has something to check."""
    text = text_of("README.md")
    assert (
        re.search(r"\]\(examples/", text) and "python tools/" in text and "--config examples/configs/" in text
    )


@pytest.mark.parametrize("page", PAGES)
def test_flags_in_training_commands_exist(page: str) -> None:
    known = {flag(name) for name in (*SETTINGS, *NEGATED)} | {"--config", "--dry-run", "--help"}
    for line in text_of(page).replace("\\\n", " ").splitlines():
        if "pretrain_mesh.py" in line and line.lstrip().startswith(("python", "torchrun")):
            used = re.findall(r"--[a-z][a-z0-9-]+", line.split("pretrain_mesh.py", 1)[1])
            assert set(used) <= known, line


def test_folders_in_contributing_are_those_of_the_package() -> None:
    listed = set(re.findall(r"^\| `(\w+)` \|", text_of("CONTRIBUTING.md"), re.MULTILINE))
    folders = {path.parent.name for path in ROOT.glob("megatron_mesh/*/__init__.py")}
    assert listed >= folders, folders - listed


def test_files_in_contributing_exist() -> None:
    """ "How a token travels through the code" names real files and functions."""
    text = text_of("CONTRIBUTING.md")
    section = text[text.index("## How a token travels") : text.index("## Rules")]
    for name in re.findall(r"`((?:\w+/)+\w+\.py)", section):
        assert (ROOT / "megatron_mesh" / name).is_file() or (ROOT / name).is_file(), name
    sources = [*ROOT.glob("megatron_mesh/**/*.py"), *ROOT.glob("tools/*.py")]
    for path, function in re.findall(r"`((?:\w+/)*\w+\.py): (\w+)`", section):
        (file,) = [source for source in sources if str(source).endswith("/" + path)]
        assert re.search(rf"^\s*(def|class) {function}\b", file.read_text(), re.MULTILINE), (path, function)
