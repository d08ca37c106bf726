"""Data: raw text goes in, and is stored as indexed data sets; micro-batches for each rank come out.

Start reading in ``preprocess.py`` for the way from text to indexed data, and in ``datasets.py`` for the way
from there to batches.
"""

from megatron_mesh.data.datasets import Datasets, build_datasets
from megatron_mesh.data.loader import Batch, build_loader
from megatron_mesh.data.stream import SampleStream
from megatron_mesh.data.tokenizer import Tokenizer, build_tokenizer, check_vocab

__all__ = [
    "Batch",
    "Datasets",
    "SampleStream",
    "Tokenizer",
    "build_datasets",
    "build_loader",
    "build_tokenizer",
    "check_vocab",
]
