"""Megatron-style pretraining of recursive (looped) transformers, with MeSH at its heart.

Importing the package changes nothing outside of it; programs that train call ``compat.install()`` first.
"""

__version__ = "0.1.0"
