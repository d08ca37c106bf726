"""Configuration of a MeSH model for Hugging Face transformers (4.57 and 5.x).

transformers imports this file of an export first, so this is where a version that doesn't fit is reported.
"""

import importlib
from pathlib import Path
from typing import Any

from transformers import GPTNeoXConfig
from transformers.utils.versions import require_version

from megatron_mesh.hf.versions import OLDEST, warn_if_untested

require_version(f"transformers>={OLDEST}", f"Install it: pip install 'transformers>={OLDEST}'")
warn_if_untested()


def _tensor_parallel_plan(stock: dict[str, str]) -> dict[str, str]:
    """How tensor parallelism divides our modules, by GPT-NeoX's plan for ``layers.*``."""
    plan: dict[str, str] = {}
    for name, style in stock.items():
        place, found, rest = name.partition("layers.*.")
        if found:
            plan |= {f"{place}{part}.*.{rest}": style for part in ("prelude", "core", "cores.*", "coda")}
        else:
            plan[name] = style
    return plan


class MeshConfig(GPTNeoXConfig):
    """``GPTNeoXConfig`` plus the loop.

    ``num_hidden_layers`` follows from the rest: it is the unrolled depth, so that a cache has an entry for
    every layer of every iteration.

    Args:
        recurrence: scheme, e.g. "mesh" or "base" (``schemes.py``).
        prelude_layers, core_layers, coda_layers: layers before the loop, of the core, and after the loop.
        num_loops: how often the core runs.
        trained_loops: how often it ran in training.
        mesh_slots: slots N of the memory.
        mesh_transition_query: what the first cycle's routers look at, "prelude-output" or "embedding".
        embedding_scale: factor on the token embedding.
        kwargs: as in ``GPTNeoXConfig``.
    """

    model_type = "megatron_mesh"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    base_model_tp_plan = _tensor_parallel_plan(GPTNeoXConfig.base_model_tp_plan)
    base_model_pp_plan = None  # type: ignore[assignment]  # a stage would need its part of the core K times, in turn

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
        """Layers that a token passes."""
        return self.prelude_layers + self.core_layers * self.num_loops + self.coda_layers

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, with the model's code beside config.json. Saving a model calls this.

        transformers copies only code that it loaded from a directory, so this copies the package's.
        """
        packaged = __name__.startswith("megatron_mesh.")
        # By name: transformers would want a file of every import statement in a model's directory.
        ship = importlib.import_module("megatron_mesh.hf.ship") if packaged else None
        if ship is not None:
            self.auto_map = dict(ship.AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)
        for name, text in ship.sources().items() if ship is not None else ():
            (Path(save_directory) / name).write_text(text, encoding="utf-8")
