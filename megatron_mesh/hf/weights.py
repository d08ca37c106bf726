"""The weights in a Hugging Face directory, read one tensor at a time."""

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

# Names of newer versions of transformers for those of released checkpoints.
_OTHER_NAMES = {"embed_out.weight": "lm_head.weight"}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""safetensors' names of what we can convert."""
TRAINING_ONLY = Path("training_only")
"""Directory in an export for tensors that only the way back to training needs.

Engines such as vLLM load every safetensors file beside config.json, so these lie below. The name must not be
this package's: Python would take the directory for it when it is started there.
"""


class Weights:
    """Tensors by name, from safetensors or from torch's files, whose code is never run.

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
            UserError: it is not float32, bfloat16 or float16. The weights are quantized, then.
        """
        found = self._header(name)
        dtype = found.dtype if isinstance(found, Tensor) else found.get_dtype()
        if isinstance(dtype, str):
            dtype = _DTYPES.get(dtype, dtype)
        if dtype not in _DTYPES.values():
            raise UserError(
                f"{self.directory}: {name} has dtype {str(dtype).removeprefix('torch.')}; only weights in "
                "float32, bfloat16 or float16 can be converted, so get the model before quantization"
            )
        return dtype

    def others(self, names: Iterable[str]) -> list[str]:
        """Return the sorted names of all tensors but those in ``names``."""
        return sorted(self._files.keys() - {self._known(name) for name in names})

    def _header(self, name: str) -> Any:
        """Return a tensor of a pickle, or the unread slice of one in a safetensors file."""
        name = self._known(name)
        path = self._files[name]
        if path.suffix != ".safetensors":
            return self._pickle(path)[name]
        with _opened(path) as file:
            return file.get_slice(name)

    def _known(self, name: str) -> str:
        return name if name in self._files else _OTHER_NAMES.get(name, name)

    def _list(self) -> dict[str, Path]:
        """Return the file of each tensor; of several sets of files, those that transformers takes."""
        for name in ("model.safetensors", "pytorch_model.bin"):
            path = self.directory / name
            if path.is_file():
                return dict.fromkeys(self._names_in(path), path)
            index = self.directory / f"{name}.index.json"
            if index.is_file():
                files = {key: self.directory / file for key, file in _weight_map(index).items()}
                if absent := sorted({str(path) for path in files.values() if not path.is_file()}):
                    raise UserError(f"{absent[0]} is missing, and {index} names it; download the model again")
                return files
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
    """Open a safetensors file. Errors within the block are the file's."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); download it again") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the tensors in a file of torch's; torch creates only tensors and plain values from it."""
    try:
        content = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except pickle.UnpicklingError:  # whose message advises to run what is in the file
        raise UserError(
            f"{path} is damaged, or holds more than tensors, which could run code; get the model as "
            "safetensors"
        ) from None
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); get the model as safetensors") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} holds no tensors by name; get the model as safetensors")
    return content


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in dict(found).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} cannot be read ({error}); download the model again") from None


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that everyone who may read its directory may read.

    safetensors itself lets only the owner read it.
    """
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        UserError: it is damaged.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
