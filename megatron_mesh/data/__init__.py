"""Text becomes an indexed data set, and an indexed data set becomes micro-batches.

In: JSON Lines or plain text, and a tokenizer. Out: ``.bin/.idx`` files, and from them ``Batch`` objects in
an order that depends on data and seed alone. Start with ``preprocess.py`` for the first half and
``datasets.py`` for the second.
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
