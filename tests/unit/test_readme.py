"""The README's table of schemes, files and flags agree with the code."""

import re
from pathlib import Path

from megatron_mesh.config.settings import NEGATED, SETTINGS, flag
from megatron_mesh.recurrence import SCHEMES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def scheme_table() -> str:
    rows = [f"| `{name}` | {scheme.formula} |" for name, scheme in SCHEMES.items()]
    return "\n".join(["| `--recurrence` | next state |", "|---|---|", *rows])


def test_the_table_of_schemes_is_the_registry() -> None:
    assert scheme_table() in README, f"README.md should contain:\n{scheme_table()}"


def test_linked_and_named_files_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    commands = re.findall(r"python (\S+\.py)", README)
    configs = re.findall(r"--config (\S+\.yaml)", README)
    assert links and commands and configs
    made = ("runs/", "weights/")  # written by the README's earlier commands
    for name in {*links, *commands, *(config for config in configs if not config.startswith(made))}:
        assert (ROOT / name).exists(), name


def test_flags_in_training_commands_exist() -> None:
    known = {flag(name) for name in (*SETTINGS, *NEGATED)} | {"--config", "--dry-run", "--help"}
    joined = README.replace("\\\n", " ")
    for line in joined.splitlines():
        if "pretrain_mesh.py" in line and line.lstrip().startswith(("python", "torchrun")):
            used = re.findall(r"--[a-z][a-z0-9-]+", line.split("pretrain_mesh.py", 1)[1])
            assert set(used) <= known, line
