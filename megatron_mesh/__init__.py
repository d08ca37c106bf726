"""Megatron-style pretraining of recursive (looped) transformers, with MeSH at its heart."""

import warnings

from megatron_mesh.compat import imports as unusable_imports
from megatron_mesh.compat import late_compile

__version__ = "0.1.0"

# Megatron-core says in every process and in five modules that Transformer Engine and apex are absent.
# We say it once (runtime/device.py: describe), so those messages, and only those, are dropped here.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    "The following imports from `dynamic_context.py` will be removed",
):
    warnings.filterwarnings("ignore", message=_message)

# Before anything imports Megatron-core:
unusable_imports.install()
late_compile.install()
