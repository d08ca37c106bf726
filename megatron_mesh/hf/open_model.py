"""Open a model from a Hugging Face directory, or from a checkpoint, by converting it into a temporary one."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from megatron_mesh.checkpoint.offline import open_checkpoint
from megatron_mesh.errors import UserError
from megatron_mesh.hf.configuration_mesh import MeshConfig
from megatron_mesh.hf.export import export_checkpoint
from megatron_mesh.hf.modeling_mesh import MeshForCausalLM, MeshModel
from megatron_mesh.hf.tokenization_mesh import MeshTokenizer
from megatron_mesh.hf.tokenizer import read_tokenizer


def register() -> None:
    """Register this package's classes with transformers, so that no code in a directory is run."""
    AutoConfig.register(MeshConfig.model_type, MeshConfig, exist_ok=True)
    AutoModel.register(MeshConfig, MeshModel, exist_ok=True)
    AutoModelForCausalLM.register(MeshConfig, MeshForCausalLM, exist_ok=True)
    AutoTokenizer.register(MeshConfig, slow_tokenizer_class=MeshTokenizer, exist_ok=True)


@contextmanager
def directory_of(load: Path, tokenizer_model: str | None = None) -> Iterator[Path]:
    """A checkpoint as a Hugging Face directory with its tokenizer, until the end of the block.

    Raises:
        UserError: as ``export_checkpoint``, or the run named no tokenizer.
    """
    saved = open_checkpoint(load, check_sums=False)  # the conversion checks them
    if tokenizer_model is None and saved.config.data.tokenizer_model is None:
        raise UserError(
            f"{load} was trained without a tokenizer; name the one of its data: --tokenizer-model"
        )
    with tempfile.TemporaryDirectory(prefix="model-") as scratch:
        directory = Path(scratch) / "model"
        export_checkpoint(saved.path, directory, tokenizer_model=tokenizer_model)
        yield directory


def open_model(directory: Path, **options: Any) -> tuple[Any, Any]:
    """The model and its tokenizer; ``options`` as in ``from_pretrained``.

    Raises:
        UserError: the directory holds no model, a damaged one, or one with code that isn't ours; it holds no
            tokenizer or a damaged one; or the options don't fit the model.
    """
    register()
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; give a directory that tools/convert_to_hf.py wrote")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{directory} has no tokenizer.json; convert with --tokenizer-model, or put it there")
    tokenizer = _tokenizer_in(directory)
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        if "num_loops" in options and not hasattr(config, "num_loops"):
            raise UserError(f"the model in {directory} is a plain {config.model_type}: it has no --num-loops")
        model = AutoModelForCausalLM.from_pretrained(str(directory), trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"the model in {directory} cannot be opened: {error}") from error
    return model.eval(), tokenizer


def _tokenizer_in(directory: Path) -> Any:
    try:
        return read_tokenizer(directory)
    except Exception as error:  # transformers and its backends raise nothing more specific
        reason = " ".join(str(error).split())
        raise UserError(
            f"the tokenizer in {directory} cannot be opened ({reason}); convert again, or put the model's "
            "own tokenizer.json and tokenizer_config.json there"
        ) from error


def dtype_named(name: str | None) -> torch.dtype | str:
    """A dtype of torch's; "auto", the weights' own, for None."""
    return "auto" if name is None else getattr(torch, name)
