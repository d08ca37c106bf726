"""The pipeline steps of tools/preprocess_datatrove.py: tasks encode files, and a last one joins the results.

Only that tool imports this module, since datatrove is an optional dependency. The steps are in the package,
not in the tool, because datatrove pickles them for SLURM jobs, which must be able to import them.
"""

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer, MegatronTokenizedFile
from datatrove.utils.batching import batched
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, get_bin_path

from megatron_mesh.data.corpus import parse_chunk, read_chunks
from megatron_mesh.data.encode import choose_encoder, encode_texts, spot_check
from megatron_mesh.data.indexed import IndexedWriter, inspect_prefix
from megatron_mesh.data.preprocess import CHUNK_BYTES, CHUNKS_PER_CHECK
from megatron_mesh.data.tokenizer import build_tokenizer
from megatron_mesh.errors import UserError

_BATCH_DOCUMENTS = 256
_SAMPLE_DOCUMENTS, _SAMPLE_CHARACTERS = 64, 2048


class ReadCorpus(PipelineStep):
    """Reads the documents of this task's consecutive files. Tasks in order yield the order of the input."""

    name, type = "Read corpus", "Reader"

    def __init__(self, paths: list[Path], json_key: str, skip_broken: bool) -> None:
        super().__init__()
        self.paths, self.json_key, self.skip_broken = paths, json_key, skip_broken

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        mine = np.array_split(np.arange(len(self.paths)), world_size)[rank]
        chunks = chain.from_iterable(read_chunks(self.paths[i], CHUNK_BYTES) for i in mine)
        for chunk in chunks:
            parsed = parse_chunk(chunk, [self.json_key], skip_broken=self.skip_broken)
            self.stat_update("broken", value=len(parsed.broken))
            for text in filter(None, parsed.texts[0]):
                yield Document(text=text, id="")


class EncodeShard(MegatronDocumentTokenizer):
    """datatrove's writer of Megatron files, with our encoder and our token type."""

    def __init__(
        self, folder: str, tokenizer_type: str | None, tokenizer_model: str, append_eod: bool
    ) -> None:
        super().__init__(folder, tokenizer_name_or_path=tokenizer_model, eos_token=None)
        self.tokenizer_type, self.append_eod = tokenizer_type, append_eod

    def write_tokens(self, data: DocumentsPipeline, filename: str) -> MegatronTokenizedFile:
        """Encode ``data`` into FILENAME.bin and .idx in the output folder."""
        tokenizer = build_tokenizer(self.tokenizer_type, self.tokenizer_name_or_path)
        size = DType.size(DType.optimal_dtype(tokenizer.vocab_size))
        file = MegatronTokenizedFile(self.output_folder, filename, token_size=size)
        batches = batched(data, _BATCH_DOCUMENTS)
        first: list[Document] = next(batches, [])
        sample = [document.text[:_SAMPLE_CHARACTERS] for document in islice(first, _SAMPLE_DOCUMENTS)]
        encoder, _ = choose_encoder(tokenizer, sample)
        eod = [tokenizer.eod] if self.append_eod else []
        for number, batch in enumerate(chain([first] if first else [], batches)):
            texts = [document.text for document in batch]
            if number % CHUNKS_PER_CHECK == 0 and (part := spot_check(encoder, texts)):
                raise UserError(
                    f"gigatoken gives other ids than Hugging Face's tokenizers for {part!r}; use "
                    "tools/preprocess_data.py with --encoder reference"
                )
            encoded = encode_texts(encoder, texts)
            self.stat_update("cut", value=encoded.cut)
            for ids in np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1]):
                if len(ids):
                    file.write(np.append(ids, eod))
            self.stat_update("tokens", value=int(encoded.lengths.sum()))
        file.close()
        return file


class JoinShards(PipelineStep):
    """Joins the shards in ``folder``, in order, into PREFIX.bin and .idx. Runs as a single task."""

    name, type = "Join shards", "Writer"

    def __init__(self, folder: str, shards: int, prefix: str) -> None:
        super().__init__()
        self.folder, self.shards, self.prefix = folder, shards, prefix

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        # The names are those of datatrove's get_output_filename.
        shards = [str(Path(self.folder) / f"{shard:05d}_tokens") for shard in range(self.shards)]
        full = [shard for shard in shards if inspect_prefix(shard).sequences]
        if not full:
            raise UserError(
                f"the corpus is empty: none of the {len(shards)} shards in {self.folder} has text; check "
                "--input"
            )
        with IndexedWriter(self.prefix, IndexedDataset(full[0]).index.dtype) as writer:
            for shard in full:
                index = IndexedDataset(shard).index
                writer.add(np.memmap(get_bin_path(shard), index.dtype, mode="r"), index.sequence_lengths)
                self.stat_update("tokens", value=int(index.sequence_lengths.sum()))
            writer.commit()
