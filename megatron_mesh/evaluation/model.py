"""The model that is evaluated: a Hugging Face directory, or a training checkpoint that becomes one."""

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
from megatron_mesh.evaluation.engines import TRANSFORMERS, VLLM
from megatron_mesh.hf.tokenizer import CLASS, tokenizer_of
from megatron_mesh.runtime import device, strict_json

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_MAY_NAME_CODE = ("config.json", "tokenizer_config.json")
_OUR_MODEL_TYPE = "megatron_mesh"
_PART_OF_MODEL = {".json", ".safetensors", ".bin", ".py", ".model", ".txt"}


@dataclass(frozen=True)
class Source:
    """Where a model is, and what it is made of."""

    path: Path
    """A Hugging Face directory, or an iter_... directory."""
    is_checkpoint: bool
    trust_remote_code: bool
    sha256: str
    """Over the files that the model is read from."""
    tokenizer_model: str | None = None
    """For a checkpoint: in place of the one that its settings name."""


def huggingface_source(path: Path, *, trust_remote_code: bool) -> Source:
    """A directory as ``save_pretrained`` writes it.

    Raises:
        UserError: something is missing, or it brings code and the user has not said to trust it.
    """
    _check_model_files(path)
    _check_tokenizer(path)
    if not trust_remote_code:
        _check_no_code(path)
    parts = sorted(p for p in path.iterdir() if p.is_file() and p.suffix in _PART_OF_MODEL)
    listed = {part.name: digest(part) for part in parts}
    return Source(path, False, trust_remote_code, _sha256(listed))


def checkpoint_source(load: Path, tokenizer_model: str | None) -> Source:
    """The newest checkpoint of a run directory, or an iter_... directory.

    Raises:
        UserError: there is no checkpoint, it is not complete, or has no tokenizer.
    """
    if (load / "config.json").is_file():
        raise UserError(f"--load {load} is a Hugging Face directory: give it as --model")
    named = load.name.startswith("iter_")  # perhaps an unfinished one, which reading it will say
    path = load if named else candidates(CheckpointConfig(load=str(load)))[0]
    tokenizer = tokenizer_of(read_checkpoint(path).config.data, tokenizer_model)
    if tokenizer is None:
        raise UserError(
            f"{path} was trained without a tokenizer; name the one of its data: --tokenizer-model"
        )
    try:
        listed = read_checksums(path)
    except ValueError as error:
        raise UserError(f"the checkpoint {path} is damaged: {error}; --load another one") from None
    listed["tokenizer"] = [tuple(digest(tokenizer.path))]
    return Source(path, True, False, _sha256(listed), tokenizer_model)


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the one that this process would train on.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return device.device()
    # A torch that is built for CUDA names it also where there is no GPU.
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    known = f"cpu or {accelerator.type}" if accelerator else "cpu (there is no GPU)"
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not known to torch; here it can be {known}") from None
    there = accelerator is not None and wanted.type == accelerator.type
    if wanted.type != "cpu" and not (there and (wanted.index or 0) < torch.accelerator.device_count()):
        raise UserError(f"--device {name}: no such device on this machine; here it can be {known}")
    return wanted


@contextmanager
def opened(source: Source, how: Mapping[str, Any], engine: str = TRANSFORMERS) -> Iterator[Any]:
    """The model in memory as ``CheckedHFLM`` or ``CheckedVLLM``; a checkpoint is converted for as long.

    Args:
        source: which model.
        how: device (for transformers only), dtype, batch_size, max_length.
        engine: what runs it, one of ``ENGINES``.

    Raises:
        UserError: the engine cannot read the model, or the tokenizer is another model's.
    """
    from megatron_mesh.hf.open_model import directory_of

    with ExitStack() as stack:
        directory = source.path
        if source.is_checkpoint:
            directory = stack.enter_context(directory_of(source.path, source.tokenizer_model))
        if engine == VLLM:
            lm = stack.enter_context(_served(directory, source, how))
        else:
            lm = _read(directory, source, how)
        if len(lm.tokenizer) > lm.config.vocab_size:
            raise UserError(
                f"the tokenizer in {source.path} has {len(lm.tokenizer):,} entries, the model's vocabulary "
                f"only {lm.config.vocab_size:,}: it is another model's tokenizer; put the right one there"
            )
        yield lm


def _read(directory: Path, source: Source, how: Mapping[str, Any]) -> Any:
    from megatron_mesh.evaluation.lm import open_lm
    from megatron_mesh.hf.open_model import register

    register()
    return open_lm(directory, trust_remote_code=source.trust_remote_code, **how)


def _served(directory: Path, source: Source, how: Mapping[str, Any]) -> Any:
    # Not registered: vLLM's processes take the code from the directory, and transformers refuses two classes
    # of one configuration.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # read when vLLM is imported
    from megatron_mesh.evaluation.vllm_lm import open_lm

    trust = source.trust_remote_code or source.is_checkpoint or _carries_our_code(directory)
    return open_lm(directory, trust_remote_code=trust, **how)


def _carries_our_code(directory: Path) -> bool:
    """Whether the model or its tokenizer brings code, all of which is a copy of this package's own.

    Raises:
        UserError: an export of ours whose code differs.
    """
    if not any(_code_of(directory / name) for name in _MAY_NAME_CODE):
        return False
    from megatron_mesh.hf import ship

    ours = {**ship.sources(), **ship.tokenizer_source()}
    for path in directory.glob("*.py"):
        if path.read_text(encoding="utf-8") != ours.get(path.name):
            raise UserError(
                f"{path} differs from this version's, and vLLM would run it: bring it up to date "
                f"(tools/convert_to_hf.py --refresh-code {directory}), or add --trust-remote-code"
            )
    return True


def _check_model_files(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            f"--model {path}: no such directory; give one that tools/convert_to_hf.py wrote or that "
            "'hf download NAME --local-dir DIR' filled, or a training checkpoint as --load"
        )
    if not (path / "config.json").is_file():
        if saved_steps(path) or (path / STATE_FILE).is_file():
            raise UserError(f"--model {path} is a training checkpoint: give it as --load")
        raise UserError(
            f"--model {path} is not a Hugging Face model directory (no config.json); give one that holds "
            "config.json, weights and tokenizer"
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
                f"--model {path} is not complete: {', '.join(missing)} of {index.name} is missing; "
                "convert or download it again"
            )


def _check_tokenizer(path: Path) -> None:
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"--model {path} has no tokenizer (none of {', '.join(_TOKENIZERS)}); put the tokenizer.json and "
            "tokenizer_config.json that the model was trained with there"
        )


def _check_no_code(path: Path) -> None:
    for name in _MAY_NAME_CODE:
        code = _code_of(path / name)
        content = _read_json(path / name) if code else {}
        ours = content.get("model_type") == _OUR_MODEL_TYPE or content.get("tokenizer_class") == CLASS
        if code and not ours:  # for which the package's code is taken
            raise UserError(
                f"{path / name} has an auto_map ({', '.join(sorted(map(str, code)))}): the model brings "
                "Python code, which would run on this machine. If you trust it, add --trust-remote-code."
            )


def _code_of(path: Path) -> Any:
    """The auto_map of a JSON file, which names the classes that the model brings; None without one."""
    return _read_json(path).get("auto_map") if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; convert or download the model again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; convert or download the model again")
    return content


def _sha256(listed: dict[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(listed, sort_keys=True).encode()).hexdigest()
