"""Tokens one by one: their bytes joined are the text's, in both ways of writing bytes into a vocabulary."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers

from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.serve.pieces import Pieces

TEXTS = (
    "The sky is blue.",
    "naïve café",
    "你好，世界",
    "a\tb\r\n\n  c",
    "👩‍🚀 éé",
    "def f():\n    return 1",
    "\x00\x7f",
)


def sentencepiece_style(folder: Path) -> ChatTokenizer:
    """Byte fallback and U+2581 for spaces, as Llama 2's."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(chr(byte) for byte in range(33, 127)), "\u2581"]
    tokenizer = Tokenizer(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return ChatTokenizer(tokenizer, folder, {}, [], None)


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_bytes_of_tokens_joined_are_the_text(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(tiny_llama) if kind == "byte-level" else sentencepiece_style(tmp_path)
    pieces = Pieces(tokenizer)
    for text in TEXTS:
        found = [pieces(token) for token in tokenizer.encode(text)]
        assert b"".join(bytes(raw) for _, raw in found).decode() == text
        assert all(shown == bytes(raw).decode("utf-8", "replace") for shown, raw in found)


def test_a_control_token_is_its_name_and_an_unknown_id_nothing(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    end = tokenizer.token_id("<|eot_id|>")
    assert end is not None
    assert Pieces(tokenizer)(end) == ("<|eot_id|>", list(b"<|eot_id|>"))
    assert Pieces(tokenizer)(10**6) == ("", [])
