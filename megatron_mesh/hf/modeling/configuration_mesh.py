"""MeSH model configuration for Hugging Face transformers (4.57 and 5.x).

transformers imports this file of an export first, so the check of its version is here.
"""

import importlib
from pathlib import Path
from typing import Any

from transformers import GPTNeoXConfig
from transformers.utils.versions import require_version

from megatron_mesh.hf.modeling.versions import OLDEST, warn_if_untested

require_version(f"transformers>={OLDEST}", f"Install it: pip install 'transformers>={OLDEST}'")
warn_if_untested()


def _tensor_parallel_plan(stock: dict[str, str]) -> dict[str, str]:
    """Return GPT-NeoX's plan with its ``layers.*`` entries repeated for each of our lists of layers."""
    plan: dict[str, str] = {}
    for name, style in stock.items():
        prefix, found, rest = name.partition("layers.*.")
        if found:
            plan |= {f"{prefix}{part}.*.{rest}": style for part in ("prelude", "core", "cores.*", "coda")}
        else:
            plan[name] = style
    return plan


class MeshConfig(GPTNeoXConfig):
    """Configuration of a [`MeshModel`]: that of a GPT-NeoX, and of the loop over its core layers.

    ``num_hidden_layers`` cannot be set. It is always the unrolled depth, so that a cache has one entry for
    each layer in each loop.

    Args:
        recurrence (`str`, *optional*, defaults to `"mesh"`):
            Recurrence scheme, a key of `SCHEMES` in `schemes.py`, such as `"mesh"` or `"base"`.
        prelude_layers (`int`, *optional*, defaults to 1):
            Number of layers before the loop.
        core_layers (`int`, *optional*, defaults to 1):
            Number of layers in the core, which runs `num_loops` times.
        num_loops (`int`, *optional*, defaults to 2):
            Number of times that the core runs.
        coda_layers (`int`, *optional*, defaults to 1):
            Number of layers after the loop.
        trained_loops (`int`, *optional*, defaults to `num_loops`):
            Number of times that the core ran in training.
        mesh_slots (`int`, *optional*, defaults to 5):
            Number of slots of the memory, for schemes that have one.
        mesh_transition_query (`str`, *optional*, defaults to `"prelude-output"`):
            Input of the first cycle's routers: `"prelude-output"` or `"embedding"`.
        embedding_scale (`float`, *optional*, defaults to 1.0):
            Factor by which the token embedding is multiplied.
        kwargs:
            Further arguments of [`GPTNeoXConfig`].
    """

    model_type = "megatron_mesh"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    base_model_tp_plan = _tensor_parallel_plan(GPTNeoXConfig.base_model_tp_plan)
    # A token would have to pass through a stage once for each loop, which a plan cannot express.
    base_model_pp_plan = None  # type: ignore[assignment]

    def __init__(
        self,
        recurrence: str = "mesh",
        prelude_layers: int = 1,
        core_layers: int = 1,
        num_loops: int = 2,
        coda_layers: int = 1,
        trained_loops: int | None = None,
        mesh_slots: int = 5,
        mesh_transition_query: str = "prelude-output",
        embedding_scale: float = 1.0,
        **kwargs: Any,
    ):
        self.recurrence = recurrence
        self.prelude_layers = prelude_layers
        self.core_layers = core_layers
        self.num_loops = num_loops
        self.coda_layers = coda_layers
        self.trained_loops = num_loops if trained_loops is None else trained_loops
        self.mesh_slots = mesh_slots
        self.mesh_transition_query = mesh_transition_query
        self.embedding_scale = embedding_scale
        super().__init__(**{**kwargs, "num_hidden_layers": self.depth})

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "num_loops" and "num_hidden_layers" in self.__dict__:
            super().__setattr__("num_hidden_layers", self.depth)

    @property
    def depth(self) -> int:
        """Number of layers that a token passes through, counting the core once for each loop."""
        return self.prelude_layers + self.core_layers * self.num_loops + self.coda_layers

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the configuration and, next to it, the model's code. Saving a model calls this too.

        transformers only copies code that it loaded from a model's directory. If the classes come from the
        installed megatron_mesh, we have to write the code ourselves.
        """
        packaged = __name__.startswith("megatron_mesh.")
        # transformers reads the import statements of this file and expects every module in the model's
        # directory. An import by name escapes that.
        ship = importlib.import_module("megatron_mesh.hf.convert.ship") if packaged else None
        if ship is not None and not Path(save_directory).is_file():  # transformers reports a file as an error
            self.auto_map = dict(ship.AUTO_MAP)
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            for name, text in ship.sources().items():
                (Path(save_directory) / name).write_text(text, encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)
