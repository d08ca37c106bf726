"""lm-eval's Hugging Face model, with a clear word where lm-eval has an assertion. Imports lm-eval."""

from typing import Any

from lm_eval.models.huggingface import HFLM

from megatron_mesh.evaluation.results import TooLong


class CheckedHFLM(HFLM):
    """Refuses an answer that is longer than the model's sequences."""

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        longest = max(len(answer) for _, _, answer in requests)
        if longest > self.max_length:
            raise TooLong(longest, self.max_length)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)
