"""Tokenizers read without transformers are what transformers makes of the same files; the rest is left to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.data.tokenizer import _load, _load_by_transformers
from luthier.data.tokenizer_plain import read_plain
from luthier.errors import FileError, ModelError
from luthier.model.locate import locate_model
from tests import tiny

TEXTS = ["Hello, world!", "  naïve café 你好\n\n", "<|eot_id|> inside", "1234567 + 89", "", "Ärger's\tlot"]
Change = Callable[[Path], None]


def same(folder: Path) -> None:
    """Held against transformers: ids, special tokens, and the digest over everything that decides ids."""
    ours, theirs = _load(folder), _load_by_transformers(folder)
    assert read_plain(folder) is not None, "or transformers was held against itself"
    assert ours.backend.to_str() == theirs.backend.to_str()
    for name in ("special", "eos_ids", "chat_template", "fingerprint", "controls", "bos_id", "adds_bos", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]


def test_the_bundled_model() -> None:
    same(locate_model("sprig"))


def test_llama_3(shared: Path) -> None:
    """Its own class, `PreTrainedTokenizerFast`, and 256 special tokens; more than 100,000 entries, where transformers
    looks whether it has to mend a Mistral."""
    same(shared / "tokenizers" / "llama-3")


def test_a_model_that_transformers_saved(tiny_llama: Path) -> None:
    same(tiny_llama)


@pytest.mark.parametrize(
    "damage",
    [{"model": {"type": "of the future"}}, {"added_tokens": [{"content": "<x>"}]}, {"added_tokens": ["<x>"]}],
    ids=str,
)
def test_a_damaged_or_newer_file_is_left_to_transformers(
    tmp_path: Path, tiny_llama: Path, damage: dict[str, object]
) -> None:
    """Whose errors have a message of ours."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    whole(folder, **damage)
    assert read_plain(folder) is None
    with pytest.raises(ModelError):
        _load(folder)


def decoder(folder: Path, **changes: object) -> None:
    """The special tokens once more, as transformers 4 wrote them."""
    listed = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    again = {str(one["id"]): {name: one[name] for name in one if name != "id"} | changes for one in listed}
    config(folder, added_tokens_decoder=again)
    (folder / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|begin_of_text|>"}))


def config(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def whole(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        decoder,
        lambda folder: whole(folder, post_processor=None),
        lambda folder: config(folder, local_files_only=False),
        lambda folder: config(folder, pad_token=None, tokenizer_class="PreTrainedTokenizerFast"),
        lambda folder: (folder / "chat_template.jinja").unlink(),
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": [3, 4]}'),
    ],
    ids=["saved", "decoder", "no post-processor", "where it was loaded", "old class", "no template", "with a model"],
)
def test_what_is_read_here_is_what_transformers_reads(folder: Path, change: Change) -> None:
    change(folder)
    same(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: config(folder, tokenizer_class="LlamaTokenizerFast"),
        lambda folder: config(folder, add_bos_token=True),
        lambda folder: config(folder, eos_token="<|brand new|>"),
        lambda folder: config(folder, eos_token={"content": "<|eot_id|>", "__type": "AddedToken"}),
        lambda folder: config(folder, extra_special_tokens=["<|more|>"]),
        lambda folder: decoder(folder, lstrip=True),
        lambda folder: (folder / "special_tokens_map.json").write_text("{}"),
        lambda folder: (folder / "added_tokens.json").write_text("{}"),
        lambda folder: (folder / "config.json").write_text('{"model_type": "mistral"}'),
        lambda folder: (folder / "tokenizer_config.json").unlink(),
        lambda folder: (folder / "additional_chat_templates").mkdir(),
        lambda folder: whole(folder, padding={"strategy": "BatchLongest"}),
    ],
)
def test_what_is_left_to_transformers(folder: Path, change: Change) -> None:
    assert read_plain(folder) is not None
    change(folder)
    assert read_plain(folder) is None


def test_settings_that_are_no_json_are_refused(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(FileError, match="not valid JSON"):
        read_plain(folder)
