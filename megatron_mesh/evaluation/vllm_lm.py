"""lm-eval's vLLM model, set up so that it scores what ``CheckedHFLM`` scores. Imports lm-eval and vLLM.

An engine of vLLM generates at least one token after a prompt, so lm-eval's class scores windows that are two
tokens shorter than those of its Hugging Face class. Here the engine's sequences are two tokens longer
instead. Rotary embeddings are defined at those positions, and no score depends on them.
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
from megatron_mesh.evaluation.results import refuse_long_answers

with vllm_version(vllm.__version__):
    from lm_eval.models.vllm_causallms import VLLM

_EXTRA = 2
_AUTO_SEQUENCES = 64


class CheckedVLLM(ChecksRequests, VLLM):
    """``VLLM`` that refuses answers longer than the model's sequences, and measures packed text."""

    text_batch = _AUTO_SEQUENCES
    """Windows of packed text at a time if the batch size is "auto"."""

    @property
    def window(self) -> int:
        """Tokens that the model sees at once."""
        return self.max_length - _EXTRA

    @property
    def config(self) -> Any:
        """The model's configuration, under the name that it has in ``HFLM``."""
        return vllm_config(self)

    def nats(self, windows: Tensor) -> float:
        """Negative log-likelihood of windows [B, S + 1], each token given those before it, summed."""
        params = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [vllm.TokensPrompt(prompt_token_ids=window) for window in windows.tolist()]
        total = 0.0
        for output in self.model.generate(prompts, params, use_tqdm=False):
            scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
            total -= math.fsum(found[token].logprob for token, found in scored)
        return total

    def check_requests(self, requests: Any) -> None:
        """Refuse long answers."""
        refuse_long_answers(requests, self.window)


@contextmanager
def open_lm(
    directory: Path,
    *,
    trust_remote_code: bool,
    dtype: str,
    batch_size: int | str,
    max_length: int | None,
) -> Iterator[CheckedVLLM]:
    """An engine that serves the model in ``directory``, until the end of the block.

    Args:
        directory: a Hugging Face model with its tokenizer.
        trust_remote_code: run the code that it brings.
        dtype: "auto" is the one that the model is stored in (vLLM's own "auto" halves fp32).
        batch_size: sequences at a time; "auto" for as many as are good.
        max_length: tokens that the model sees at once; None for the model's own.

    Raises:
        UserError: vLLM cannot serve this model, or not at this length.
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
            batch_size="auto",  # all requests go to the engine, which makes its own batches
            max_num_seqs=sequences,
            hf_overrides=_longer(config, window),
            enforce_eager=True,  # nothing is decoded, and decoding is what graphs are captured for
            kv_cache_memory_bytes=_cpu_cache_bytes(config, window, sequences),
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: an engine process ended
        cause = " ".join(str(error).split())
        raise UserError(f"vLLM cannot serve {directory}: {cause} (--engine transformers may)") from error
    try:
        yield lm
    finally:
        lm.model.llm_engine.engine_core.shutdown()


def _longer(config: Any, window: int) -> dict[str, int]:
    """Have the model take two tokens more than ``window``. Raises UserError if it cannot."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if limit is None or window + _EXTRA <= limit:
        return {}
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        raise UserError(
            f"--engine vllm needs {_EXTRA} positions beyond a sequence, and this model has {limit} without "
            f"plain rotary embeddings; give --max-length {limit - _EXTRA}"
        )
    return {"max_position_embeddings": window + _EXTRA}


def _cpu_cache_bytes(config: Any, window: int, sequences: int) -> int | None:
    """Memory for keys and values on a CPU, of which vLLM would otherwise take nearly all; None on a GPU."""
    if not current_platform.is_cpu() or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return None
    text = config.get_text_config()
    block = 128  # tokens that vLLM allocates at a time
    tokens = sequences * block * (math.ceil((window + _EXTRA) / block) + 1)
    return tokens * text.num_hidden_layers * text.hidden_size * 2 * 4
