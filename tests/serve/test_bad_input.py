"""What cannot be answered: OpenAI's error object with a status below 500, for whatever a client may send."""

from __future__ import annotations

import json
import time

import httpx
import pytest

from tests.serve.world import Running

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}


def told(response: httpx.Response, status: int = 400) -> dict[str, str]:
    """The error object, which must be whole."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert list(document) == ["error"]
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert document["error"]["message"]
    found: dict[str, str] = document["error"]
    return found


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": "Hi"}, "messages", "list"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user"}, {"role": "user", "content": 5}]}, "messages.1.content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content",
            "Invalid",
        ),
        ({"messages": [{"role": "user", "content": "Hi", "name": "Ann"}]}, "messages.0.name", "None"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages.0.tool_calls", "at most 0"),
        ({"model": 5}, "model", "string"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": "5"}, "max_tokens", "integer"),
        ({"max_tokens": 5000}, "max_tokens", "4096 at most"),
        ({"max_tokens": 10**400}, "max_tokens", "4096 at most"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_completion_tokens": 3}, "max_tokens", "differ"),
        ({"temperature": -0.1}, "temperature", "greater"),
        ({"temperature": 2.1}, "temperature", "less"),
        ({"top_p": 1.5}, "top_p", "less"),
        ({"min_p": -1}, "min_p", "greater"),
        ({"top_k": -5}, "top_k", "greater"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater"),
        ({"n": 0}, "n", "greater"),
        ({"n": 65}, "n", "less"),
        ({"seed": 2**63}, "seed", "less"),
        ({"seed": 1.5}, "seed", "integer"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ["a", "x" * 1001]}, "stop.1", "at most 1000"),
        ({"top_logprobs": 3}, "top_logprobs", "'logprobs'"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream'"),
        ({"frequency_penalty": 0.1}, "frequency_penalty", "not supported"),
        ({"presence_penalty": -1}, "presence_penalty", "not supported"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"temprature": 1}, "temprature", "Did you mean temperature"),
        ({"messages": [{"role": "user", "content": "a " * 600}]}, "messages", "the model's context 512"),
    ],
)
def test_chat_that_cannot_be_is_400_and_names_the_field(
    running: Running, more: dict[str, object], param: str, said: str
) -> None:
    error = told(running.post("/v1/chat/completions", {**CHAT, **more}))
    assert error["type"] == "invalid_request_error"
    assert error["param"] is not None
    assert error["param"].startswith(param)
    assert said in error["message"]


@pytest.mark.parametrize(
    ("more", "param", "said"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": [5, "a"]}, "prompt", "Invalid"),
        ({"prompt": [[5], []]}, "prompt", "empty"),
        ({"prompt": [5, 400000]}, "prompt", "holds the id 400000"),
        ({"prompt": [-1]}, "prompt", "Invalid"),
        ({"prompt": [2**70]}, "prompt", "Invalid"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt", "more than 64"),
        ({"prompt": [7] * 512}, "prompt", "no answer fits"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"echo": True}, "echo", "not supported"),
        ({"best_of": 3}, "best_of", "unless it equals 'n'"),
        ({"messages": []}, "messages", "Unrecognized"),
    ],
)
def test_a_completion_that_cannot_be_is_400_and_names_the_field(
    running: Running, more: dict[str, object], param: str, said: str
) -> None:
    error = told(running.post("/v1/completions", {**TEXT, **more}))
    assert (error["param"] or "").startswith(param)
    assert said in error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "n": None, "stop": None, "seed": None},
        {"temperature": None, "top_p": None, "stream": False, "stream_options": None, "parallel_tool_calls": True},
        {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"},
    ],
)
def test_settings_that_ask_for_nothing_are_taken(running: Running, more: dict[str, object]) -> None:
    assert running.post("/v1/chat/completions", {**CHAT, **more}).status_code == 200


def raw(*, deep: int = 100_000) -> dict[str, bytes]:
    body = json.dumps(CHAT)
    return {
        "nothing": b"",
        "no JSON": b"{",
        "a number": b"5",
        "a list": b"[]",
        "null": b"null",
        "no UTF-8": b'{"model": "\xff\xfe"}',
        "a lone surrogate": body.replace("Hi", "\\ud800").encode(),
        "a lone surrogate as a name": body.replace('"max_tokens"', '"\\udfff"').encode(),
        "a lone surrogate as the model": body.replace("tiny", "\\udc00").encode(),
        "NaN": body.replace('"max_tokens": 2', '"temperature": NaN').encode(),
        "infinity": body.replace('"max_tokens": 2', '"top_p": -Infinity').encode(),
        "a number of 10,000 digits": body.replace('"max_tokens": 2', '"seed": ' + "9" * 10_000).encode(),
        "a huge exponent": body.replace('"max_tokens": 2', '"temperature": 1e999999').encode(),
        "deep lists": b'{"model": ' + b"[" * deep + b"]" * deep + b"}",
        "deep objects": body.replace('"max_tokens": 2', '"response_format": ').encode()[:-1]
        + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
        "less deep": body.replace('"max_tokens": 2', '"response_format": ').encode()[:-1]
        + b'{"a":' * 600 + b"1" + b"}" * 600 + b"}",
    }  # fmt: skip


@pytest.mark.parametrize("what", list(raw(deep=1)))
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_body_that_is_none_is_400(running: Running, path: str, what: str) -> None:
    headers = {"Content-Type": "application/json"}
    error = told(httpx.post(running.url + path, content=raw()[what], headers=headers, timeout=30))
    assert error["type"] == "invalid_request_error"


def test_a_message_with_a_null_character_is_answered(running: Running) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "a\x00b\u2028\U0010ffff"}]}
    assert running.post("/v1/chat/completions", body).status_code == 200


def test_json_must_be_called_so(running: Running) -> None:
    """A page of another origin can send a body without a word of leave only as text or as a form."""
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        response = httpx.post(
            f"{running.url}/v1/chat/completions", content=json.dumps(CHAT), headers={"Content-Type": kind}
        )
        assert "application/json" in told(response)["message"]
    asked = httpx.options(
        f"{running.url}/v1/chat/completions",
        headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
    )
    told(asked, 405)
    assert "access-control-allow-origin" not in asked.headers


def test_paths_and_methods_that_there_are_not(running: Running) -> None:
    assert "/v1/embeddings" in told(httpx.post(f"{running.url}/v1/embeddings", json={}), 404)["message"]
    assert "GET" in told(running.get("/v1/chat/completions"), 405)["message"]
    told(running.get("/docs"), 404)
    assert told(running.get("/v1/models/%F0%9F%98%80%00"), 404)["code"] == "model_not_found"


def test_a_long_name_is_cut_in_the_message(running: Running) -> None:
    error = told(running.post("/v1/completions", {**TEXT, "model": "x" * 400}), 404)
    assert len(error["message"]) < 400
    told(running.post("/v1/completions", {**TEXT, "y" * 100_000: 1}))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [1] * 100_000}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{}] * 100_000}]}),
        ("completions", {"prompt": [None] * 100_000}),
        ("completions", {"prompt": [["x"] * 100_000]}),
        ("completions", {"prompt": ["a"] * 100_000}),
        ("completions", {"prompt": "a", **{f"key{n}": n for n in range(50_000)}}),
        ("chat/completions", {"messages": [], "metadata": {f"key{n}": n for n in range(50_000)}}),
    ],
)
def test_many_faults_are_refused_at_the_first(running: Running, path: str, body: dict[str, object]) -> None:
    """An error for each would hold up everyone else's streams for seconds."""
    began = time.process_time()
    found = httpx.post(f"{running.url}/v1/{path}", json={"model": "tiny", **body}, timeout=60)
    assert (found.status_code, len(found.content) < 5000) == (400, True)
    assert time.process_time() - began < 2.0
