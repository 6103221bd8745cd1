"""Base and tuned answers from one decoder: each is what the model says alone, and the adapter is on afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import UsageError
from luthier.generate.generate import answer_all
from luthier.generate.request import Request
from luthier.generate.sampling import SamplingSpec
from luthier.generate.sides import Side, answer_sides
from luthier.kernels.choose import kernels_for
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters, projections
from luthier.plan.settings import Quantize

PROMPTS = ("The quick brown", "A king had three daughters; the eldest said: '")


@pytest.fixture(scope="module", params=["layers", "in one call", "nf4"])
def models(tiny_llama: Path, request: pytest.FixtureRequest) -> tuple[Decoder, Decoder, ChatTokenizer]:
    """(the base by itself, a decoder with an adapter), by each of the ways in which steps are computed."""
    held: Quantize = "nf4" if request.param == "nf4" else "none"
    base, tuned = (load_decoder(tiny_llama, dtype=torch.float32, quantize=held) for _ in range(2))
    if request.param == "in one call":
        for decoder in (base, tuned):
            decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)
    add_lora(tuned, LoRASpec(4, 8.0), seed=0)
    for name, leaf in lora_parameters(tuned).items():
        if "lora_B" in name:
            torch.nn.init.normal_(leaf, std=0.3, generator=torch.Generator().manual_seed(1))
    return base, tuned, load_tokenizer(tiny_llama)


def requests(tokenizer: ChatTokenizer, temperature: float) -> list[Request]:
    spec = SamplingSpec(temperature=temperature, seed=3)
    return [Request(tuple(tokenizer.encode(prompt)), max_new_tokens=20, sampling=spec) for prompt in PROMPTS]


def is_on(decoder: Decoder) -> bool:
    return all(one.adapter is None or one.adapter.enabled for _, one in projections(decoder))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_each_side_is_what_it_is_alone(models: tuple[Decoder, Decoder, ChatTokenizer], temperature: float) -> None:
    base, tuned, tokenizer = models
    one, two = requests(tokenizer, temperature)
    alone = [*answer_all(base, tokenizer, [one]), *answer_all(tuned, tokenizer, [two])]
    seen = ["", ""]

    def show(place: int, text: str, ended: bool) -> None:
        assert is_on(tuned)
        seen[place] += text

    together = answer_sides(tuned, tokenizer, [Side(one, adapted=False), Side(two)], show=show, stopped=lambda: False)
    assert together == alone
    assert seen == [answer.text for answer in alone]
    assert answer_all(tuned, tokenizer, [one]) != alone[:1]


def test_a_stop_leaves_what_there_is(models: tuple[Decoder, Decoder, ChatTokenizer]) -> None:
    _, tuned, tokenizer = models
    one, two = requests(tokenizer, 0.0)
    whole = answer_all(tuned, tokenizer, [two])[0]
    steps = 0

    def stopped() -> bool:
        nonlocal steps
        steps += 1
        return steps > 5

    sides = [Side(one, adapted=False), Side(two)]
    cut = answer_sides(tuned, tokenizer, sides, show=lambda *_: None, stopped=stopped)
    assert [len(answer.ids) for answer in cut] == [5, 5]
    assert cut[1].ids == whole.ids[:5]
    assert whole.text.startswith(cut[1].text)
    assert not any(answer.ended for answer in cut)
    nothing = answer_sides(tuned, tokenizer, sides, show=lambda *_: None, stopped=lambda: True)
    assert [(answer.text, answer.ids, answer.ended) for answer in nothing] == [("", (), False)] * 2


def test_the_adapter_is_on_again_whatever_happens(models: tuple[Decoder, Decoder, ChatTokenizer]) -> None:
    _, tuned, tokenizer = models
    one, two = requests(tokenizer, 0.0)

    def breaks(_place: int, _text: str, _ended: bool) -> None:
        raise KeyboardInterrupt

    for sides, show, error in (
        ([Side(one, adapted=False), Side(two)], breaks, KeyboardInterrupt),
        ([Side(Request(()), adapted=False)], lambda *_: None, UsageError),
    ):
        with pytest.raises(error):
            answer_sides(tuned, tokenizer, sides, show=show, stopped=lambda: False)
        assert is_on(tuned)
