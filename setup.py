"""Build the package. .ci/constraints.txt pins the exact versions that are tested together."""

import ast
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PACKAGE = ROOT / "megatron_mesh"


class BuildWithTools(build_py):
    """Copy the programs in ``tools/`` and the presets into the package, so that a wheel has them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the clone's own files are used
            return
        for source, target in ((ROOT / "tools", "tools"), (ROOT / "examples/configs", "presets")):
            directory = Path(self.build_lib, PACKAGE.name, target)
            self.mkpath(str(directory))
            for path in sorted(source.glob("*.py" if target == "tools" else "*.yaml")):
                self.copy_file(str(path), str(directory / path.name))


def constant(name: str, path: Path) -> Any:
    """Read a constant from a file that cannot be imported yet."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise LookupError(f"{path} has no {name}")


def tested_transformers() -> str:
    """Require one of the tested minor releases of transformers.

    A minor release may rename arguments that our exports use, so untested ones are excluded, even between
    tested ones. Patch releases only fix bugs, so those after a tested one are allowed.
    """
    tested = constant("TESTED", PACKAGE / "hf/modeling/versions.py")
    minors = [tuple(int(part) for part in version.split(".")[:2]) for version in tested]
    major, newest = minors[-1]
    skipped = [f"!={major}.{minor}.*" for minor in range(newest) if (major, minor) not in minors]
    for version in tested[1:]:
        minor, patch = version.rsplit(".", 1)
        skipped += [f"!={minor}.{earlier}" for earlier in range(int(patch))]
    return ",".join([f"transformers>={tested[0]}", f"<{major}.{newest + 1}", *skipped])


TRANSFORMERS = tested_transformers()

setup(
    name="megatron_mesh",
    version=constant("__version__", PACKAGE / "__init__.py"),
    description="Megatron-style pretraining of recursive (looped) transformers with MeSH",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BuildWithTools},
    entry_points={"console_scripts": ["megatron-mesh = megatron_mesh.__main__:main"]},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["megatron_mesh", "megatron_mesh.*"]),
    py_modules=["pretrain_mesh"],
    package_data={
        "megatron_mesh": ["py.typed"],
        "megatron_mesh.evaluation": ["*.json"],
        "megatron_mesh.slurm": ["*.sh"],
    },
    install_requires=[
        "megatron-core==0.16.1",  # compat/ patches and subclasses its internals, so exactly this version
        "torch>=2.9,<2.14",
        "numpy>=2.0,<3",
        "packaging>=24.2",
        "psutil>=5.9",  # megatron-core needs it too, but doesn't declare it
        "sentencepiece>=0.2.2",
        "tokenizers>=0.21",
        "PyYAML>=6.0",
        "zstandard>=0.23",
        "tyro>=1.0,<2",
        "rich>=13.7",
        "tensorboard>=2.18",
        "matplotlib>=3.9",
    ],
    extras_require={
        "data": ["gigatoken>=0.10", "datatrove>=0.9"],  # 0.10 doesn't work with transformers 4.57
        "hf": [TRANSFORMERS, "safetensors>=0.5", "huggingface_hub>=0.36", "protobuf>=5"],
        "eval": [
            "lm_eval>=0.4.13,<0.5",
            TRANSFORMERS,
            "accelerate>=1.15",  # lm-eval's Hugging Face backend imports this and peft
            "peft>=0.21",
            "datasets>=5.0",  # 5.2 doesn't work with transformers 4.57
        ],
        # The versions that megatron-core 0.16.1 supports. Install with --no-build-isolation to compile them
        # against the installed torch, which must have CUDA 13. NVIDIA's image has them (examples/docker).
        "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        "wandb": ["wandb>=0.19"],
        "dev": [
            "pytest>=8.3,<9.2",  # with 9.2, pytest-xdist 3.8 ignores test groups
            "pytest-xdist>=3.6",
            "allpairspy>=2.5",
            'triton>=3.5; platform_system == "Linux"',  # its interpreter runs the kernels in tests
            "hypothesis>=6.120",
            "trl>=1.16,<2",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "types-PyYAML",
        ],
    },
)
