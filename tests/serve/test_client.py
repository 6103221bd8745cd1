"""The official client against a real server: every answer is what the engine gives for the same prompt and seed."""

from __future__ import annotations

import math

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from luthier.data.conversation import Turn
from luthier.generate.generate import Completion, answer_all
from luthier.generate.request import Request
from luthier.generate.sampling import SamplingSpec
from luthier.serve.models import Served
from tests.serve.world import Running

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What colour is the sky?"},
]
TURNS = [Turn("system", "Be brief."), Turn("user", "What colour is the sky?")]
WARM = SamplingSpec(temperature=1.2, top_p=0.9, top_k=50, repetition_penalty=1.1, seed=11, min_p=0.01)


def ours(
    model: Served, spec: SamplingSpec, *, tokens: int = 24, logprobs: int | None = None, text: str = ""
) -> Completion:
    """The same asked of the engine: the conversation above, or `text` to be continued."""
    template = model.template
    ids = template.tokenizer.encode(text) if text else template.prompt_ids(TURNS)
    request = Request(tuple(ids), frozenset(template.stop_ids), (), tokens, spec, logprobs)
    return answer_all(model.decoder, template.tokenizer, [request])[0]


def test_chat_is_what_the_engine_answers(running: Running, tiny_served: Served) -> None:
    found = running.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=24,
        temperature=WARM.temperature,
        top_p=WARM.top_p,
        seed=WARM.seed,
        extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1},
    )
    wanted = ours(tiny_served, WARM)
    assert found.choices[0].message.content == wanted.text
    assert found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == ("stop" if wanted.ended else "length")
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (wanted.prompt_tokens, len(wanted.ids))
    assert found.usage.total_tokens == wanted.prompt_tokens + len(wanted.ids)
    assert (found.model, found.object) == ("tiny", "chat.completion")


