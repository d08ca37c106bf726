"""A model in memory: from a Hugging Face directory, or from a checkpoint, which becomes one for as long."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from megatron_mesh.checkpoint.offline import whole_checkpoint
from megatron_mesh.errors import UserError
from megatron_mesh.hf.configuration_mesh import MeshConfig
from megatron_mesh.hf.export import export_checkpoint
from megatron_mesh.hf.modeling_mesh import MeshForCausalLM, MeshModel
from megatron_mesh.hf.tokenization_mesh import MeshTokenizer
from megatron_mesh.hf.tokenizer import read_tokenizer


def register() -> None:
    """Have transformers take our own code for our models, so that none needs to come from a directory."""
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
    saved = whole_checkpoint(load, check_sums=False)  # the conversion checks them
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
        UserError: the directory holds no model, a damaged one, one that brings code of others, or no
            tokenizer; or the model cannot be had with these options.
    """
    register()
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} has no config.json; give a directory that tools/convert_to_hf.py wrote")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{directory} has no tokenizer.json; convert with --tokenizer-model, or put it there")
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
        if "num_loops" in options and not hasattr(config, "num_loops"):
            raise UserError(f"the model in {directory} is a plain {config.model_type}: it has no --num-loops")
        model = AutoModelForCausalLM.from_pretrained(str(directory), trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"the model in {directory} cannot be opened: {error}") from error
    return model.eval(), read_tokenizer(directory)


def dtype_named(name: str | None) -> torch.dtype | str:
    """A dtype of torch's; "auto", the weights' own, for None."""
    return "auto" if name is None else getattr(torch, name)
