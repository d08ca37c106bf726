"""A stand-in for Transformer Engine 2.11, for tests on machines without a GPU.

Its modules compute in plain torch and keep what Transformer Engine documents of ``is_first_microbatch``,
``fuse_wgrad_accumulation`` and FP8: enough for Megatron-core's real wrappers to run. One process, no tensor
parallelism. Nothing here is Transformer Engine's code, and its numbers are not those of a GPU.
"""

from transformer_engine import common, pytorch

__version__ = "2.11.0"
__all__ = ["common", "pytorch"]
