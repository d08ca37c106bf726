"""Pretrain recursive (looped) transformers on Megatron-core, with MeSH at the heart.

Settings and text go in; checkpoints, metrics and Hugging Face models come out. Start with
``train/loop.py``, or read "How a token travels through the code" in CONTRIBUTING.md. Importing the package
changes nothing outside of it; programs that train call ``compat.install()`` first.
"""

__version__ = "0.1.0"
