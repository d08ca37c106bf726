"""Pretraining of recursive (looped) transformers, and MeSH in particular, on Megatron-core."""

import warnings

from megatron_mesh.runtime import late_compile, unusable_imports

__version__ = "0.1.0"

# Megatron-core warns in every process and from five modules that Transformer Engine and apex are missing. The
# log says it once (runtime/device.py: describe), so drop these warnings and no others.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed. Falling back to Torch Norm",
    "The following imports from `dynamic_context.py` will be removed",
):
    warnings.filterwarnings("ignore", message=_message)

# Before anything imports Megatron-core:
unusable_imports.install()
late_compile.install()
