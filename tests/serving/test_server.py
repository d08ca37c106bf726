"""Converting, serving and querying a model with the README's three commands, as a user runs them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_mesh.data.tokenizer import build_tokenizer
from tests.serving.models import LENGTH, by_transformers, sharpen

ROOT = Path(__file__).resolve().parents[2]
TEXT = "def forward(self, hidden_states: Tensor) -> Tensor:\n    return"
NEW_TOKENS = 16
_START_SECONDS = 240


@contextmanager
def serving(arguments: list[str], port: int, cwd: Path) -> Iterator[None]:
    """Run ``vllm serve`` until the end of the block, and leave no process behind."""
    log = cwd / "server.log"
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [str(Path(sys.executable).parent / "vllm"), "serve", *arguments, "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            _wait_until_healthy(server, port, log)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            _end_group(server)


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + _START_SECONDS
    while subprocess.run(["curl", "-sf", f"http://127.0.0.1:{port}/health"]).returncode:
        assert server.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(1)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """Give all processes of the server a minute to free their shared memory, then kill them."""
    with suppress(ProcessLookupError):
        for _ in range(600):
            server.poll()
            os.killpg(server.pid, 0)
            time.sleep(0.1)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait(30)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def ask(port: int, **request: Any) -> dict[str, Any]:
    """Send a request with curl and return the response."""
    url = f"http://127.0.0.1:{port}/v1/completions"
    header = "Content-Type: application/json"
    done = subprocess.run(
        ["curl", "-s", url, "-H", header, "-d", json.dumps(request)],
        capture_output=True,
        check=True,
        timeout=120,
    )
    return dict(json.loads(done.stdout))


@pytest.fixture
def my_model(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A mesh model written by tools/convert_to_hf.py."""
    tool = str(ROOT / "tools/convert_to_hf.py")
    command = [sys.executable, tool, "--load", str(checkpoint("mesh")), "--save", "my-model"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    sharpen(tmp_path / "my-model")
    return tmp_path / "my-model"


@pytest.mark.short
def test_convert_serve_ask(my_model: Path) -> None:
    ids = build_tokenizer(None, str(my_model / "tokenizer.json")).tokenize(TEXT)
    expected = by_transformers(my_model, [ids], NEW_TOKENS)[0]
    port = free_port()
    with serving(["my-model", "--trust-remote-code", "--dtype", "float32"], port, my_model.parent):
        answer = ask(
            port,
            model="my-model",
            prompt=TEXT,
            max_tokens=NEW_TOKENS,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )
        refused = ask(port, model="my-model", prompt=TEXT, max_tokens=100_000)
    choice = answer["choices"][0]
    assert choice["prompt_token_ids"] == ids, "the same ids as in training, without additional tokens"
    assert choice["token_ids"] == expected.tokens
    assert answer["usage"]["completion_tokens"] == NEW_TOKENS and isinstance(choice["text"], str)
    assert f"max_model_len={LENGTH}" in refused["error"]["message"]
    with socket.socket() as port_is_free:
        port_is_free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port_is_free.bind(("127.0.0.1", port))
