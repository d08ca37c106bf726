"""lm-eval's Hugging Face model, with clear errors instead of assertions. This module imports lm-eval."""

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from megatron_mesh.compat.lm_eval_internals import ChecksRequests
from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.results import check_answer_lengths


class CheckedHFLM(ChecksRequests, HFLM):
    """``HFLM`` that rejects answers longer than the model's sequences and can score packed text."""

    text_batch = 1
    """Batch size for packed text if the batch size is "auto", since lm-eval finds that only for its tasks."""

    @property
    def window(self) -> int:
        """Number of tokens that the model sees at once."""
        return self.max_length

    @torch.no_grad()
    def nats(self, windows: Tensor) -> float:
        """Return the summed negative log-likelihood of windows [B, S + 1], except their first tokens."""
        tokens = windows.to(self.device, torch.long)
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        # Convert one row at a time, since logits in float32 are large.
        rows = zip(logits, tokens[:, 1:], strict=True)
        return sum(F.cross_entropy(row.float(), labels, reduction="sum").item() for row, labels in rows)

    def check_requests(self, requests: Any) -> None:
        """Reject answers that are longer than the model's sequences."""
        check_answer_lengths(requests, self.window)


def open_hf_lm(directory: Path, *, trust_remote_code: bool, **how: Any) -> CheckedHFLM:
    """Load the model in ``directory``; ``how`` has ``HFLM``'s device, dtype, batch_size and max_length.

    Raises:
        UserError: the model cannot be loaded.
    """
    try:
        return CheckedHFLM(
            pretrained=str(directory.resolve()),  # a relative path could be mistaken for a model on the hub
            trust_remote_code=trust_remote_code,
            **how,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the model in {directory}: {error}") from error
