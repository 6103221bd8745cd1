"""The engine: texts of different lengths begun and ended at any time, each as if it were alone, and as transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import UsageError
from luthier.generate.engine import CHUNK, Engine
from luthier.generate.generate import answer_all, complete
from luthier.generate.request import Event, Request
from luthier.generate.sampling import SamplingSpec
from luthier.kernels import REFERENCE
from luthier.kernels.choose import kernels_for
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny

PROMPTS = ("The quick brown", "A king had three daughters; the eldest said: '", "def add(a, b):\n", "你", "hill and")
WARM = SamplingSpec(temperature=1.1, top_p=0.95, min_p=0.01, seed=4)


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name: str = request.param
    window: dict[str, object] = {"sliding_window": 7} if name == "mistral" else {}
    return tiny.make_model(tmp_path_factory.mktemp("engine") / name, name, vocab_size=407, **window)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> tuple[Decoder, ChatTokenizer]:
    return native(load_decoder(tiny_llama, dtype=torch.float32)), load_tokenizer(tiny_llama)


def native(decoder: Decoder) -> Decoder:
    decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)
    return decoder


def engine_of(decoder: Decoder, tokenizer: ChatTokenizer, slots: int = 8) -> Engine:
    return Engine(decoder, lambda ids: tokenizer.decode(ids, skip_special=True), slots=slots)


def drain(engine: Engine) -> dict[int, list[Event]]:
    found: dict[int, list[Event]] = {}
    while not engine.idle:
        for event in engine.step():
            found.setdefault(event.request, []).append(event)
    return found


def tokens(events: list[Event]) -> list[int]:
    return [event.token for event in events]


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_texts_together_are_transformers_generate(family: Path, kernels: str) -> None:
    decoder, tokenizer = load_decoder(family, dtype=torch.float32), load_tokenizer(family)
    decoder.use(REFERENCE if kernels == "reference" else kernels_for(decoder.device, torch.float32).kernels)
    reference = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    engine = engine_of(decoder, tokenizer, slots=3)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    lengths = [40, 11, 25, 40, 33]  # slots are freed and filled again at different times
    numbers = [engine.add(Request(tuple(p), max_new_tokens=n)) for p, n in zip(prompts, lengths, strict=True)]
    found = drain(engine)
    for number, prompt, length in zip(numbers, prompts, lengths, strict=True):
        theirs = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=[-1],  # never
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        assert tokens(found[number]) == theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_draw_depends_on_its_own_seed_alone(tiny_llama: Path, dtype: torch.dtype) -> None:
    """Logits are the same bits beside any others (Engine.exact), and each text has a source of chance of its own."""
    decoder, tokenizer = native(load_decoder(tiny_llama, dtype=dtype)), load_tokenizer(tiny_llama)
    request = Request(tuple(tokenizer.encode(PROMPTS[1])), max_new_tokens=40, sampling=WARM, logprobs=3)
    engine = engine_of(decoder, tokenizer)
    assert engine.exact
    alone = engine.add(request)
    wanted = drain(engine)[alone]
    busy = engine_of(decoder, tokenizer, slots=4)
    for seed, text in enumerate(PROMPTS):
        busy.add(
            Request(tuple(tokenizer.encode(text)), max_new_tokens=9 + 7 * seed, sampling=SamplingSpec(1.5, seed=seed))
        )
    busy.step()
    busy.step()
    number = busy.add(request)
    ours = drain(busy)[number]
    assert tokens(ours) == tokens(wanted)
    assert [event.logprob for event in ours] == [event.logprob for event in wanted]


def test_a_cancelled_request_frees_its_slot_at_once(llama: tuple[Decoder, ChatTokenizer]) -> None:
    engine = engine_of(*llama, slots=2)
    one, two, three = (engine.add(Request((5, 6, 7 + n), max_new_tokens=30)) for n in range(3))
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    assert engine.cancel(one)
    assert not engine.cancel(one)
    events = engine.step()
    assert {event.request for event in events} == {two, three}
    assert engine.cancel(three)
    assert set(drain(engine)) == {two}
    assert not engine.cancel(two)  # it has ended
    waiting = [engine.add(Request((9,), max_new_tokens=2)) for _ in range(3)]
    assert engine.cancel(waiting[2])  # before it ever had a slot
    assert set(drain(engine)) == set(waiting[:2])


def test_a_long_prompt_is_read_in_chunks_while_others_go_on(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "long", max_position_embeddings=4 * CHUNK)
    decoder, tokenizer = native(load_decoder(folder, dtype=torch.float32)), load_tokenizer(folder)
    long = tuple((31 * n) % 400 for n in range(2 * CHUNK + 77))
    engine = engine_of(decoder, tokenizer)
    short = engine.add(Request((5, 6), max_new_tokens=20))
    engine.step()
    number = engine.add(Request(long, max_new_tokens=4))
    beside = [[event.request for event in engine.step()] for _ in range(3)]
    assert beside == [[short], [short], [short, number]]
    ours = tokens(drain(engine)[number])
    with torch.inference_mode():
        ids = torch.tensor(long)
        for _ in range(4):
            ids = torch.cat([ids, decoder(ids)[-1:].argmax(-1)])
    assert ours == ids[len(long) + 1 :].tolist()


def test_text_ends_before_a_stop_string_across_tokens(llama: tuple[Decoder, ChatTokenizer]) -> None:
    decoder, tokenizer = llama
    prompt = tuple(tokenizer.encode(PROMPTS[1]))
    (free,) = answer_all(decoder, tokenizer, [Request(prompt, max_new_tokens=40, sampling=WARM)])
    pieces = [tokenizer.decode([token], skip_special=True) for token in free.ids]
    at = next(n for n in range(8, 38) if all(piece and piece.isascii() for piece in pieces[n : n + 2]))
    stop = pieces[at][-1] + pieces[at + 1][0]  # begins in one token, ends in the next
    seen: list[str] = []
    (ours,) = answer_all(
        decoder,
        tokenizer,
        [Request(prompt, stops=("never said", stop), max_new_tokens=40, sampling=WARM)],
        on_text=lambda _, piece: seen.append(piece),
    )
    assert ours.text == "".join(seen) == free.text[: free.text.index(stop)]
    assert ours.ended
    assert ours.stopped_by == stop
    assert ours.ids == free.ids[: len(ours.ids)]


def test_logprobs_are_those_of_transformers(llama: tuple[Decoder, ChatTokenizer], tiny_llama: Path) -> None:
    decoder, tokenizer = llama
    prompt = tuple(tokenizer.encode(PROMPTS[0]))
    (answer,) = answer_all(decoder, tokenizer, [Request(prompt, max_new_tokens=12, sampling=WARM, logprobs=5)])
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        logits = reference(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
    wanted = torch.log_softmax(logits, -1)
    assert len(answer.logprobs) == 12
    for row, token, ours in zip(wanted, answer.ids, answer.logprobs, strict=True):
        assert ours.logprob == pytest.approx(float(row[token]), abs=2e-5)
        best = row.topk(5)
        assert [one for one, _ in ours.top] == best.indices.tolist()
        assert [value for _, value in ours.top] == pytest.approx(best.values.tolist(), abs=2e-5)


def test_pieces_of_texts_written_together_are_whole_characters(llama: tuple[Decoder, ChatTokenizer]) -> None:
    decoder, tokenizer = llama
    spec = [SamplingSpec(temperature=1.5, seed=seed) for seed in range(6)]  # far from likely: many broken bytes
    requests = [Request((9, 8 + n), max_new_tokens=60, sampling=one) for n, one in enumerate(spec)]
    seen: dict[int, list[str]] = {n: [] for n in range(6)}
    answers = answer_all(decoder, tokenizer, requests, slots=4, on_text=lambda place, text: seen[place].append(text))
    for place, answer in enumerate(answers):
        assert "".join(seen[place]) == answer.text == tokenizer.decode(answer.ids, skip_special=True)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_an_unmerged_adapter_speaks_in_batches_too(tiny_llama: Path, quantize: str) -> None:
    """On full weights in one call into C, on NF4 in the decoder's own layers."""
    tokenizer = load_tokenizer(tiny_llama)
    decoder = native(load_decoder(tiny_llama, dtype=torch.float32, quantize="nf4" if quantize == "nf4" else "none"))
    add_lora(decoder, LoRASpec(4, 12.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.1, generator=generator)
    requests = [Request(tuple(tokenizer.encode(text)), max_new_tokens=20) for text in PROMPTS]
    answers = answer_all(decoder, tokenizer, requests)
    assert engine_of(decoder, tokenizer).exact == (quantize == "none")
    for request, answer in zip(requests, answers, strict=True):
        ids = torch.tensor(request.prompt)
        with torch.inference_mode():
            for _ in range(20):
                ids = torch.cat([ids, decoder(ids)[-1:].argmax(-1)])
        assert answer.ids == tuple(ids[len(request.prompt) :].tolist())


def test_what_cannot_be_answered_is_refused_before_anything_is_written(llama: tuple[Decoder, ChatTokenizer]) -> None:
    decoder, tokenizer = llama
    engine, limit = engine_of(decoder, tokenizer), decoder.config.max_positions
    for request, said in (
        (Request(()), "the prompt is empty"),
        (Request((7,) * limit), f"the prompt has {limit} tokens and the model's context {limit}"),
        (Request((7, 100000)), "holds the id 100000"),
        (Request((7, -1)), "holds the id -1"),
        (Request((7,), stops=("",)), "a stop string is empty"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            engine.add(request)
        assert caught.value.remedy
    assert engine.idle
    for settings, said in (({"max_new_tokens": 0}, "at most 0 new"), ({"logprobs": 21}, "21 alternatives")):
        with pytest.raises(UsageError, match=said):
            Request((7,), **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="0 texts at once"):
        Engine(decoder, lambda _: "", slots=0)
    assert len(complete(decoder, tokenizer, (7,) * (limit - 2), stop_ids=(), max_new_tokens=9).ids) == 2
