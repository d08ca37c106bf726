"""The weights in a Hugging Face directory, read one tensor at a time."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mesh.errors import UserError

# Names of newer versions of transformers for those of released checkpoints.
_OTHER_NAMES = {"embed_out.weight": "lm_head.weight"}


class Weights:
    """Tensors by name, from safetensors, or from torch's files (read without running what is in them).

    Raises:
        UserError: there are no weights in ``directory``, or a file is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        self._files = self._list()

    def __contains__(self, name: str) -> bool:
        return self._known(name) in self._files

    def __getitem__(self, name: str) -> Tensor:
        name = self._known(name)
        path = self._files[name]
        if path.suffix != ".safetensors":
            return self._pickle(path)[name]
        with _opened(path) as file:
            return file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        name = self._known(name)
        path = self._files[name]
        if path.suffix != ".safetensors":
            return tuple(self._pickle(path)[name].shape)
        with _opened(path) as file:
            return tuple(file.get_slice(name).get_shape())

    def _known(self, name: str) -> str:
        return name if name in self._files else _OTHER_NAMES.get(name, name)

    def _list(self) -> dict[str, Path]:
        for name in ("model.safetensors", "pytorch_model.bin"):
            index = self.directory / f"{name}.index.json"
            if index.is_file():
                files = {key: self.directory / file for key, file in _weight_map(index).items()}
                if absent := sorted({str(path) for path in files.values() if not path.is_file()}):
                    raise UserError(f"{absent[0]} is missing, which {index} names; get the model anew")
                return files
        for name in ("model.safetensors", "pytorch_model.bin"):
            path = self.directory / name
            if path.is_file():
                return dict.fromkeys(self._names_in(path), path)
        raise UserError(f"{self.directory} holds no weights (model.safetensors); give a model's directory")

    def _names_in(self, path: Path) -> list[str]:
        if path.suffix != ".safetensors":
            return list(self._pickle(path))
        with _opened(path) as file:
            return list(file.keys())

    def _pickle(self, path: Path) -> dict[str, Tensor]:
        if path not in self._pickles:
            self._pickles[path] = _unpickled(path)
        return self._pickles[path]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; what goes wrong within the block is the file's fault."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); get it anew") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch's, of which torch makes nothing but tensors and plain values."""
    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:  # whose message advises to run what is in the file
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which could run code; get the model as "
            "safetensors"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); get the model as safetensors") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no tensors by name; get the model as safetensors")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} cannot be read ({error}); get the model anew") from None


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file for all who may read its directory: safetensors makes it for the owner."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)
