"""Benchmarks: commands that time and count what a part of the project does, next to a baseline.

Each is run as a module from the root of a clone, for example ``python -m tools.bench.steps --help``. Start
reading at ``steps.py``. The wheel doesn't contain them.
"""

from megatron_mesh import compat

# The benchmarks import Megatron-core at the top, so this comes before them.
compat.check_versions()
compat.install()
