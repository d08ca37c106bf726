"""Opens a Hugging Face directory with this package's own code, or a checkpoint through a temporary export.

Only the functions import transformers. So ``check_transformers`` can report a missing or old version before
an import fails.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError

from megatron_mesh.checkpoint.offline import open_checkpoint
from megatron_mesh.compat.versions import version
from megatron_mesh.errors import UserError
from megatron_mesh.hf.modeling.versions import OLDEST

_REMEDY = "pip install 'megatron_mesh[hf]' (in a checkout: pip install -e '.[hf]')"


def check_transformers() -> None:
    """Raise UserError if transformers is missing or too old."""
    found = version("transformers")
    if found is None:
        raise UserError(f"transformers is not installed: {_REMEDY}")
    if Version(found).release < Version(OLDEST).release:
        raise UserError(f"transformers {found} is too old; {OLDEST} or newer is needed: {_REMEDY}")


def register_classes() -> None:
    """Register our classes with transformers, so that it uses them instead of code in a directory."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from megatron_mesh.hf.modeling.configuration_mesh import MeshConfig
    from megatron_mesh.hf.modeling.modeling_mesh import MeshForCausalLM, MeshModel
    from megatron_mesh.hf.modeling.tokenization_mesh import MeshTokenizer

    AutoConfig.register(MeshConfig.model_type, MeshConfig, exist_ok=True)
    AutoModel.register(MeshConfig, MeshModel, exist_ok=True)
    AutoModelForCausalLM.register(MeshConfig, MeshForCausalLM, exist_ok=True)
    AutoTokenizer.register(MeshConfig, slow_tokenizer_class=MeshTokenizer, exist_ok=True)


@contextmanager
def temporary_export(load: Path, tokenizer_model: str | None = None) -> Iterator[Path]:
    """Export a checkpoint to a temporary directory, which is removed at the end of the block.

    Raises:
        UserError: ``export_checkpoint`` fails, or no tokenizer is known.
    """
    from megatron_mesh.hf.convert.export import export_checkpoint

    saved = open_checkpoint(load, check_sums=False)  # export_checkpoint verifies the checksums
    if tokenizer_model is None and saved.config.data.tokenizer_model is None:
        raise UserError(
            f"{load} was trained without a tokenizer; specify the one of its data with --tokenizer-model"
        )
    with tempfile.TemporaryDirectory(prefix="model-") as scratch:
        directory = Path(scratch) / "model"
        export_checkpoint(saved.path, directory, tokenizer_model=tokenizer_model)
        yield directory


def open_model(directory: Path, **options: Any) -> tuple[Any, Any]:
    """Load the model and the tokenizer in a directory. ``options`` are those of ``from_pretrained``.

    Raises:
        UserError: model or tokenizer is missing or damaged, the model needs code that isn't ours, or the
            options don't fit the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    register_classes()
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; give a directory written by tools/convert_to_hf.py")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{directory} has no tokenizer.json; convert with --tokenizer-model, or copy the file there"
        )
    tokenizer = _open_tokenizer(directory)
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        if "num_loops" in options and not hasattr(config, "num_loops"):
            raise UserError(
                f"--num-loops is for recursive models, and the model in {directory} is a plain "
                f"{config.model_type}; leave it out"
            )
        model = AutoModelForCausalLM.from_pretrained(str(directory), trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot open the model in {directory}: {error}") from error
    return model.eval(), tokenizer


def dtype_named(name: str | None) -> torch.dtype | str:
    """Return torch's dtype of that name, or "auto" (the dtype of the stored weights) for None."""
    return "auto" if name is None else getattr(torch, name)


def _open_tokenizer(directory: Path) -> Any:
    from megatron_mesh.hf.convert.export_tokenizer import read_tokenizer

    try:
        return read_tokenizer(directory)
    except Exception as error:  # transformers and its backends raise nothing more specific
        reason = " ".join(str(error).split())
        raise UserError(
            f"cannot open the tokenizer in {directory} ({reason}); convert again, or copy the model's "
            "original tokenizer.json and tokenizer_config.json there"
        ) from error
