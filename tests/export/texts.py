"""Texts on which tokenizers differ, and models whose vocabularies are worth asking: for every runtime's tests."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer

from tests import tiny

PIECES = (
    *("hello", " world", "The", " king's", "I'll", "WE'RE", " naïve", "Größe", "1234567", " 3.14", "x²", "½"),
    *(" ", "  ", "     ", "\t", "\t\t", "\n", "\n\n\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u200b", "\u2028"),
    *(
        "🦙",
        "👩‍👩‍👧",
        "🇩🇪",
        "👍🏽",
        "😀😀😀",
        "❤️",
        "é",
        "日本語",
        "テキスト",
        "한국어",
        "你好，世界。",
        "עברית",
        "العربية",
        "हिन्दी",
        "ไทย",
    ),
    *(
        "def f(x):\n    return x[::-1]  # ok",
        "for (int i=0;i<n;++i){a[i]^=0x1F;}",
        "<div class='a'>&amp;</div>",
        "a_b-c.d/e\\f",
    ),
    *(
        "SELECT * FROM t WHERE a != 'b';",
        "{}[]()<>",
        "...",
        "!?!?",
        "—",
        "“quoted”",
        "#$%^&*",
        "https://example.org/?q=1&r=2",
    ),
)


def mixed(count: int) -> list[str]:
    """`count` texts of words, emoji, CJK, code and runs of white space, put together at random and in NFC."""
    chance = random.Random(7)
    texts = ["".join(chance.choices(PIECES, k=chance.randint(1, 12))) for _ in range(count)]
    return [unicodedata.normalize("NFC", text) for text in texts]


def with_llama_3s_vocabulary(shared: Path, folder: Path) -> Path:
    """A model of one layer with Llama 3's real vocabulary."""
    tiny.make_model(folder, vocab_size=128256, num_hidden_layers=1, tie_word_embeddings=True)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((shared / "tokenizers" / "llama-3" / name).read_bytes())
    for name in ("config.json", "generation_config.json"):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(config | {"bos_token_id": 128000, "eos_token_id": [128001, 128009]}))
    return folder


ADDED_TEXTS = ("a <item> b", "<item><item>", "agizmob gizmo", "<|call|> as text", "x<item>\n\n<item> y")


def with_added_tokens(folder: Path, tied: bool) -> Path:
    """A model with three tokens that a user added, 400 to 402, the last one special."""
    tiny.make_model(folder, vocab_size=416, tie_word_embeddings=tied)
    fast = AutoTokenizer.from_pretrained(folder)
    fast.add_tokens([AddedToken("<item>", normalized=False), AddedToken("gizmo", normalized=False)])
    fast.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    fast.save_pretrained(folder)
    return folder
