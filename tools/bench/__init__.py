"""Benchmarks: commands that time and count what a part of the project does, next to a baseline.

Each is run as a module from the root of a clone, for example ``python -m tools.bench.steps --help``. Start
reading at ``steps.py``. The wheel doesn't contain them.
"""

# The benchmarks import Megatron-core at the top, so what it needs beforehand happens here.
import megatron_mesh  # noqa: F401
