"""A tokenizer that was loaded once is the same one when it is loaded again, without transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from luthier.data.tokenizer import load_tokenizer
from luthier.data.tokenizer_cache import find_tokenizer
from tests.data.chats import make_chat_tokenizer

TEXTS = ["Hello, world!", "  naïve café 你好\n\n", "<|eot_id|> inside", "1234567 + 89", ""]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))


def test_the_second_is_the_first(tmp_path, monkeypatch):
    first = make_chat_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setattr("luthier.data.tokenizer._load", lambda _: pytest.fail("loaded by transformers again"))
    second = load_tokenizer(tmp_path / "tokenizer")
    assert second.backend.to_str() == first.backend.to_str()
    for name in ("special", "eos_ids", "chat_template", "fingerprint", "controls", "bos_id", "adds_bos", "folder"):
        assert getattr(second, name) == getattr(first, name), name
    assert [second.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_changed_file_is_loaded_anew(tmp_path, name):
    folder = tmp_path / "tokenizer"
    make_chat_tokenizer(folder)
    assert find_tokenizer(folder) is not None
    document = json.loads((folder / name).read_text(encoding="utf-8"))
    (folder / name).write_text(json.dumps({**document, "x": 1}), encoding="utf-8")
    assert find_tokenizer(folder) is None


def test_a_new_chat_template_is_the_one_that_counts(tmp_path):
    folder = tmp_path / "tokenizer"
    make_chat_tokenizer(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}<|eot_id|>", encoding="utf-8")
    assert load_tokenizer(folder).chat_template == "{{ messages[0]['content'] }}<|eot_id|>"


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    assert make_chat_tokenizer(tmp_path / "tokenizer").encode("Hello")


def test_damaged_leftovers_are_not_used(tmp_path):
    folder = tmp_path / "tokenizer"
    make_chat_tokenizer(folder)
    (about,) = (tmp_path / "cache" / "tokenizers").glob("*/about.json")
    about.write_text("{", encoding="utf-8")
    assert find_tokenizer(folder) is None
    assert load_tokenizer(folder).encode("Hello")


def test_neither_transformers_nor_torch_is_imported(tmp_path):
    make_chat_tokenizer(tmp_path / "tokenizer")
    code = (
        "import sys; from pathlib import Path; from luthier.data.tokenizer import load_tokenizer;"
        f"load_tokenizer(Path({str(tmp_path / 'tokenizer')!r}));"
        "print([name for name in ('transformers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
