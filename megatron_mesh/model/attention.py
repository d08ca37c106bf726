"""Reconcile ``--attention-backend`` with the environment variables that Transformer Engine reads.

Megatron-core turns the setting into three variables (``language_module.py: _set_attention_backend``) and
asserts that none of them has another value. So we read what the user has set, unset the variables, and
derive the setting from them if it is ``auto``.
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

_BACKENDS = {
    ("1", "1", "1"): "auto",
    ("1", "1", "0"): "auto",  # auto uses unfused attention only if there is nothing else
    ("1", "0", "1"): "flash",
    ("0", "1", "1"): "fused",
    ("1", "0", "0"): "flash",
    ("0", "1", "0"): "fused",
    ("0", "0", "1"): "unfused",
    ("0", "0", "0"): "local",
}
# Read at import, because every model that is built sets them anew.
_SET_BY_USER = {name: os.environ[name] for name in ATTENTION_SWITCHES if name in os.environ}


def attention_backend(
    setting: str, *, te_layers: bool, variables: Mapping[str, str] = _SET_BY_USER
) -> AttnBackend:
    """Return the next model's attention backend, and unset the variables for Megatron-core to set.

    Args:
        setting: ``attention_backend`` from the settings.
        te_layers: whether the layers are Transformer Engine's. The variables don't affect others.
        variables: Transformer Engine's variables as set by the user; missing ones count as 1.

    Raises:
        UserError: a variable that takes effect is neither 0 nor 1.
    """
    clear_attention_switches()
    if not variables:
        return AttnBackend[setting]
    found = ", ".join(f"{name}={value}" for name, value in variables.items())
    if not te_layers:
        _warn_once(f"ignoring {found} from the environment, because the layers are not Transformer Engine's")
        return AttnBackend[setting]
    implied = _BACKENDS.get(tuple(variables.get(name, "1") for name in ATTENTION_SWITCHES))  # type: ignore[arg-type]
    if setting != "auto":
        if implied != setting:
            _warn_once(f"ignoring {found} from the environment, because --attention-backend is {setting}")
        return AttnBackend[setting]
    if implied is None:
        raise UserError(f"{found} in the environment: each must be 0 or 1; correct or unset it")
    _warn_once(f"{found} in the environment: using --attention-backend {implied}")
    return AttnBackend[implied]


@functools.cache
def _warn_once(text: str) -> None:
    if is_rank_zero():
        logger.warning(text)
