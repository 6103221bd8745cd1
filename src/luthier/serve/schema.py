"""What may be asked of the server, in the words of OpenAI's interface; anything else is refused by its name.

Three kinds of setting: those that are carried out, those that change nothing in an answer and are taken without effect
(`user`, `metadata`, …), and those that would change it and are not built, which are refused unless they have the value
that asks for nothing (NEUTRAL). Types are strict, as OpenAI's are: "5" is no number.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from luthier.generate.request import MOST_LOGPROBS

__all__ = ["MOST_CHOICES", "NEUTRAL", "Asked", "ChatAsked", "Message", "TextAsked", "TextPart"]

MOST_CHOICES = 64
"""Answers to one request, over all of its prompts."""

NEUTRAL: dict[str, tuple[JsonValue, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "echo": (None, False),
    "best_of": (None, 1),
}
"""Settings that are not built -> the values that ask for nothing."""


MOST_KEYS, MOST_MESSAGES = 100, 10_000
"""More are refused at once, as lists are at their first fault: an error is made for each, on the event loop."""


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MOST_KEYS:
        raise ValueError(f"it has {len(value):,} keys, {MOST_KEYS} are the most")
    return value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _has_few_keys(cls, value: object) -> object:
        return _few(value)


class StreamOptions(_Strict):
    """`include_usage`: a last chunk counts the tokens."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


def _whole(text: str) -> str:
    """JSON can name half of a UTF-16 pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a UTF-16 pair") from error
    return text


Text: TypeAlias = Annotated[str, AfterValidator(_whole)]
Token: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
Tokens: TypeAlias = Annotated[list[Token], Field(fail_fast=True)]
Stop: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_whole)]


class Asked(_Strict):
    """What both endpoints take. `top_k`, `min_p` and `repetition_penalty` are not OpenAI's; vLLM has them too."""

    model: Text = Field(max_length=500)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(_Strict):
    """A part of a message; there is none but text."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One turn. Those of other kinds than text are refused; what clients send back empty is taken."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[JsonValue], Field(max_length=0)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        """Its content; parts are lines of it."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(part.text for part in self.content)


class ChatAsked(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: list[JsonValue] | None = None
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    functions: list[JsonValue] | None = None
    function_call: JsonValue = None
    response_format: JsonValue = None
    modalities: Annotated[list[str], Field(fail_fast=True)] | None = None
    audio: JsonValue = None
    prediction: JsonValue = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    web_search_options: JsonValue = None
    store: bool | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class TextAsked(Asked):
    """The body of /v1/completions: text or ids that are continued as they are, or a list of them."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, max_length=MOST_CHOICES)]
        | Tokens
        | Annotated[list[Tokens], Field(fail_fast=True, max_length=MOST_CHOICES)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
