"""Which attention the layers compute with: ``--attention-backend``, and Transformer Engine's own switches.

Megatron-core turns the setting into three environment variables that Transformer Engine reads
(``language_module.py: _set_attention_backend``), and ends with an assertion if one of them has another value.
Here the values that the user has set are read first, and taken for the setting that they amount to.
"""

import functools
import logging
import os
from collections.abc import Mapping

from megatron.core.transformer.enums import AttnBackend

from megatron_mesh.compat.megatron_model import ATTENTION_SWITCHES, clear_attention_switches
from megatron_mesh.errors import UserError
from megatron_mesh.runtime.distributed import is_rank_zero

logger = logging.getLogger(__name__)

_MEANING = {
    ("1", "1", "1"): "auto",
    ("1", "1", "0"): "auto",  # which takes the unfused one only if it has no other
    ("1", "0", "1"): "flash",
    ("0", "1", "1"): "fused",
    ("1", "0", "0"): "flash",
    ("0", "1", "0"): "fused",
    ("0", "0", "1"): "unfused",
    ("0", "0", "0"): "local",
}
# Read once: every model that is built sets them anew.
_FROM_USER = {name: os.environ[name] for name in ATTENTION_SWITCHES if name in os.environ}


def attention_backend(
    asked: str, *, te_layers: bool, switches: Mapping[str, str] = _FROM_USER
) -> AttnBackend:
    """The attention of the next model, and room for the switches that Megatron-core sets for it.

    Args:
        asked: ``attention_backend`` of the settings.
        te_layers: whether the layers are Transformer Engine's; the switches mean nothing to others.
        switches: Transformer Engine's, as the user has set them; each is 1 where it is absent.

    Raises:
        UserError: a switch that counts is neither 0 nor 1.
    """
    clear_attention_switches()
    if not switches:
        return AttnBackend[asked]
    words = ", ".join(f"{name}={value}" for name, value in switches.items())
    if not te_layers:
        _say_once(f"{words} in the environment: ignored, since the layers are not Transformer Engine's")
        return AttnBackend[asked]
    meant = _MEANING.get(tuple(switches.get(name, "1") for name in ATTENTION_SWITCHES))  # type: ignore[arg-type]
    if asked != "auto":
        if meant != asked:
            _say_once(f"{words} in the environment: ignored, since --attention-backend is {asked}")
        return AttnBackend[asked]
    if meant is None:
        raise UserError(f"{words} in the environment: each must be 0 or 1; unset it")
    _say_once(f"{words} in the environment: taken for --attention-backend {meant}")
    return AttnBackend[meant]


@functools.cache
def _say_once(text: str) -> None:
    if is_rank_zero():
        logger.warning(text)
