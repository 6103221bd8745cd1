"""Generation: the same tokens as transformers' generate, and text that never shows half a character."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM

from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import UsageError
from luthier.generate.generate import TextStream, complete, generate
from luthier.generate.sampling import SamplingSpec
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny

PROMPTS = ("The quick brown", "A king had three daughters; the eldest said: '", "def add(a, b):\n", "你")


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: str = request.param
    window: dict[str, object] = {"sliding_window": 7} if family == "mistral" else {}
    return tiny.make_model(tmp_path_factory.mktemp("gen") / family, family, vocab_size=407, **window)


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> tuple[Decoder, ChatTokenizer]:
    return load_decoder(tiny_llama, dtype=torch.float32), load_tokenizer(tiny_llama)


@pytest.mark.parametrize("penalty", [1.0, 1.35])
def test_greedy_is_transformers_generate(folder: Path, penalty: float) -> None:
    decoder, tokenizer = load_decoder(folder, dtype=torch.float32), load_tokenizer(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = SamplingSpec(repetition_penalty=penalty)
    for text in PROMPTS:
        ids = tokenizer.encode(text)
        mine = list(generate(decoder, ids, stop_ids=(), max_new_tokens=40, sampling=spec))
        theirs = reference.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
            repetition_penalty=penalty,
            eos_token_id=[-1],  # never
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        assert mine == theirs


def test_sampling_is_seeded(llama: tuple[Decoder, ChatTokenizer]) -> None:
    decoder, tokenizer = llama
    ids = tokenizer.encode(PROMPTS[0])

    def run(seed: int) -> list[int]:
        spec = SamplingSpec(temperature=1.0, top_p=0.95, seed=seed)
        return list(generate(decoder, ids, stop_ids=(), max_new_tokens=30, sampling=spec))

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_a_stop_token_ends_and_is_not_text(llama: tuple[Decoder, ChatTokenizer]) -> None:
    decoder, tokenizer = llama
    ids = tokenizer.encode(PROMPTS[1])
    spec = SamplingSpec(temperature=1.2, seed=6)  # greedy, a random model repeats itself
    free = list(generate(decoder, ids, stop_ids=(), max_new_tokens=25, sampling=spec))
    stop = free[9]
    first = free.index(stop)
    assert first > 2
    answer = complete(decoder, tokenizer, ids, stop_ids=(399, stop), max_new_tokens=25, sampling=spec)
    assert answer.ended
    assert answer.ids == tuple(free[:first])
    assert answer.prompt_tokens == len(ids)
    assert answer.text == tokenizer.decode(free[:first], skip_special=True)
    unended = complete(decoder, tokenizer, ids, stop_ids=(stop,), max_new_tokens=first, sampling=spec)
    assert not unended.ended
    assert unended.ids == tuple(free[:first])


def test_it_ends_where_the_positions_end(llama: tuple[Decoder, ChatTokenizer]) -> None:
    decoder, tokenizer = llama
    limit = decoder.config.max_positions
    ids = (tokenizer.encode(" ".join(tiny.TEXT)) * 10)[: limit - 3]
    assert len(list(generate(decoder, ids, stop_ids=(), max_new_tokens=50))) == 3
    with pytest.raises(UsageError, match="no answer fits"):
        list(generate(decoder, [*ids, 9, 9, 9], stop_ids=(), max_new_tokens=50))
    with pytest.raises(UsageError, match="empty"):
        list(generate(decoder, [], stop_ids=(), max_new_tokens=50))


def test_dropout_is_off_and_the_mode_comes_back(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(decoder, LoRASpec(4, 24.0, dropout=0.5), seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.1)
    ids = load_tokenizer(tiny_llama).encode(PROMPTS[0])
    still = list(generate(decoder, ids, stop_ids=(), max_new_tokens=20))
    decoder.train()
    assert list(generate(decoder, ids, stop_ids=(), max_new_tokens=20)) == still
    assert decoder.training


def test_pieces_make_the_text(llama: tuple[Decoder, ChatTokenizer]) -> None:
    decoder, tokenizer = llama
    pieces: list[str] = []
    spec = SamplingSpec(temperature=1.5, seed=2)  # far from likely: many broken bytes
    answer = complete(
        decoder, tokenizer, tokenizer.encode("你"), stop_ids=(), max_new_tokens=80, sampling=spec, on_text=pieces.append
    )
    assert len(pieces) > 10
    assert "".join(pieces) == answer.text == tokenizer.decode(answer.ids, skip_special=True)


def byte_tokenizer(leading_space: bool) -> Tokenizer:
    """One token a byte; with `leading_space`, SentencePiece's decoder, which drops the space before the first word."""
    if leading_space:
        vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "▁": 257, "▁a": 258}
        tok = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tok.decoder = decoders.Sequence(steps)
        return tok
    return Tokenizer.from_str(tiny.make_tokenizer().backend_tokenizer.to_str())


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30), spaces=st.booleans())
def test_streaming_gives_whole_characters(text: str, spaces: bool) -> None:
    tok = byte_tokenizer(leading_space=spaces)
    ids = list(text.encode()) if spaces else tok.encode(text, add_special_tokens=False).ids
    if spaces:
        ids = [257, *ids, 258]
    stream = TextStream(lambda some: tok.decode(list(some)))
    pieces = [stream.put(token) for token in ids]
    whole = tok.decode(ids)
    assert "".join(pieces) + stream.finish() == whole
    if "�" not in text:
        assert all("�" not in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(6, 399), max_size=25))
def test_streaming_any_ids_loses_nothing(ids: list[int]) -> None:
    tok = byte_tokenizer(leading_space=False)
    stream = TextStream(lambda some: tok.decode(list(some)))
    pieces = [stream.put(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tok.decode(ids)