def test_a_stream_is_the_same_text_in_whole_characters(running: Running, tiny_served: Served) -> None:
    wanted = ours(tiny_served, WARM, tokens=60)
    stream = running.client().chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_completion_tokens=60,
        temperature=WARM.temperature,
        top_p=WARM.top_p,
        seed=WARM.seed,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1},
    )
    chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    told = [chunk.choices[0] for chunk in chunks[:-1]]
    assert told[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in told) == wanted.text
    assert [choice.finish_reason for choice in told] == [None] * (len(told) - 1) + [
        "stop" if wanted.ended else "length"
    ]
    assert len(told) > 3  # it came in pieces: on a busy machine in few, for this model writes 60 tokens in milliseconds
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(wanted.ids)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stop_text_ends_before_it_streamed_or_not(running: Running, tiny_served: Served) -> None:
    free = ours(tiny_served, SamplingSpec()).text
    stop = free[7:10]
    ask = running.client().chat.completions.create
    for given in (stop, ["never said", stop, "nor this", "nor that"]):
        whole = ask(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, stop=given).choices[0]
        assert (whole.message.content, whole.finish_reason) == (free[: free.index(stop)], "stop")
    stream = list(ask(model="tiny", messages=MESSAGES, max_tokens=24, temperature=0, stop=stop, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == free[: free.index(stop)]
    assert stream[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in stream)  # it was not asked for


def test_chat_logprobs_are_the_engines(running: Running, tiny_served: Served) -> None:
    wanted = ours(tiny_served, SamplingSpec(), tokens=12, logprobs=3)
    ask = running.client().chat.completions.create
    whole = ask(model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content or []
    assert [one.logprob for one in content] == [one.logprob for one in wanted.logprobs]
    assert [[top.logprob for top in one.top_logprobs] for one in content] == [
        [value for _, value in one.top] for one in wanted.logprobs
    ]
    raw = b"".join(bytes(one.bytes or []) for one in content)
    assert raw.decode("utf-8", "replace") == tiny_served.template.tokenizer.decode(wanted.ids)
    stream = ask(
        model="tiny", messages=MESSAGES, max_tokens=12, temperature=0, logprobs=True, top_logprobs=3, stream=True
    )
    streamed = [one for chunk in stream if (found := chunk.choices[0].logprobs) for one in found.content or []]
    assert streamed == content
    none = ask(model="tiny", messages=MESSAGES, max_tokens=3, temperature=0)
    assert none.choices[0].logprobs is None


def test_several_choices_have_seeds_of_their_own(running: Running, tiny_served: Served) -> None:
    ask = running.client().chat.completions.create
    wanted = [ours(tiny_served, SamplingSpec(temperature=1.0, seed=5 + n)) for n in range(3)]
    found = ask(model="tiny", messages=MESSAGES, max_tokens=24, seed=5, n=3)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    assert [choice.message.content for choice in found.choices] == [one.text for one in wanted]
    assert found.usage is not None
    assert found.usage.prompt_tokens == wanted[0].prompt_tokens
    assert found.usage.completion_tokens == sum(len(one.ids) for one in wanted)
    texts = {0: "", 1: "", 2: ""}
    for chunk in ask(model="tiny", messages=MESSAGES, max_tokens=24, seed=5, n=3, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [one.text for one in wanted]
    free = ask(model="tiny", messages=MESSAGES, max_tokens=24, n=4)
    assert len({choice.message.content for choice in free.choices}) > 1  # no seed: any


def test_completions_take_texts_and_ids(running: Running, tiny_served: Served) -> None:
    texts = ["The quick brown", "def add(a, b):\n"]
    wanted = [ours(tiny_served, SamplingSpec(), tokens=10, logprobs=2, text=text) for text in texts]
    ids = [tiny_served.template.tokenizer.encode(text) for text in texts]
    ask = running.client().completions.create
    for prompt in (texts, ids):
        found = ask(model="tiny", prompt=prompt, max_tokens=10, temperature=0, logprobs=2)  # type: ignore[call-overload]
        assert [choice.text for choice in found.choices] == [one.text for one in wanted]
        assert found.usage.prompt_tokens == sum(map(len, ids))
        logprobs = found.choices[1].logprobs
        assert logprobs.token_logprobs == [one.logprob for one in wanted[1].logprobs]
        assert [max(top.values()) for top in logprobs.top_logprobs] == [one.top[0][1] for one in wanted[1].logprobs]
        assert logprobs.text_offset[0] == 0
        assert all(
            after - before == len(token)
            for before, after, token in zip(
                logprobs.text_offset, logprobs.text_offset[1:], logprobs.tokens, strict=False
            )
        )
    for one in (texts[0], ids[0]):
        assert ask(model="tiny", prompt=one, temperature=0, max_tokens=10).choices[0].text == wanted[0].text
    stream = ask(model="tiny", prompt=texts[0], temperature=0, max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == wanted[0].text
    assert ask(model="tiny", prompt=texts[0]).usage.completion_tokens <= 16  # OpenAI's own, where none is said
    twice = ask(model="tiny", prompt=texts, n=2, temperature=0, max_tokens=10)
    assert [choice.text for choice in twice.choices] == [wanted[0].text] * 2 + [wanted[1].text] * 2


def test_control_tokens_in_a_message_are_text_and_in_a_raw_prompt_what_they_are(
    running: Running, tiny_served: Served
) -> None:
    said = "<|eot_id|><|start_header_id|>"
    tokenizer = tiny_served.template.tokenizer
    client = running.client()
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": said}], max_tokens=1)
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(tiny_served.template.prompt_ids([Turn("user", said)]))
    raw = client.completions.create(model="tiny", prompt=said, max_tokens=1)
    assert raw.usage is not None
    assert raw.usage.prompt_tokens == 2 < len(tokenizer.encode(said))


def test_a_message_comes_in_parts_and_goes_back_as_it_came(running: Running) -> None:
    ask = running.client().chat.completions.create
    parts: list[ChatCompletionMessageParam] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text", "text": "colour?"}]},
    ]
    plain: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What\ncolour?"},
    ]
    one, two = (ask(model="tiny", messages=said, max_tokens=8, temperature=0) for said in (parts, plain))
    assert one.choices[0].message.content == two.choices[0].message.content
    again = [*plain, one.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    answer = ask(model="tiny", messages=again, max_tokens=4, user="me", metadata={"a": "b"}, store=False)
    assert answer.choices[0].message.content is not None


def test_the_models_are_listed(running: Running) -> None:
    client = running.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "luthier"
    with pytest.raises(openai.NotFoundError, match="There are: tiny"):
        client.models.retrieve("tine/y")


def test_errors_are_those_that_the_client_knows(running: Running, tiny_served: Served) -> None:
    client = running.client()
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(model="tinny", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    assert "Did you mean tiny? There are: tiny." in unknown.value.message
    limit = tiny_served.decoder.config.max_positions
    with pytest.raises(openai.BadRequestError, match=f"the model's context {limit}") as long:
        ask(model="tiny", messages=[{"role": "user", "content": "word " * limit}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="'temperature'") as hot:
        ask(model="tiny", messages=MESSAGES, temperature=math.pi)
    assert hot.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="'frequency_penalty' is not supported"):
        ask(model="tiny", messages=MESSAGES, frequency_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="Did you mean top_k"):
        ask(model="tiny", messages=MESSAGES, extra_body={"topk": 4})
