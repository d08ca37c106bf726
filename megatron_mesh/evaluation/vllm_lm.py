"""lm-eval's vLLM model, with the same scores as ``CheckedHFLM``. This module imports lm-eval and vLLM.

vLLM generates at least one token after a prompt. Therefore the windows of lm-eval's class for vLLM are two
tokens shorter than those of its Hugging Face class. We make the engine's sequences two tokens longer instead.
This doesn't change any score, and rotary embeddings are defined at the additional positions.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vllm
from lm_eval.models.utils import DEFAULT_MAX_LENGTH, resolve_max_length
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from vllm.platforms import current_platform

from megatron_mesh.compat.lm_eval_internals import ChecksRequests, vllm_config, vllm_version
from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.results import check_answer_lengths

with vllm_version(vllm.__version__):
    from lm_eval.models.vllm_causallms import VLLM

_EXTRA = 2
_AUTO_SEQUENCES = 64


class CheckedVLLM(ChecksRequests, VLLM):
    """``VLLM`` that rejects answers longer than the model's sequences and can score packed text."""

    text_batch = _AUTO_SEQUENCES
    """Batch size for packed text if the batch size is "auto"."""

    @property
    def window(self) -> int:
        """Number of tokens that the model sees at once."""
        return self.max_length - _EXTRA

    @property
    def config(self) -> Any:
        """The model's configuration, under the same name as in ``HFLM``."""
        return vllm_config(self)

    def nats(self, windows: Tensor) -> float:
        """Return the summed negative log-likelihood of windows [B, S + 1], except their first tokens."""
        params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [vllm.TokensPrompt(prompt_token_ids=window) for window in windows.tolist()]
        total = 0.0
        for output in self.model.generate(prompts, params, use_tqdm=False):
            scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            total -= math.fsum(found[token].logprob for token, found in scored)
        return total

    def check_requests(self, requests: Any) -> None:
        """Reject answers that are longer than the model's sequences."""
        check_answer_lengths(requests, self.window)


@contextmanager
def open_vllm_lm(
    directory: Path,
    *,
    trust_remote_code: bool,
    dtype: str,
    batch_size: int | str,
    max_length: int | None,
) -> Iterator[CheckedVLLM]:
    """Start an engine with the model in ``directory``, and stop it at the end of the block.

    Args:
        directory: a Hugging Face model with its tokenizer.
        trust_remote_code: run code in the directory.
        dtype: dtype of the model; "auto" is that of the stored weights (vLLM's own "auto" casts float32 to 16
            bits).
        batch_size: number of sequences at a time, or "auto".
        max_length: number of tokens that the model sees at once (default: the model's).

    Raises:
        UserError: vLLM cannot serve this model, or not with this length.
    """
    path = str(directory.resolve())
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        window = max_length or resolve_max_length(config, tokenizer, default=DEFAULT_MAX_LENGTH)
        sequences = _AUTO_SEQUENCES if batch_size == "auto" else int(batch_size)
        lm = CheckedVLLM(
            pretrained=path,
            trust_remote_code=trust_remote_code,
            dtype=str(config.dtype or "auto").removeprefix("torch.") if dtype == "auto" else dtype,
            max_model_len=window + _EXTRA,
            batch_size="auto",  # send all requests to the engine, which batches them itself
            max_num_seqs=sequences,
            hf_overrides=_lengthen(config, window),
            enforce_eager=True,  # graph capture would only speed up decoding, and nothing is decoded
            kv_cache_memory_bytes=_cpu_cache_bytes(config, window, sequences),
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: an engine process ended
        cause = " ".join(str(error).split())
        raise UserError(f"vLLM cannot serve {directory} ({cause}); try --engine transformers") from error
    try:
        yield lm
    finally:
        lm.model.llm_engine.engine_core.shutdown()


def _lengthen(config: Any, window: int) -> dict[str, int]:
    """Return config overrides that allow ``window`` + 2 tokens. Raise UserError if that is impossible."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or window + _EXTRA <= limit:
        return {}
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        raise UserError(
            f"--engine vllm needs {_EXTRA} positions after each sequence, but this model has only {limit} "
            f"positions, and its position embeddings cannot be extended; use --max-length {limit - _EXTRA}"
        )
    return {"max_position_embeddings": window + _EXTRA}


def _cpu_cache_bytes(config: Any, window: int, sequences: int) -> int | None:
    """Return the size of the KV cache on a CPU, or None on a GPU.

    By default, vLLM would allocate nearly all memory of the machine.
    """
    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    text = config.get_text_config()
    block = 128  # tokens that vLLM allocates at a time
    tokens = sequences * block * (math.ceil((window + _EXTRA) / block) + 1)
    return tokens * text.num_hidden_layers * text.hidden_size * 2 * 4
