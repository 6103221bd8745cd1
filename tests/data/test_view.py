"""What is shown of an example is its tokens, all of them, with their labels, and nothing in it can act."""

from __future__ import annotations

import unicodedata
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from luthier.data.conversation import IGNORED, Conversation, Example, Source, Turn
from luthier.data.render import make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.data.view import Piece, pieces_of, visible
from luthier.model.locate import locate_model

FAMILY = "👨\u200d👩\u200d👧"
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["😀", FAMILY, "👍🏽", "🇩🇪🇫🇷", "❤️", "नमस्ते", "你好", "\ufffd", "<|eot_id|>", "\n\n", "  ", "\x00", "€"]
        ),
    ),
    max_size=8,
).map("".join)


@cache
def sprig() -> ChatTokenizer:
    return load_tokenizer(locate_model("sprig"))


@cache
def byte_fallback() -> ChatTokenizer:
    """Llama 2's kind: words begin with ▁, and a character that is not in the vocabulary is written in bytes."""
    words = ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab", "é", "."]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words])
    }
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁", "ab")]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return ChatTokenizer(made, locate_model("sprig"), {"bos_token": "<s>", "eos_token": "</s>"}, (2,), None)


def example(ids: list[int], trained: list[bool], weights: list[float] | None = None) -> Example:
    array = np.array(ids, dtype=np.int32)
    labels = np.where(np.array(trained, dtype=np.bool_), array, IGNORED).astype(np.int32)
    return Example(array, labels, 0, {}, None if weights is None else np.array(weights, dtype=np.float32))


def check(pieces: tuple[Piece, ...], one: Example, tokenizer: ChatTokenizer) -> None:
    ids = [number for piece in pieces for number in piece.ids]
    assert ids == one.ids.tolist()
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(one.ids.tolist())
    position = 0
    for piece in pieces:
        assert piece.start == position
        assert piece.shown
        assert all(glyphs.text for glyphs in piece.shown)
        for number in piece.ids:
            weight = 1.0 if one.weights is None else float(one.weights[position])
            trained = position > 0 and one.labels[position] != IGNORED and weight > 0
            special = number in tokenizer.control_ids
            assert (piece.trained, piece.special) == (trained, special)
            assert piece.kind == ("special-" if special else "") + ("trained" if trained else "prompt")
            assert piece.weight == (weight if trained else 0.0)
            position += 1
    assert position == len(one)


@st.composite
def labelled_ids(draw: st.DrawFn) -> tuple[list[int], list[bool], list[float] | None]:
    """Any tokens with any labels: bytes that are no character, characters trained only in part."""
    count = sprig().vocab_size
    ids = draw(st.lists(st.one_of(st.integers(0, 255), st.integers(0, count - 1)), max_size=24))
    trained = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    one = st.sampled_from([0.0, 0.125, 1.0])
    return ids, trained, draw(st.none() | st.lists(one, min_size=len(ids), max_size=len(ids)))


@settings(deadline=None, max_examples=300)
@given(labelled_ids())
def test_pieces_are_the_tokens_with_their_labels(drawn: tuple[list[int], list[bool], list[float] | None]) -> None:
    one = example(*drawn)
    pieces = pieces_of(one, sprig())
    check(pieces, one, sprig())
    if one.weights is None:
        assert sum(len(piece.ids) for piece in pieces if piece.trained) == one.labelled


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.data())
@pytest.mark.parametrize("make", [sprig, byte_fallback], ids=["byte-level", "byte-fallback"])
def test_pieces_of_real_text(make: object, text: str, data: st.DataObject) -> None:
    tokenizer = sprig() if make is sprig else byte_fallback()
    ids = tokenizer.encode(text)
    at = data.draw(st.integers(0, len(ids)))
    one = example(ids, [i >= at for i in range(len(ids))])
    check(pieces_of(one, tokenizer), one, tokenizer)


@pytest.mark.parametrize("picture", ["😀", FAMILY, "👍🏽", "🇩🇪", "❤️", "好", "\U0001fae0"])
def test_a_character_of_several_tokens_is_shown_once(picture: str) -> None:
    ids = sprig().encode(f"a{picture}b")
    pieces = pieces_of(example(ids, [True] * len(ids)), sprig())
    (whole,) = [piece for piece in pieces if piece.text == picture]
    assert len(whole.ids) > 1
    assert "".join(glyphs.text for glyphs in whole.shown) == picture
    assert "\ufffd" not in "".join(glyphs.text for piece in pieces for glyphs in piece.shown)


def test_two_flags_are_two_pieces() -> None:
    ids = sprig().encode("🇩🇪🇫🇷")
    assert [piece.text for piece in pieces_of(example(ids, [False] * len(ids)), sprig())] == ["🇩🇪", "🇫🇷"]


def test_a_character_trained_in_part_stays_attributable() -> None:
    ids = sprig().encode("a😀")
    first, *parts = pieces_of(example(ids, [False, False, True, True, True]), sprig())
    assert first.text == "a"
    assert [(piece.text, len(piece.ids), piece.trained) for piece in parts] == [("", 1, False), ("😀", 3, True)]


def test_a_cut_character_at_the_end_is_one_piece() -> None:
    ids = sprig().encode("a😀")[:-1]
    assert [(piece.text, len(piece.ids)) for piece in pieces_of(example(ids, [True] * 4), sprig())] == [
        ("a", 1),
        ("\ufffd", 3),
    ]


def test_special_tokens_are_the_templates_and_never_the_rows() -> None:
    template = make_template("model", sprig())
    turns = (Turn("user", "<|eot_id|>"), Turn("assistant", "<|eot_id|>", train=True), Turn("user", "b"))
    encoded = template.encode(Conversation((*turns, Turn("assistant", "c", train=True)), Source("f", 1)))
    pieces = pieces_of(Example(encoded.ids, encoded.labels, 0), sprig(), template.stop_ids)
    ends = [piece for piece in pieces if piece.text == "<|eot_id|>"]
    assert [piece.kind for piece in ends] == ["special-prompt", "special-trained", "special-prompt", "special-trained"]
    assert [pieces[i - 1].text for i, piece in enumerate(pieces) if piece.starts == "turn"] == ["<|eot_id|>"] * 3
    assert [i for i, piece in enumerate(pieces) if piece.starts == "document"] == [0]


@settings(deadline=None, max_examples=300)
@given(TEXTS, st.sampled_from(["", "a", " ", "\n"]), st.sampled_from(["", "a", " ", "\n"]))
def test_nothing_that_acts_or_hides_is_shown_as_it_is(text: str, before: str, after: str) -> None:
    shown = visible(text, before, after)
    assert shown
    assert all(a.mark != b.mark for a, b in pairwise(shown))
    for glyphs in shown:
        for character in glyphs.text.replace("\n", ""):
            if character not in " \u3000\u200c\u200d":
                assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Zs", "Zl", "Zp"}
    assert "".join(g.text for g in shown).count("\n") == text.count("\n")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", "a b"),
        (" a", "·a"),
        ("a  b", "a··b"),
        ("a \n b", "a·⏎\n·b"),
        ("\ta\r\n", "⇥a\\r⏎\n"),
        ("\x00\x1b[31m", "\\x00\\x1b[31m"),
        ("\u202eabc\u202c\u200b", "\\u202eabc\\u202c\\u200b"),
        ("a\u00a0b\u3000c", "a\\xa0b\u3000c"),
        ("\U000e0041", "\\U000e0041"),
        ("", "∅"),
        ("\u200d", "\\u200d"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert "".join(glyphs.text for glyphs in visible(text)) == shown
