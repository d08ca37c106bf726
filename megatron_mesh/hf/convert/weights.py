"""Reads the weights in a Hugging Face directory one tensor at a time, and writes safetensors files."""

import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mesh.errors import UserError

# Tensor names in released checkpoints, and the names that newer versions of transformers give them.
_NEWER_NAMES = {"embed_out.weight": "lm_head.weight"}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The dtypes that we can convert, by their names in safetensors."""
TRAINING_ONLY = Path("training_only")
"""Subdirectory of an export for tensors that only a conversion back to a checkpoint needs.

It is a subdirectory because engines such as vLLM load every safetensors file next to config.json. It must not
have this package's name: Python, started in the export, would import the directory instead of the package.
"""


class ModelWeights:
    """The weights in a directory, by name, from safetensors or pickle files. Pickled code is never run.

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

    def __len__(self) -> int:
        return len(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        found = self._header(name)
        return tuple(found.shape if isinstance(found, Tensor) else found.get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype without reading it.

        Raises:
            UserError: it isn't float32, bfloat16 or float16, which means that the weights are quantized.
        """
        found = self._header(name)
        dtype = found.dtype if isinstance(found, Tensor) else found.get_dtype()
        if isinstance(dtype, str):
            dtype = _DTYPES.get(dtype, dtype)
        if dtype not in _DTYPES.values():
            raise UserError(
                f"{self.directory}: {name} has dtype {str(dtype).removeprefix('torch.')}; only weights in "
                "float32, bfloat16 or float16 can be converted, so use the model before its quantization"
            )
        return dtype

    def others(self, names: Iterable[str]) -> list[str]:
        """Return the sorted names of all tensors except those in ``names``."""
        return sorted(self._files.keys() - {self._known(name) for name in names})

    def _header(self, name: str) -> Any:
        """Return the tensor itself from a pickle file, or a slice object from a safetensors file."""
        name = self._known(name)
        path = self._files[name]
        if path.suffix != ".safetensors":
            return self._pickle(path)[name]
        with _opened(path) as file:
            return file.get_slice(name)

    def _known(self, name: str) -> str:
        return name if name in self._files else _NEWER_NAMES.get(name, name)

    def _list(self) -> dict[str, Path]:
        """Return the file of each tensor. Prefer the formats in the same order as transformers."""
        for name in ("model.safetensors", "pytorch_model.bin"):
            path = self.directory / name
            if path.is_file():
                return dict.fromkeys(self._names_in(path), path)
            index = self.directory / f"{name}.index.json"
            if index.is_file():
                files = {key: self.directory / file for key, file in _weight_map(index).items()}
                if absent := sorted({str(path) for path in files.values() if not path.is_file()}):
                    raise UserError(f"{absent[0]} is missing, but {index} lists it; download the model again")
                return files
        raise UserError(
            f"{self.directory} contains no weights (no model.safetensors); give the directory of a model"
        )

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
    """Open a safetensors file. Errors within the block are reported as damage to this file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); download it again") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a pickle file. ``weights_only`` makes torch reject all that could run code."""
    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:  # torch's message recommends loading the file without this protection
        raise UserError(
            f"{path} is damaged, or contains objects other than tensors, which could run code; get the model "
            "as safetensors"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot read {path} ({error}); get the model as safetensors") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} isn't a dictionary of tensors; get the model as safetensors")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in dict(found).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {index} ({error}); download the model again") from None


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the read and write permissions of its directory.

    safetensors itself makes the file readable only for its owner.
    """
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors in a safetensors file.

    Raises:
        UserError: the file is damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
