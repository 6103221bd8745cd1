"""A model's files as inputs: weights, index, config, tokenizer; and a checkpoint's manifest."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import cast

from tests.fuzz.changes import Json, bent, bent_sometimes, changed, twice


class Header:
    """A safetensors file: its header changed, its length, its end."""

    def make(self, chance: random.Random) -> bytes:
        header: dict[str, Json] = {"__metadata__": {"format": "pt"}}
        size = 0
        for number in range(chance.randint(0, 4)):
            dtype, width = chance.choice([("F32", 4), ("BF16", 2), ("U8", 1), ("F64", 8)])
            shape: list[Json] = [chance.randint(0, 5) for _ in range(chance.randint(0, 3))]
            count = width
            for length in shape:
                count *= cast("int", length)
            name = chance.choice(["model.embed_tokens.weight", f"a.{number}", "lm_head.weight"])
            header[f"{name}.{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + count]}
            size += count
        document: Json = changed(header, chance) if chance.random() < 0.7 else header
        text = json.dumps(document).encode()
        text = twice(text, chance) if chance.random() < 0.05 else bent_sometimes(text, chance)
        text += b" " * chance.choice([0, 0, 1, 7])
        length = chance.choice([len(text)] * 12 + [0, 1, len(text) - 1, len(text) + 1, 2**31, 2**60, 2**64 - 1])
        body = bytes(chance.randrange(256) for _ in range(min(64, size))) + b"\0" * max(0, size - 64)
        return struct.pack("<Q", max(0, length)) + text + body[: chance.choice([size] * 8 + [size // 2, 0])]

    def read(self, text: bytes, folder: Path) -> None:
        from safetensors import safe_open

        from luthier.guard.header import check_safetensors

        path = folder / "model.safetensors"
        path.write_bytes(text)
        header = check_safetensors(path)
        with safe_open(path, framework="np") as library:  # what passed is what the library reads, to the last tensor
            assert sorted(library.keys()) == sorted(header.tensors)
            for name, stored in header.tensors.items():
                assert tuple(library.get_slice(name).get_shape()) == stored.shape
                assert str(library.get_slice(name).get_dtype()) == stored.dtype


class Index:
    """model.safetensors.index.json beside two shards."""

    NAMES: tuple[Json, ...] = ("model-1.safetensors", "../secret.safetensors", "/x.safetensors", "sub/x.safetensors",
                               "model-1.bin", "link.safetensors", "C:x.safetensors", "//h/x.safetensors")  # fmt: skip

    def make(self, chance: random.Random) -> bytes:
        weights: dict[str, Json] = {f"layer.{i}": f"model-{1 + i % 2}.safetensors" for i in range(4)}
        document: Json = {"metadata": {"total_size": 64}, "weight_map": weights}
        text = json.dumps(changed(document, chance, self.NAMES)).encode()
        return twice(text, chance) if chance.random() < 0.05 else bent_sometimes(text, chance)

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.guard.inside import check_folder
        from luthier.model.locate import weight_files

        model = folder / "model"
        if not model.is_dir():
            model.mkdir()
            for name in ("model-1.safetensors", "model-2.safetensors", "../secret.safetensors"):
                (model / name).write_bytes(struct.pack("<Q", 2) + b"{}")
            (folder / "link.safetensors").symlink_to(folder / "secret.safetensors")
        (model / "model.safetensors.index.json").write_bytes(text)
        check_folder(model)
        for file in weight_files(model):
            assert file.resolve().parent == model.resolve(), f"{file} is outside"


class Config:
    """config.json and generation_config.json of a model, and what a plan makes of them."""

    def make(self, chance: random.Random) -> bytes:
        document: Json = {
            "architectures": ["LlamaForCausalLM"], "model_type": chance.choice(["llama", "mistral", "qwen2", "qwen3"]),
            "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
            "bos_token_id": 0, "eos_token_id": [1, 2], "hidden_act": "silu", "sliding_window": 64,
            "layer_types": ["full_attention"] * 3, "use_sliding_window": True, "max_window_layers": 1,
            "rope_scaling": chance.choice([
                None,
                {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                 "original_max_position_embeddings": 256},
                {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
                {"type": "linear", "factor": 2.0},
            ]),
        }  # fmt: skip
        text = json.dumps(changed(document, chance) if chance.random() < 0.95 else document).encode()
        return twice(text, chance) if chance.random() < 0.05 else bent_sometimes(text, chance)

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.model.config import MOST_PARAMETERS, parameters, projection_shapes, read_config

        (folder / "config.json").write_bytes(text)
        (folder / "generation_config.json").write_bytes(text)
        config = read_config(folder)
        assert 0 < parameters(config) <= MOST_PARAMETERS
        assert all(config.layer_window(layer) is None or config.window for layer in range(config.layers))
        assert len(projection_shapes(config)) == 7


class Tokenizer:
    """tokenizer.json of a small byte-level BPE, and what it makes of texts."""

    OWN: tuple[Json, ...] = (
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}, {"type": "Prepend", "prepend": "x" * 60},
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 8}] * 9},
        {"type": "Precompiled", "precompiled_charsmap": "/////w=="}, {"type": "NFKC"}, {"type": "BertNormalizer"},
        {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}, {"type": "Bogus"},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}, {"type": "ByteLevel"},
        {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
         "pad_token": "x"},
        {"max_length": 4, "stride": 9, "strategy": "LongestFirst", "direction": "Right"},
        {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 40, "pair": [],
         "special_tokens": {}}, {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"},
        {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0], ["b", -2.0]], "byte_fallback": False},
        {"type": "FixedLength", "length": 0}, 4294967295, "ab" * 100, {"type": "Digits", "individual_digits": True},
    )  # fmt: skip

    def __init__(self) -> None:
        from tests import tiny

        self.document: Json = json.loads(tiny._tokenizer_json())

    def make(self, chance: random.Random) -> bytes:
        document = self.document
        assert isinstance(document, dict)
        if chance.random() < 0.6:  # a whole part replaced, or changed by itself: the vocabulary would take most changes
            part = chance.choice(
                ["normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding", "added_tokens"]
            )
            held = document[part] if chance.random() < 0.5 else chance.choice(self.OWN)
            document = {**document, part: changed(held, chance, self.OWN) if isinstance(held, (dict, list)) else held}
        else:
            document = cast("dict[str, Json]", changed(document, chance, self.OWN))
        return bent_sometimes(json.dumps(document).encode(), chance, 0.15)

    def read(self, text: bytes, folder: Path) -> None:
        from luthier.data.tokenizer import load_tokenizer

        (folder / "tokenizer.json").write_bytes(text)
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 5}', encoding="utf-8")
        tokenizer = load_tokenizer(folder)
        for words in ("Hello there, it's 3 aaaa!\n\n ok", "<|eot_id|>a<|eot_id|>", "", "ё̈🦙"):
            ids = tokenizer.encode(words)
            assert all(0 <= number < 2**22 for number in ids)
            tokenizer.decode(ids)
            tokenizer.tokens([(words, "")])
        tokenizer.is_control.sum()


class Manifest:
    """manifest.json and state.json of a checkpoint, changed together so that their hashes still agree, or apart."""

    def make(self, chance: random.Random) -> bytes:
        state: Json = {
            "schema": 2, "progress": {"step": 7, "tokens": 99, "history": [[1, 0.5]], "best_step": 1, "best_eval": 0.5},
            "follows": {"epoch": 0, "unit": 3, "units_per_epoch": 9, "learning_rate": 0.1}, "plan_sha256": "ab" * 32,
            "identity": {"base": "sprig", "data": "d", "settings": {"rank": 8}},
            "recipe_sha256": None, "made_with": {"torch": "2", "threads": 1, "processor": "x"},
            "loss_scale": None,
        }  # fmt: skip
        files: dict[str, Json] = {
            "state.json": {"bytes": 9, "sha256": "0" * 64},
            "a/b.safetensors": {"bytes": 0, "sha256": "e3"},
        }
        manifest: Json = {"schema": 2, "kind": "checkpoint", "step": 7, "files": files}
        own: tuple[Json, ...] = ("state.json", "../state.json", "manifest.json", "checkpoint", "adapter")
        if chance.random() < 0.5:
            state = changed(state, chance, own)
        if chance.random() < 0.7:
            manifest = changed(manifest, chance, own)
        seal = chance.random() < 0.7
        return (
            json.dumps([state, manifest, seal]).encode()
            if chance.random() < 0.8
            else bent(json.dumps(state).encode(), chance)
        )

    def read(self, text: bytes, folder: Path) -> None:
        import hashlib

        import orjson

        from luthier.train.checkpoint import read_state
        from luthier.train.manifest import check

        try:
            state, manifest, seal = json.loads(text)
        except (ValueError, TypeError, RecursionError):
            (folder / "state.json").write_bytes(text)
            (folder / "manifest.json").write_bytes(text)
        else:
            written = json.dumps(state).encode()
            (folder / "state.json").write_bytes(written)
            record = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
            if isinstance(manifest, dict):
                if seal and isinstance(manifest.get("files"), dict) and "state.json" in manifest["files"]:
                    manifest["files"]["state.json"] = record
                options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
                try:
                    own = hashlib.sha256(orjson.dumps(manifest, option=options)).hexdigest()
                    (folder / "manifest.json").write_bytes(orjson.dumps({**manifest, "sha256": own}, option=options))
                except TypeError:  # a number that orjson does not write
                    (folder / "manifest.json").write_bytes(json.dumps(manifest).encode())
            else:
                (folder / "manifest.json").write_bytes(json.dumps(manifest).encode())
        check(folder, "checkpoint", 7)  # gives what is wrong; it must not raise
        read_state(folder)
