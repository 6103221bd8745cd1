"""The GGUF file in llama.cpp itself: the same ids from the same text, the same next token at the same place.

Random small models of each family stand for what differs between architectures (row order, biases, QK-norm, tying, RoPE
scaling), the bundled sprig for a model that has learned something, Llama 3's vocabulary for a real tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import luthier
from luthier.data.conversation import Turn
from luthier.data.render import make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf import write_gguf
from luthier.export.gguf_vocab import NEARLY, PRE_TOKENIZERS
from luthier.generate.generate import complete
from luthier.model.load import load_decoder
from tests import tiny

if TYPE_CHECKING:
    import llama_cpp

if importlib.util.find_spec("llama_cpp") is None:
    WHY = "llama-cpp-python is not installed (extra [llama-cpp]; it needs a C++ compiler): its tests do not run"
    if os.environ.get("CI", "").lower() == "true":
        raise RuntimeError(f"{WHY}, and in CI they must")
    pytest.skip(WHY, allow_module_level=True)

pytestmark = pytest.mark.llama_cpp

ASSETS = Path(luthier.__file__).parent / "assets"
SPRIG = ASSETS / "sprig"

TEXTS = (
    *tiny.TEXT,
    "   leading and trailing   ",
    "tabs\t\tand\r\nlines\n\n\n  and  runs     of spaces",
    "I'm we'll THEY'RE it'S 'tis don't",
    "1234567890 3.14159 1,000,000 x²",
    "emoji 🦙👩‍👩‍👧 🇩🇪 and ZWJ\u200d",
    "日本語のテキスト 한국어 العربية हिन्दी ไทย",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 0x1F; } // \\n",
    "<|eot_id|> as text, <|begin_of_text|> too",
    "¿Qué? «naïve» — “quotes” … ½",
    "\u00a0no-break\u3000wide\u2028line",
    "a",
    " ",
    "\n",
)


@contextmanager
def loaded(path: Path, *, context: int = 512, vocabulary: bool = False) -> Iterator[llama_cpp.Llama]:
    """llama.cpp with the file. One thread: two that wait for each other on a busy machine cost minutes."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_threads=1,
        n_threads_batch=1,
        logits_all=not vocabulary,
        vocab_only=vocabulary,
        verbose=False,
    )
    try:
        yield model
    finally:
        model.close()


def logits_of(model: llama_cpp.Llama, ids: list[int], vocabulary: int) -> NDArray[np.float32]:
    model.reset()
    model.eval(ids)
    return np.array(model.scores[: len(ids), :vocabulary])


def same_ids(model: llama_cpp.Llama, tokenizer: ChatTokenizer, text: str) -> bool:
    return model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)


# --- random models ----------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, llama3 rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3, yarn with a factor": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.3}}),
}
VOCAB = 407  # more rows than tokens: the rest must be filled up


