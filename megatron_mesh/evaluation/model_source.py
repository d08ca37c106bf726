"""Checks and opens the model to evaluate: a Hugging Face directory, or a checkpoint, which is exported."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mesh.checkpoint.directory import STATE_FILE, candidates, read_checkpoint, saved_steps
from megatron_mesh.checkpoint.integrity import digest, read_checksums
from megatron_mesh.config.schema import CheckpointConfig
from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.tasks import TRANSFORMERS, VLLM
from megatron_mesh.hf.convert.export_tokenizer import tokenizer_of
from megatron_mesh.hf.convert.ship import TOKENIZER_CLASS
from megatron_mesh.runtime import device, strict_json
from megatron_mesh.runtime.run_files import CHECKPOINT_PREFIX

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_MAY_NAME_CODE = ("config.json", "tokenizer_config.json")
_OUR_MODEL_TYPE = "megatron_mesh"
_PART_OF_MODEL = {".json", ".safetensors", ".bin", ".py", ".model", ".txt"}


@dataclass(frozen=True)
class ModelSource:
    """The model to evaluate, which has been checked but not yet loaded."""

    path: Path
    """A Hugging Face directory, or an iter_... directory."""
    is_checkpoint: bool
    trust_remote_code: bool
    sha256: str
    """Hash over the files of the model and its tokenizer."""
    tokenizer_model: str | None = None
    """For a checkpoint: path of the tokenizer, if it isn't the one in the run's settings."""


def huggingface_source(path: Path, *, trust_remote_code: bool) -> ModelSource:
    """Check a directory in the format of ``save_pretrained``.

    Raises:
        UserError: a file is missing, or the directory contains code that the user doesn't trust.
    """
    _check_model_files(path)
    _check_tokenizer(path)
    if not trust_remote_code:
        _check_no_code(path)
    parts = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in _PART_OF_MODEL)
    listed = {part.name: digest(part) for part in parts}
    return ModelSource(path, False, trust_remote_code, _sha256(listed))


def checkpoint_source(load: Path, tokenizer_model: str | None) -> ModelSource:
    """Check the newest checkpoint in a run's directory, or that in an iter_... directory.

    Raises:
        UserError: there is no checkpoint, it is incomplete, or it has no tokenizer.
    """
    if (load / "config.json").is_file():
        raise UserError(f"--load {load} is a Hugging Face directory; use --model for it")
    named = load.name.startswith(CHECKPOINT_PREFIX)  # read_checkpoint reports it if it is incomplete
    path = load if named else candidates(CheckpointConfig(load=str(load)))[0]
    tokenizer = tokenizer_of(read_checkpoint(path).config.data, tokenizer_model)
    if tokenizer is None:
        raise UserError(
            f"{path} was trained without a tokenizer; specify the one of its data with --tokenizer-model"
        )
    try:
        listed = read_checksums(path)
    except ValueError as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}; use --load with another one") from None
    listed["tokenizer"] = [tuple(digest(tokenizer.path))]
    return ModelSource(path, True, False, _sha256(listed), tokenizer_model)


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name (default: the one that this process would train on).

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return device.device()
    # current_accelerator() alone reports what torch was built for, even if there is no GPU.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = f"cpu or {accelerator.type}" if accelerator else "cpu (there is no GPU)"
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device of torch; this machine has {known}") from None
    exists = accelerator is not None and wanted.type == accelerator.type
    if wanted.type != "cpu" and not (exists and (wanted.index or 0) < torch.accelerator.device_count()):
        raise UserError(f"--device {name} doesn't exist; this machine has {known}")
    return wanted


@contextmanager
def opened(source: ModelSource, how: Mapping[str, Any], engine: str = TRANSFORMERS) -> Iterator[Any]:
    """Load the model as a ``CheckedHFLM`` or ``CheckedVLLM``, until the end of the block.

    A checkpoint is exported to a temporary directory for that time.

    Args:
        source: the model to load.
        how: device (only for transformers), dtype, batch_size, max_length.
        engine: one of ``ENGINES``.

    Raises:
        UserError: the engine cannot load the model, or the tokenizer belongs to another model.
    """
    from megatron_mesh.hf.convert.open_model import temporary_export

    with ExitStack() as stack:
        directory = source.path
        if source.is_checkpoint:
            directory = stack.enter_context(temporary_export(source.path, source.tokenizer_model))
        if engine == VLLM:
            lm = stack.enter_context(_served(directory, source, how))
        else:
            lm = _read(directory, source, how)
        if len(lm.tokenizer) > lm.config.vocab_size:
            raise UserError(
                f"the tokenizer in {source.path} has {len(lm.tokenizer):,} entries, but the model's "
                f"vocabulary only {lm.config.vocab_size:,}, so it belongs to another model; replace it"
            )
        yield lm


def _read(directory: Path, source: ModelSource, how: Mapping[str, Any]) -> Any:
    from megatron_mesh.evaluation.lm import open_hf_lm
    from megatron_mesh.hf.convert.open_model import register_classes

    register_classes()
    return open_hf_lm(directory, trust_remote_code=source.trust_remote_code, **how)


def _served(directory: Path, source: ModelSource, how: Mapping[str, Any]) -> Any:
    # We must not register our classes here: vLLM's processes load the code in the directory, and transformers
    # rejects two classes for the same configuration.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # vLLM reads it when it is imported
    from megatron_mesh.evaluation.vllm_lm import open_vllm_lm

    trust = source.trust_remote_code or source.is_checkpoint or _has_only_our_code(directory)
    return open_vllm_lm(directory, trust_remote_code=trust, **how)


def _has_only_our_code(directory: Path) -> bool:
    """Whether model or tokenizer need code in the directory, all of which is a copy of this package's.

    Raises:
        UserError: the code differs from this package's.
    """
    if not any(_code_of(directory / name) for name in _MAY_NAME_CODE):
        return False
    from megatron_mesh.hf.convert import ship

    ours = {**ship.sources(), **ship.tokenizer_source()}
    for path in directory.glob("*.py"):
        if path.read_text(encoding="utf-8") != ours.get(path.name):
            raise UserError(
                f"{path} differs from the code of this version, and vLLM would run it; update it with "
                f"tools/convert_to_hf.py --refresh-code {directory}, or add --trust-remote-code"
            )
    return True


def _check_model_files(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            f"--model {path}: no such directory; give one written by tools/convert_to_hf.py or by "
            "'hf download NAME --local-dir DIR', or use --load for a training checkpoint"
        )
    if not (path / "config.json").is_file():
        if saved_steps(path) or (path / STATE_FILE).is_file():
            raise UserError(f"--model {path} is a training checkpoint; use --load for it")
        raise UserError(
            f"--model {path} is not a Hugging Face model directory (no config.json); give one with "
            "config.json, weights and a tokenizer"
        )
    _read_json(path / "config.json")
    if not any(file for pattern in _WEIGHTS for file in path.glob(pattern)):
        raise UserError(
            f"--model {path} has no weights ({', '.join(_WEIGHTS)}); convert or download it again"
        )
    for index in path.glob("*.index.json"):
        missing = sorted({n for n in _read_json(index)["weight_map"].values() if not (path / n).is_file()})
        if missing:
            raise UserError(
                f"--model {path} is incomplete: {index.name} lists {', '.join(missing)}, which is missing; "
                "convert or download it again"
            )


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"--model {path} has no tokenizer (none of {', '.join(_TOKENIZERS)}); copy the tokenizer.json "
            "and tokenizer_config.json there that the model was trained with"
        )


def _check_no_code(path: Path) -> None:
    for name in _MAY_NAME_CODE:
        code = _code_of(path / name)
        content = _read_json(path / name) if code else {}
        ours = (
            content.get("model_type") == _OUR_MODEL_TYPE or content.get("tokenizer_class") == TOKENIZER_CLASS
        )
        if code and not ours:  # for our exports, the package's own code runs
            raise UserError(
                f"{path / name} has an auto_map ({', '.join(sorted(map(str, code)))}), so the model's own "
                "Python code would run on this machine; add --trust-remote-code if you trust it"
            )


def _code_of(path: Path) -> Any:
    """Return the auto_map of a JSON file, which lists classes in the model's own code, or None."""
    return _read_json(path).get("auto_map") if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); convert or download the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; convert or download the model again")
    return content


def _sha256(listed: dict[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(listed, sort_keys=True).encode()).hexdigest()
