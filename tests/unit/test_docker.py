"""The Dockerfile: what it copies, installs and keeps. The tests don't build the image."""

import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools

from megatron_mesh.slurm.site import read_site

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/docker"
RECIPE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
# Packages as the image's pip lists them: those to keep, and others.
KEPT = """\
torch==2.10.0a0+b4e4ee81d3.nv25.12
torchvision==0.25.0a0+ca221243
pytorch-triton==3.5.0
transformer_engine==2.10.0+769ed7787
flash_attn==2.7.4.post1
apex==0.1
nvidia-cudnn-frontend==1.16.0
""".splitlines()
FREE = ["numpy==2.1.0", "transformers==4.0.0", "tokenizers==0.20.0", "pip==25.3"]


def test_the_build_copies_the_files_that_it_uses() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # so nothing else is copied
    copied = [line.removeprefix("!") for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in copied)
    named = re.findall(r"(?:sh|python) (\S+/\S+)", RECIPE)
    read_by_setup = ["setup.py", "README.md", "LICENSE", "pretrain_mesh.py", "megatron_mesh/__init__.py"]
    assert named
    for name in [*named, *read_by_setup]:
        assert (ROOT / name).is_file() and name.split("/")[0] in copied


def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found: dict[str, object] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: found.update(arguments))
    code = compile((ROOT / "setup.py").read_text(), str(ROOT / "setup.py"), "exec")
    exec(code, {"__file__": str(ROOT / "setup.py")})
    return SimpleNamespace(**found)


def test_installed_extras_exist_and_do_not_replace_transformer_engine(monkeypatch) -> None:
    arguments = setup_arguments(monkeypatch)
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", RECIPE)
    installed = [*arguments.install_requires]
    for extra in extras.split(","):
        installed += arguments.extras_require[extra]
    assert not any(line.startswith(("transformer-engine", "flash", "apex")) for line in installed)
    (te,) = arguments.extras_require["te"]
    assert re.fullmatch(r"transformer-engine\[[\w,]+\]>=2\.9,<2\.12", te)


def test_torch_and_packages_compiled_against_it_are_kept(tmp_path: Path) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join([*FREE, *KEPT]) + "\nEND\n")
    pip.chmod(0o755)
    found = subprocess.run(
        ["sh", str(FOLDER / "kept.sh")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == KEPT


def test_the_settings_for_site_sh_in_the_readme_can_be_read(tmp_path: Path) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), re.S)
    (values,) = [block for block in blocks if "ENVIRONMENT=pyxis" in block]
    path = tmp_path / "site.sh"
    path.write_text((ROOT / "examples/slurm/site.sh").read_text() + values)
    assert read_site(path).gpus_per_node == 8
