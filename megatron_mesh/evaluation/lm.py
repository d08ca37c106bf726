"""lm-eval's Hugging Face model, with clear errors in place of lm-eval's assertions. Imports lm-eval."""

from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from megatron_mesh.compat.lm_eval_internals import ChecksRequests
from megatron_mesh.errors import UserError
from megatron_mesh.evaluation.results import refuse_long_answers


class CheckedHFLM(ChecksRequests, HFLM):
    """``HFLM`` that refuses answers longer than the model's sequences, and measures packed text."""

    text_batch = 1
    """Windows of packed text at a time if the batch size is "auto", which lm-eval finds for its requests."""

    @property
    def window(self) -> int:
        """Tokens that the model sees at once."""
        return self.max_length

    @torch.no_grad()
    def nats(self, windows: Tensor) -> float:
        """Negative log-likelihood of windows [B, S + 1], each token given those before it, summed."""
        tokens = windows.to(self.device, torch.long)
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        # One row at a time: logits in fp32 are large.
        rows = zip(logits, tokens[:, 1:], strict=True)
        return sum(F.cross_entropy(row.float(), labels, reduction="sum").item() for row, labels in rows)

    def check_requests(self, requests: Any) -> None:
        """Refuse long answers."""
        refuse_long_answers(requests, self.window)


def open_lm(directory: Path, *, trust_remote_code: bool, **how: Any) -> CheckedHFLM:
    """Read the model in ``directory``; ``how`` as in ``HFLM``: device, dtype, batch_size, max_length.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return CheckedHFLM(
            pretrained=str(directory.resolve()),  # a relative path could be taken for a name on the hub
            trust_remote_code=trust_remote_code,
            **how,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"the model in {directory} cannot be read: {error}") from error
