"""The weights in a Hugging Face directory, read one tensor at a time."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
        self._files = self._list()
        self._pickles: dict[Path, dict[str, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return self._known(name) in self._files

    def __getitem__(self, name: str) -> Tensor:
        name = self._known(name)
        path = self._files[name]
        if path.suffix != ".safetensors":
            return self._pickle(path)[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); get it anew") from None

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        name = self._known(name)
        path = self._files[name]
        if path.suffix != ".safetensors":
            return tuple(self._pickle(path)[name].shape)
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def _known(self, name: str) -> str:
        return name if name in self._files else _OTHER_NAMES.get(name, name)

    def _list(self) -> dict[str, Path]:
        for name in ("model.safetensors", "pytorch_model.bin"):
            index = self.directory / f"{name}.index.json"
            if index.is_file():
                places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                files = {key: self.directory / file for key, file in places.items()}
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
            return list(torch.load(path, weights_only=True, mmap=True))
        try:
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({error}); get it anew") from None

    def _pickle(self, path: Path) -> dict[str, Tensor]:
        if path not in self._pickles:
            self._pickles[path] = torch.load(path, weights_only=True, mmap=True)
        return self._pickles[path]