def make(folder: Path, case: tuple[str, dict[str, object]]) -> Path:
    family, settings = case
    sizes = {"hidden_size": 96, "intermediate_size": 160, "initializer_range": 0.15, "vocab_size": VOCAB}
    tiny.make_model(folder, family, **{**sizes, **settings})
    # A louder embedding: what comes out then depends on each layer without being noise in a random deep net.
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 8
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("case", CASES)
def test_random_models_agree(case: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", CASES[case])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(6, 400, (97 + k,), generator=generator).tolist() for k in range(6)]
    with torch.no_grad():
        wanted = [reference(torch.tensor([ids])).logits[0].numpy() for ids in texts]
    # fp16 rounds weights and activations by 2^-11; some 30 matrices one after another, errors adding as a random walk,
    # give 0.3 %, and the largest of 40 000 values is four times the usual one. 8 bits are 2^-8 of a block's largest.
    # Agreement: near-ties of random logits flip in proportion to that; a model that learned something has few of them.
    for quantize, error, share in (("f16", 0.015, 0.99), ("q8_0", 0.15, 0.85)):
        written = write_gguf(folder, tmp_path / f"{quantize}.gguf", "f16" if quantize == "f16" else "q8_0")
        assert written.kept_f16 == ()
        with loaded(written.path) as model:
            found = [logits_of(model, ids, VOCAB) for ids in texts]
        for got, want in zip(found, wanted, strict=True):
            assert np.abs(got - want).max() < error * np.abs(want).max()
        agree = np.concatenate([g.argmax(-1) == w.argmax(-1) for g, w in zip(found, wanted, strict=True)])
        assert agree.mean() >= share


def test_rows_that_q8_cannot_take_stay_f16(tiny_llama: Path, tmp_path: Path) -> None:
    written = write_gguf(tiny_llama, tmp_path / "m.gguf", "q8_0")
    # Widths 48 and 80 are no multiples of 32; o_proj reads 96, and so is quantised.
    assert "blk.0.attn_q.weight" in written.kept_f16
    assert "blk.0.ffn_down.weight" in written.kept_f16
    assert "blk.0.attn_output.weight" not in written.kept_f16
    assert any("stay F16" in note for note in written.notes)
    with loaded(written.path) as model:
        assert np.isfinite(logits_of(model, [7, 8, 9], 400)).all()


def test_a_sliding_window_becomes_the_context(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf", "mistral", sliding_window=40)
    written = write_gguf(folder, tmp_path / "m.gguf")
    assert any("sliding window" in note for note in written.notes)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(6, 400, (40,), generator=torch.Generator().manual_seed(0))
    with loaded(written.path, context=40) as model, torch.no_grad():
        assert model.metadata["llama.context_length"] == "40"
        want = reference(ids[None]).logits[0].numpy()
        assert np.abs(logits_of(model, ids.tolist(), 400) - want).max() < 0.015 * np.abs(want).max()


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    cases = {
        "a bias on o_proj": ("qwen3", {"attention_bias": True}),
        "llama3": ("qwen2", {"rope_parameters": LLAMA3}),
        "truncate": ("llama", {"rope_parameters": YARN | {"truncate": False}}),
    }
    for named, (family, settings) in cases.items():
        folder = tiny.make_model(tmp_path / named.split()[-1], family, vocab_size=VOCAB, **settings)
        with pytest.raises(ExportError, match=named):
            write_gguf(folder, tmp_path / "m.gguf")
        assert not (tmp_path / "m.gguf").exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def split_then_bytes(rule: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of a rule as tokenizer.json files have it."""
    if rule == "gpt2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "digits, gpt2":
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole])
    split = pre_tokenizers.Split(Regex(rule), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def byte_level(rule: str, ignore_merges: bool) -> Tokenizer:
    tok = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tok.pre_tokenizer = split_then_bytes(rule)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(tiny.SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator([text for text in TEXTS if "<|" not in text] * 3, trainer)
    return tok


def sentencepiece(prefix: bool) -> Tokenizer:
    """A BPE with byte fallback and the merge list that transformers makes from a SentencePiece model's scores."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    trained.train_from_iterator(tiny.TEXT * 3, trainer)
    pieces = [text for text, _ in sorted(trained.get_vocab().items(), key=lambda pair: pair[1])]
    order = ["<unk>", *tiny.SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {text: number for number, text in enumerate([*order, *pieces])}
    rank = {text: number for number, text in enumerate(pieces)}
    merges = [
        (piece[:at], piece[at:])
        for piece in pieces
        for at in range(1, len(piece))
        if piece[:at] in rank and piece[at:] in rank
    ]
    bpe = models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tok = Tokenizer(bpe)
    replace = normalizers.Replace(" ", "▁")
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    tok.add_special_tokens(list(tiny.SPECIAL))
    return tok


def with_tokenizer(folder: Path, tok: Tokenizer) -> Path:
    """A tiny llama whose tokenizer is `tok`."""
    tiny.make_model(folder, vocab_size=tok.get_vocab_size(), num_hidden_layers=1)
    bos, eos, pad = tiny.SPECIAL[0], tiny.SPECIAL[5], tiny.SPECIAL[2]
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = tiny.CHAT_TEMPLATE
    fast.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        config |= {"bos_token_id": fast.bos_token_id, "eos_token_id": fast.eos_token_id}
        (folder / name).write_text(json.dumps(config))
    return folder


def check_ids(folder: Path, path: Path, texts: tuple[str, ...]) -> tuple[str, ...]:
    tokenizer = load_tokenizer(folder)
    template = make_template("model", tokenizer)
    written = write_gguf(folder, path)
    with loaded(path, vocabulary=True) as model:
        assert [text for text in texts if not same_ids(model, tokenizer, text)] == []
        for text in texts[:40]:
            turns = [Turn("user", text.strip().replace("<|", "")), Turn("assistant", "Yes."), Turn("user", "Why?")]
            prompt = template.render(turns, generation_prompt=True).encode()
            ids = template.prompt_ids(turns)
            assert model.tokenize(prompt, add_bos=False, special=True) == ids
            # Bytes come back as they were: the types of all tokens are right.
            assert model.detokenize(ids, special=True).lstrip() == tokenizer.decode(ids).lstrip().encode()
    return written.notes


@pytest.mark.parametrize(("rule", "ignore_merges"), PRE_TOKENIZERS, ids=list(PRE_TOKENIZERS.values()))
def test_byte_level_ids(rule: str, ignore_merges: bool, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "hf", byte_level(rule, ignore_merges))
    if PRE_TOKENIZERS[rule, ignore_merges] in NEARLY:
        with_marks = tuple(text for text in TEXTS if any(unicodedata.combining(sign) for sign in text))
        notes = check_ids(folder, tmp_path / "m.gguf", tuple(text for text in TEXTS if text not in with_marks))
        assert any("combining marks" in note for note in notes)
        with loaded(tmp_path / "m.gguf", vocabulary=True) as model:  # once these agree, the note can go
            assert not all(same_ids(model, load_tokenizer(folder), text) for text in with_marks)
    else:
        check_ids(folder, tmp_path / "m.gguf", TEXTS)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids(prefix: bool, tmp_path: Path) -> None:
    folder = with_tokenizer(tmp_path / "hf", sentencepiece(prefix))
    texts = tuple(text for text in TEXTS if "<|" not in text)
    check_ids(folder, tmp_path / "m.gguf", texts)


@pytest.mark.shared
def test_llama_3_vocabulary(shared: Path, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf", vocab_size=128256, num_hidden_layers=1, tie_word_embeddings=True)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared / "tokenizers" / "llama-3" / name, folder / name)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"bos_token_id": 128000, "eos_token_id": [128001, 128009]}))
    stories = (shared / "data" / "grimm_stories.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    sums = (shared / "data" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()[:140]
    real = tuple(str(value) for line in (*stories, *sums) for value in json.loads(line).values())
    check_ids(folder, tmp_path / "m.gguf", (*TEXTS, *real))


def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path: Path) -> None:
    split = r"\w+|[^\w\s]+|\s+"
    odd = {
        "pre-tokenizer": byte_level(split, False),
        "merges": sentencepiece(True),
        "normalises": byte_level("gpt2", False),
        "Unigram": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)),
    }
    document = json.loads(odd["merges"].to_str())
    merges = document["model"]["merges"]
    document["model"]["merges"] = merges[::2] + merges[1::2]  # the ways to make a piece are no longer together
    odd["merges"] = Tokenizer.from_str(json.dumps(document))
    odd["normalises"].normalizer = normalizers.Lowercase()
    odd["Unigram"].add_special_tokens(list(tiny.SPECIAL))
    for named, tok in odd.items():
        folder = with_tokenizer(tmp_path / named, tok)
        with pytest.raises(ExportError, match=named):
            write_gguf(folder, tmp_path / "m.gguf")
    assert list(tmp_path.glob("*.gguf")) == []
    assert list(tmp_path.glob(".*.tmp")) == []


# --- sprig ------------------------------------------------------------------------------------------------------------


def held_out(name: str, fields: tuple[str, str]) -> list[tuple[str, str]]:
    files = [ASSETS / "data" / name / f"{side}.jsonl" for side in ("test", "eval")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return [(row[fields[0]], row[fields[1]]) for row in map(json.loads, lines)]


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def sprig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("sprig") / "model.gguf"
    written = write_gguf(SPRIG, path, request.param)
    assert written.kept_f16 == ()
    return request.param, path


def test_sprig_agrees_on_held_out_rows(sprig: tuple[str, Path]) -> None:
    quantize, path = sprig
    decoder = load_decoder(SPRIG, dtype=torch.float32)
    tokenizer = load_tokenizer(SPRIG)
    template = make_template("model", tokenizer)
    pirate = held_out("pirate", ("question", "answer"))
    tales = held_out("tales", ("title", "content"))
    assert len(pirate) == 200
    agree: list[NDArray[np.bool_]] = []
    with loaded(path) as model:
        for first, second in (*pirate, *tales):
            assert same_ids(model, tokenizer, first)
            assert same_ids(model, tokenizer, second)
        for question, answer in (*pirate, *tales[:20]):
            turns = [Turn("user", question), Turn("assistant", answer)]
            text = template.render(turns)
            ids = tokenizer.encode(text, special=True)
            assert model.tokenize(text.encode(), add_bos=False, special=True) == ids
            with torch.inference_mode():
                want = decoder(torch.tensor(ids)).argmax(-1).numpy()
            agree.append(logits_of(model, ids, decoder.config.vocab_size).argmax(-1) == want)
    assert np.concatenate(agree).mean() >= (0.995 if quantize == "f16" else 0.98)


def test_sprig_chats_the_same_and_begins_once(sprig: tuple[str, Path]) -> None:
    _, path = sprig
    decoder = load_decoder(SPRIG, dtype=torch.float32)
    template = make_template("model", load_tokenizer(SPRIG))
    same = 0
    asked = held_out("pirate", ("question", "answer"))[:20]
    with loaded(path) as model:
        for question, _ in asked:
            ids = template.prompt_ids([Turn("user", question)])
            answer = complete(decoder, template.tokenizer, ids, stop_ids=template.stop_ids, max_new_tokens=40)
            reply = model.create_chat_completion(
                [{"role": "user", "content": question}], max_tokens=40, temperature=0.0, repeat_penalty=1.0
            )
            assert not isinstance(reply, Iterator)
            assert reply["usage"]["prompt_tokens"] == len(ids)  # one more would be a second beginning-of-text
            assert reply["choices"][0]["finish_reason"] == "stop"
            same += reply["choices"][0]["message"]["content"] == answer.text
        # Plain text gets its one beginning-of-text from the runtime, since sprig has always seen it first.
        plain = model.tokenize(b"The sky", add_bos=True)
        assert plain == [template.tokenizer.bos_id, *template.tokenizer.encode("The sky")]
    assert same >= 19  # greedy: one near-tie among 20 answers may fall the other way
