"""The files beside tokenizer.json as inputs: those that transformers reads."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.fuzz.changes import Json, bent_sometimes, changed, twice

TOKEN: dict[str, Json] = {
    "content": "<x>",
    **dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False),
    "special": True,
}


class TokenizerSettings:
    """One of the files beside a small tokenizer.json changed, in a folder that only transformers can read."""

    FILES: dict[str, Json] = {  # noqa: RUF012  (never changed)
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
            "extra_special_tokens": ["<a>", "<b>"], "model_max_length": 512, "unknown_here": 1,
            "added_tokens_decoder": {"400": TOKEN}, "padding_side": "left", "add_bos_token": True,
        },
        "special_tokens_map.json": {"bos_token": "<|begin_of_text|>", "eos_token": TOKEN, "pad_token": None},
        "added_tokens.json": {"<|more|>": 400, "<|most|>": 401},
        "config.json": {"model_type": "llama", "eos_token_id": 5, "bos_token_id": 0},
        "chat_template.json": {"chat_template": "{{ messages }}"},
    }  # fmt: skip
    OWN: tuple[Json, ...] = (
        *("<" * 600, "<|eot_id|>", "LlamaTokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "BertTokenizer", 2**31),
        *(["<" * 150 + str(n) for n in range(2000)], {**TOKEN, "__type": "AddedToken"}, "mistral", "qwen2", [[1]]),
        *({"default": "{{ x }}", "tool_use": "{{ y }}"}, [{"name": "default", "template": "{{ x }}"}]),
    )

    def __init__(self) -> None:
        from tests import tiny

        self.tokenizer = tiny._tokenizer_json()

    def make(self, chance: random.Random) -> bytes:
        name = chance.choice(list(self.FILES))
        text = json.dumps(changed(self.FILES[name], chance, self.OWN)).encode()
        text = twice(text, chance) if chance.random() < 0.05 else bent_sometimes(text, chance, 0.1)
        return bytes([list(self.FILES).index(name)]) + text

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.data.tokenizer import load_tokenizer

        files = {name: json.dumps(document).encode() for name, document in self.FILES.items()}
        files[list(self.FILES)[text[0]]] = text[1:]
        for name, content in files.items():
            (folder / name).write_bytes(content)
        (folder / "tokenizer.json").write_text(self.tokenizer, encoding="utf-8")
        made = load_tokenizer(folder)
        ids = made.encode("Hello <|eot_id|> <a> 你好")
        assert not set(ids) & made.control_ids
        assert isinstance(made.decode(ids), str)
        assert len(made.is_control) < 2**22
        assert made.eos_token is None or isinstance(made.eos_token, str)
