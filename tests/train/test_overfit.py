"""Four conversations, learned by heart: the loss goes to nearly nothing, and every answer ends by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from luthier.data.conversation import Conversation, Example, Source, Turn
from luthier.data.render import make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.model.decoder import Decoder
from luthier.runs import RunDirectory
from luthier.train.loop import train
from tests import tiny
from tests.train.world import Recorder, Rows, events_of, make_settings, tiny_decoder

TALKS = [
    ("What colour is the sky?", "The sky is blue."),
    ("Who had three daughters?", "A king had three."),
    ("What does the fox do?", "It jumps over the lazy dog!"),
    ("Add 1 and 2.", "3"),
]


def greedy(decoder: Decoder, prompt: list[int], most: int) -> list[int]:
    """The likeliest continuation, a whole forward pass a token: no cache, nothing but the decoder."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(most):
            ids.append(int(decoder(torch.tensor(ids))[-1].argmax()))
    return ids[len(prompt) :]


def test_it_learns_four_conversations_and_when_to_stop(tmp_path: Path) -> None:
    # Head and final norm are frozen: no logit exceeds |h||w|, about 48 times the head's deviation. With the usual
    # 0.08 that is 4, and no loss below ln(400 / e^4) = 2; with 0.4 it is 19.
    model = tiny.make_model(tmp_path / "model", initializer_range=0.4)
    tokenizer = load_tokenizer(model)
    template = make_template("model", tokenizer)
    talks = [
        Conversation((Turn("user", question), Turn("assistant", answer, train=True)), Source("talks.jsonl", line))
        for line, (question, answer) in enumerate(TALKS, start=1)
    ]
    encoded = template.encode_many(talks)
    examples = tuple(Example(found.ids, found.labels, row) for row, found in enumerate(encoded))
    settings = make_settings(steps=150, rank=8, alpha=16.0, learning_rate=2e-2, warmup_steps=5, eval_every=0)
    rows = Rows(examples, (), tuple(talk.source for talk in talks))
    decoder = tiny_decoder(model)
    train(decoder, rows, settings, RunDirectory(tmp_path / "run"), base="a/model", listener=Recorder())
    losses = [line["loss"] for line in events_of(tmp_path / "run" / "events.jsonl", "step")]
    assert losses[0] > 4
    assert losses[-1] < 0.05
    (stop,) = template.stop_ids[:1]
    for talk, (_, answer) in zip(talks, TALKS, strict=True):
        said = greedy(decoder, list(template.prompt_ids(talk.turns[:1])), most=30)
        assert stop in said
        assert tokenizer.decode(said[: said.index(stop)]) == answer
