"""What one server takes on: queue, body, time and tokens; who may ask; and what is freed when a client goes."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from luthier.serve.limits import Limits
from luthier.serve.models import Served
from luthier.serve.server import Access
from tests.serve.test_bad_input import CHAT, TEXT, told
from tests.serve.world import Running, serving

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hi"}]
ENDLESS = {"model": "long", "prompt": "The quick", "max_tokens": 100_000, "temperature": 0}
KEY = "a-key-of-thirty-two-characters-!"


@pytest.fixture(scope="module")
def narrow(long_served: Served) -> Iterator[Running]:
    """One slot, one place in the queue."""
    with serving([long_served], Limits(slots=1, queue=1, max_tokens=2**17)) as found:
        yield found


@contextmanager
def open_stream(running: Running) -> Iterator[None]:
    """A stream that goes on until the block's end, its first token read."""
    with httpx.stream(
        "POST", f"{running.url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=30
    ) as response:
        lines = response.iter_lines()  # held: where nobody reads on, the connection is closed
        next(lines)
        yield


def test_a_client_that_goes_frees_its_slot(narrow: Running) -> None:
    before = narrow.metric("luthier_cancelled_total")
    with open_stream(narrow):
        assert narrow.metric("luthier_running") == 1
    narrow.until("luthier_running", 0)
    with pytest.raises(httpx.ReadTimeout):  # it does not stream, and leaves while it waits for the whole
        httpx.post(f"{narrow.url}/v1/completions", json=ENDLESS, timeout=0.5)
    narrow.until("luthier_running", 0)
    assert narrow.metric("luthier_cancelled_total") == before + 2
    assert narrow.post("/v1/completions", {**ENDLESS, "max_tokens": 2}).status_code == 200


def test_a_client_that_goes_while_it_waits_leaves_the_queue(narrow: Running) -> None:
    with open_stream(narrow):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{narrow.url}/v1/completions", json=ENDLESS, timeout=0.5)
        narrow.until("luthier_waiting", 0)
        assert narrow.metric("luthier_running") == 1  # the other goes on
    narrow.until("luthier_running", 0)


def test_a_full_queue_is_429_and_says_when_to_come_again(narrow: Running) -> None:
    sent = http.client.HTTPConnection(narrow.url.removeprefix("http://"), timeout=30)
    body = json.dumps({**ENDLESS, "max_tokens": 3})
    with open_stream(narrow):
        sent.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        narrow.until("luthier_waiting", 1)
        response = narrow.post("/v1/completions", ENDLESS)
        assert told(response, 429)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            narrow.client().chat.completions.create(model="long", messages=HI)
    assert json.loads(sent.getresponse().read())["usage"]["completion_tokens"] <= 3  # the one that waited has its turn
    assert "2 is the most here" in told(narrow.post("/v1/completions", {**ENDLESS, "n": 3}))["message"]


def test_time_that_is_up_is_504_or_the_last_event(long_served: Served) -> None:
    with serving([long_served], Limits(seconds=0.4, max_tokens=2**17)) as running:
        began = time.monotonic()
        assert "0.4 seconds" in told(running.post("/v1/completions", ENDLESS), 504)["message"]
        assert time.monotonic() - began < 15
        lines = running.post("/v1/completions", {**ENDLESS, "stream": True}).text.strip().split("\n\n")
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="not through after"):
            list(running.client().completions.create(**ENDLESS, stream=True))  # type: ignore[call-overload]
        running.until("luthier_running", 0)


def test_a_long_body_is_413_announced_or_not(tiny_served: Served) -> None:
    body = json.dumps({**TEXT, "prompt": "a" * 3000})
    headers = {"Content-Type": "application/json"}
    with serving([tiny_served], Limits(body=2000, body_seconds=0.5, max_tokens=5)) as running:
        path = f"{running.url}/v1/completions"
        assert told(httpx.post(path, content=body, headers=headers), 413)["code"] == "body_too_large"
        chunked = httpx.post(path, content=iter([body[:1000].encode()] * 4), headers=headers)
        assert told(chunked, 413)["code"] == "body_too_large"
        assert "5 at most (--max-tokens)" in told(running.post("/v1/completions", {**TEXT, "max_tokens": 6}))["message"]
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2]))) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_key_is_asked_for(tiny_served: Served) -> None:
    with serving([tiny_served], access=Access(KEY)) as running:
        ok = running.client(KEY).chat.completions.create(model="tiny", messages=HI, max_tokens=1)
        assert ok.choices
        for wrong in ("another", KEY[:-1], KEY + "x", "."):
            with pytest.raises(openai.AuthenticationError) as caught:
                running.client("none", default_headers={"Authorization": f"Bearer {wrong}"}).models.list()
            assert caught.value.code == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
            error = told(running.get(path), 401)
            assert KEY not in error["message"]
        assert running.get("/health").status_code == running.get("/ready").status_code == 200
        elsewhere = httpx.get(
            f"{running.url}/v1/models", headers={"Host": "luthier.example", "Authorization": f"bearer {KEY}"}
        )
        assert elsewhere.status_code == 200  # with the key the name does not matter


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),  # an address is no name that could be rebound
        ("friend.example:8000", 200),
        ("evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("127.0.0.1.evil.example", 403),
        ("", 403),
    ],
)
def test_without_a_key_the_host_must_be_ours(tiny_served: Served, host: str, status: int) -> None:
    """DNS rebinding: a web page whose name has been given our address must not be answered."""
    with serving([tiny_served], access=Access(hosts=("Friend.example",))) as running:
        response = httpx.get(f"{running.url}/v1/models", headers={"Host": host})
        assert response.status_code == status
        if status == 403:
            assert "--allow-host" in told(response, 403)["message"]


def test_metrics_and_the_line_of_a_request(tiny_served: Served) -> None:
    with serving([tiny_served], requests=True) as running:
        used = running.post("/v1/chat/completions", CHAT).json()["usage"]
        running.post("/v1/chat/completions", {})
        running.get("/nothing/%1b[31m")
        lines = running.get("/metrics").text.splitlines()
        for line in (
            'luthier_requests_total{path="/v1/chat/completions",status="200"} 1.0',
            'luthier_requests_total{path="/v1/chat/completions",status="400"} 1.0',
            'luthier_requests_total{path="other",status="404"} 1.0',
            f'luthier_prompt_tokens_total{{model="tiny"}} {used["prompt_tokens"]}.0',
            'luthier_request_seconds_count{path="/v1/chat/completions"} 2.0',
            'luthier_first_token_seconds_count{model="tiny"} 1.0',
        ):
            assert line in lines
        assert running.said[0].startswith("POST /v1/chat/completions 200 ")
        assert running.said[2].startswith("GET /nothing/\\x1b[31m 404 ")
