"""The internals of lm-eval that compat uses."""

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest

from megatron_mesh.compat.lm_eval_internals import ChecksRequests, vllm_config, vllm_version

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)
FILES = Path(importlib.util.find_spec("lm_eval").origin).parent
VLLM = (FILES / "models/vllm_causallms.py").read_text(encoding="utf-8")


def test_requests_are_checked_before_they_are_scored() -> None:
    from lm_eval.api.model import TemplateLM

    calls = []

    class Model(TemplateLM):
        eot_token_id = 0

        def tok_encode(self, string, **kwargs):
            return [1] * len(string)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return []

        def generate_until(self, requests, disable_tqdm=False):
            return []

        def _loglikelihood_tokens(self, requests, **kwargs):
            calls.append("scored")
            return [(0.0, True)] * len(requests)

    class Checked(ChecksRequests, Model):
        def check_requests(self, requests):
            calls.append(len(requests))

    request = type("Request", (), {"args": ("question", "answer")})()
    assert Checked().loglikelihood([request]) == [(0.0, True)]
    assert calls == [1, "scored"]


def test_the_vllm_model_has_a_configuration() -> None:
    """vLLM may not be installed, so its class is read instead of imported."""
    assert any(
        isinstance(node, ast.Attribute) and ast.unparse(node) == "self._config"
        for node in ast.walk(ast.parse(VLLM))
    )
    assert vllm_config(type("VLLM", (), {"_config": 3})) == 3


def test_the_version_of_vllm_is_found_inside_only() -> None:
    assert "from importlib.metadata import version" in VLLM
    real = importlib.metadata.version
    with vllm_version("0.99"):
        assert importlib.metadata.version("vllm") == "0.99"
        assert importlib.metadata.version("torch") == real("torch")
    assert importlib.metadata.version is real
