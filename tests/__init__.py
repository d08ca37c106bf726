"""Tests of the package."""

import megatron_mesh  # noqa: F401  # before Megatron-core in every process, also one that a test starts
