"""`luthier serve` as a process: what it refuses before a model is loaded, what it says, and how it ends."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from tests import tiny
from tests.cli.command import Command
from tests.cli.conftest import luthier
from tests.serve.world import write_adapter

__all__ = ["luthier"]

KEY = "0123456789abcdef0123"
ENDLESS = {"prompt": "The quick", "max_tokens": 60_000, "temperature": 0}


class Process:
    """`luthier serve …`, up; `url` is what it said."""

    def __init__(self, words: tuple[object, ...], environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "luthier", "serve", *map(str, words), "--port", "0"]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
        )
        self.said = self.until("-d '")
        found = re.search(r"serving on (\S+)", self.said)
        assert found is not None, self.said
        self.url = found[1]

    def until(self, text: str, seconds: float = 60) -> str:
        """What it says, until `text` is in it."""
        assert self.process.stderr is not None
        number, said, end = self.process.stderr.fileno(), "", time.monotonic() + seconds
        while text not in said:
            left = end - time.monotonic()
            assert left > 0, said
            if select.select([number], [], [], left)[0]:
                piece = os.read(number, 4096).decode()
                assert piece, said
                said += piece
        return said

    def ended(self) -> tuple[int, str]:
        """Its exit code, and what it said since."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said.decode()


@contextmanager
def process(*words: object, **environment: str) -> Iterator[Process]:
    found = Process(words, environment)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.process.kill()
            found.process.communicate()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("stop") / "long", max_position_embeddings=2**16)


def ask(url: str, tokens: int = 3, **more: object) -> httpx.Response:
    body = {"model": "long", **ENDLESS, "max_tokens": tokens, **more}
    return httpx.post(f"{url}/completions", json=body, timeout=60)


def test_answers_under_way_end_and_the_code_is_0(long: Path) -> None:
    with process(long, "--max-tokens", 60_000) as found:
        with httpx.stream(
            "POST", f"{found.url}/completions", json={"model": "long", **ENDLESS, "max_tokens": 3000, "stream": True}
        ) as response:
            lines = response.iter_lines()
            next(lines)
            found.process.send_signal(signal.SIGTERM)
            assert "SIGTERM: no new requests; 30 s for those under way" in found.until("SIGTERM")
            assert list(lines)[-2] == "data: [DONE]"
            assert response.status_code == 200
        code, said = found.ended()
        assert (code, said) == (0, "")
        with pytest.raises(httpx.ConnectError):
            ask(found.url)


@pytest.mark.parametrize("again", [False, True], ids=["grace", "second signal"])
def test_answers_that_take_longer_are_told_so_and_the_code_is_75(long: Path, again: bool) -> None:
    with process(long, "--max-tokens", 60_000, "--grace", 60 if again else 0.5) as found:
        client = openai.OpenAI(base_url=found.url, api_key="none", max_retries=0)
        stream = client.completions.create(model="long", **ENDLESS, stream=True)  # type: ignore[call-overload]
        assert next(stream).choices
        found.process.send_signal(signal.SIGINT)
        found.until("SIGINT: no new requests")
        if again:
            time.sleep(0.3)
            found.process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="The server is stopping"):
            list(stream)
        code, said = found.ended()
        assert code == 75, said
        assert "1 requests were cut off" in said.replace("\n", " ")
        assert "Traceback" not in said


def test_with_nothing_under_way_it_ends_at_once(long: Path) -> None:
    with process(long, "--log", LUTHIER_API_KEY=KEY) as found:
        assert "$LUTHIER_API_KEY" in found.said
        assert KEY not in found.said
        assert ask(found.url).status_code == 401
        assert httpx.get(f"{found.url}/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
        found.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        code, said = found.ended()
        assert code == 0
        assert time.monotonic() - began < 10
        assert "POST /v1/completions 401" in said
        assert "GET /v1/models 200" in said


def test_a_run_is_served_with_its_base_and_more_adapters(long: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two"), 1):
        write_adapter(long, tmp_path / name, seed)
    with process(tmp_path / "one", "--adapter", f"second={tmp_path / 'two'}") as found:
        assert "models: one, second, long" in found.said
        client = openai.OpenAI(base_url=found.url, api_key="none", max_retries=0)
        texts = {
            model.id: client.completions.create(model=model.id, prompt="The quick", temperature=0).choices[0].text
            for model in client.models.list()
        }
        assert list(texts) == ["one", "second", "long"]
        assert len(set(texts.values())) == 3
        found.process.send_signal(signal.SIGTERM)
        assert found.ended()[0] == 0


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(luthier: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = luthier("serve", "sprig", "--port", port)
    assert ended.code == 2
    assert f"port {port} of 127.0.0.1 is taken" in ended.message
    assert "--port" in ended.message
    assert "loading" not in ended.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nowhere",), "there is no nowhere"),
        (("sprig", "--host", "0.0.0.0"), "can be reached from other machines, and there is no key"),  # noqa: S104
        (("sprig", "--host", "no.such.host.invalid"), "there is no such address"),
        (("sprig", "--host", "203.0.113.9"), "cannot be listened on"),
        (("sprig", "--port", "70000"), "--port"),
        (("sprig", "--slots", "0"), "--slots"),
        (("sprig", "--timeout", "0"), "--timeout is 0.0"),
        (("sprig", "--timeout", "nan"), "--timeout is nan"),
        (("sprig", "--grace", "-1"), "--grace is -1"),
        (("sprig", "--adapter", "runs/one"), "is no NAME=PATH"),
        (("sprig", "--adapter", "a b=runs/one"), "is no NAME=PATH"),
        (("sprig", "--adapter", "a=x", "--adapter", "a=y"), "given twice"),
        (("sprig", "--adapter", "a=nowhere"), "there is no nowhere"),
        (("sprig", "--adapter", "a=sprig"), "this is a whole model"),
        (("sprig", "--adapter", "a=other"), "it belongs to another/base"),
        (("sprig", "--adapter", "sprig=adapter"), "two models would be called sprig"),
        (("adapter", "--name", "sprig"), "two models would be called sprig"),
        (("sprig", "--name", "a b"), "cannot be a model's name"),
        (("sprig", "--api-key-file", "nowhere"), "nowhere: No such file"),
        (("sprig", "--api-key-file", "empty"), "the key in empty is none"),
        (("sprig", "--api-key-file", "binary"), "binary is no text"),
    ],
)
def test_what_cannot_be_served_is_refused(luthier: Command, words: tuple[str, ...], said: str) -> None:
    Path("empty").write_text(" \n")
    Path("binary").write_bytes(b"\xff\xfe\x00")
    for name, base in (("adapter", "sprig"), ("other", "another/base")):
        Path(name).mkdir()
        config = (
            f'{{"peft_type": "LORA", "base_model_name_or_path": "{base}", "r": 1, "lora_alpha": 1,'
            ' "target_modules": ["q_proj"]}'
        )
        Path(name, "adapter_config.json").write_text(config)
    ended = luthier("serve", "--port", "0", *words)
    assert ended.code == 2, ended.err
    assert said in ended.message
    assert "Traceback" not in ended.err
    if "--port" not in words and "--slots" not in words:
        assert "try:" in ended.message


def test_what_serving_needs_is_named(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    whole = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fastapi" else whole(name))
    ended = luthier("serve", "sprig")
    assert ended.code == 2
    assert "serving needs fastapi" in ended.message
    assert "pip install 'luthier[serve]'" in ended.message
