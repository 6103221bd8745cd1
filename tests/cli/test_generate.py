"""`luthier generate`: its options, several prompts at once, and what it refuses."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from tests.cli.command import Command

ASK = ("generate", "sprig", "--temperature", "0", "--max-tokens", "12")
QUESTIONS = ("What colour is the sky?", "Where does a fish live?", "What is 2 plus 3?", "Tell me a story.")


def test_several_prompts_at_once_are_each_alone(luthier: Command) -> None:
    words = [word for question in QUESTIONS for word in ("--prompt", question)]
    ended = luthier(*ASK, *words, "--json")
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    assert [answer["prompt"] for answer in document["answers"]] == list(QUESTIONS)
    for question, answer in zip(QUESTIONS[:2], document["answers"], strict=False):
        alone = json.loads(luthier(*ASK, "--prompt", question, "--json").out)
        assert {key: alone[key] for key in answer} == answer
    plain = luthier(*ASK, *words)
    texts = [answer["text"] for answer in document["answers"]]
    places = [plain.out.index(text) for text in texts]
    assert all(one < other for one, other in pairwise(places))


def test_a_stop_text_ends_before_it_and_logprobs_come_along(luthier: Command) -> None:
    whole = json.loads(luthier(*ASK, "--prompt", QUESTIONS[3], "--json").out)
    stop = whole["text"][5:9]
    ended = json.loads(
        luthier(*ASK, "--prompt", QUESTIONS[3], "--stop", "never", "--stop", stop, "--logprobs", "2", "--json").out
    )
    assert ended["text"] == whole["text"][: whole["text"].index(stop)]
    assert ended["stopped_by"] == stop
    assert [one["id"] for one in ended["logprobs"]] == ended["ids"]
    for one in ended["logprobs"]:
        assert len(one["top"]) == 2
        assert one["top"][0]["id"] == one["id"]  # greedy
        assert one["logprob"] == one["top"][0]["logprob"] <= 0
    assert "logprobs" not in whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-p", "a", "--min-p", "1.5"), "--min-p"),
        (("-p", "a", "--logprobs", "21", "--json"), "--logprobs"),
        (("-p", "a", "--logprobs", "2"), "--logprobs has no place in plain text"),
        (("-p", "a", "--stop", ""), "a stop string is empty"),
        (("-p", "-", "-p", "-"), "standard input is asked for twice"),
        (("-p", "a " * 3000), "no answer fits"),
        (("-p", "a", "-p", ""), "the prompt is empty"),
        ((), "--prompt"),
    ],
)
def test_what_cannot_be_asked_is_refused(luthier: Command, words: tuple[str, ...], said: str) -> None:
    ended = luthier("generate", "sprig", *words)
    assert ended.code == 2
    assert said in ended.message
