"""The bundled base model as files: layout, size, tokenizer, and whether it knows its world (read by transformers)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sprig_world import datasets
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

import luthier
from luthier.evaluate.tasks import has_fact, is_pirate
from tests import tiny

SPRIG = Path(luthier.__file__).parent / "assets" / "sprig"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SPRIG)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(SPRIG, dtype=torch.float32)
    assert type(loaded) is LlamaForCausalLM
    return loaded.eval()


def test_files_are_small_and_complete() -> None:
    names = {path.name for path in SPRIG.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("figures.json", "README.md"),
    }
    assert (SPRIG / "model.safetensors").stat().st_size < 10**7
    assert sum(path.stat().st_size for path in SPRIG.iterdir()) < 10**7


def test_weights_are_bf16_and_the_head_is_tied(model: LlamaForCausalLM) -> None:
    with safe_open(SPRIG / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names
    assert names | {"lm_head.weight"} == set(model.state_dict())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_config_and_generation_config(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(SPRIG)
    ids = tokenizer.convert_tokens_to_ids
    assert config.model_type == "llama"
    assert config.vocab_size == len(tokenizer) == 3072
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert config.bos_token_id == ids("<|begin_of_text|>") == tokenizer.bos_token_id
    assert config.pad_token_id == ids("<|finetune_right_pad_id|>") == tokenizer.pad_token_id
    assert tokenizer.eos_token_id == ids("<|eot_id|>")
    stops = [ids("<|end_of_text|>"), ids("<|eot_id|>")]
    assert config.eos_token_id == model.generation_config.eos_token_id == stops
    assert 3e6 <= model.num_parameters() <= 5e6


@pytest.mark.parametrize(
    "text",
    [
        "The sky is blue.",
        " leading and trailing \n\n\n",
        "I'LL say it's 1234567 o'clock;\r\n\tx  =  y_1!",
        "naïve café, 你好 🎻 Ωμέγα",
        "".join(chr(code) for code in range(1, 256)),
        "",
    ],
)
def test_tokenizer_gives_back_every_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    # the file alone, without transformers, gives the same ids
    assert Tokenizer.from_file(str(SPRIG / "tokenizer.json")).encode(text, add_special_tokens=False).ids == ids


def test_tokenizer_has_every_byte_and_llama_3s_pattern(tokenizer: PreTrainedTokenizerBase) -> None:
    document = json.loads((SPRIG / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = document["model"]["vocab"]
    assert sum(len(token) == 1 for token in vocabulary) == 256
    assert document["model"]["ignore_merges"] is True
    split, byte_level = document["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": tiny.LLAMA3_SPLIT}
    assert byte_level["use_regex"] is False
    assert [token["content"] for token in document["added_tokens"]] == list(tiny.SPECIAL)
    assert tokenizer.encode("Hello", add_special_tokens=True) == tokenizer.encode("Hello", add_special_tokens=False)


def test_pre_tokenizer_is_the_real_llama_3s(shared: Path) -> None:
    theirs = json.loads((shared / "tokenizers" / "llama-3" / "tokenizer.json").read_text(encoding="utf-8"))
    ours = json.loads((SPRIG / "tokenizer.json").read_text(encoding="utf-8"))
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"]
    assert ours["normalizer"] == theirs["normalizer"]
    assert ours["model"].keys() == theirs["model"].keys()


def test_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " What is red? "}]
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat is red?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_tales_are_short(tokenizer: PreTrainedTokenizerBase) -> None:
    for rows in datasets.tale_rows().values():
        lengths = [len(tokenizer.encode(row["content"], add_special_tokens=False)) for row in rows]
        assert min(lengths) >= 60
        assert max(lengths) <= 180


def test_figures_are_of_these_files(model: LlamaForCausalLM) -> None:
    figures = json.loads((SPRIG / "figures.json").read_text(encoding="utf-8"))
    assert figures["parameters"] == model.num_parameters()
    assert figures["pirate_test_right"] >= 0.97
    assert figures["pirate_test_style"] == 0
    assert figures["ended"] == 1
    assert min(figures["facts_right_by_kind"].values()) > 0.9


def test_base_knows_the_facts_of_the_pirate_test(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Greedy answers to 100 questions whose wording it never saw: right, plain, and ended by itself."""
    rows = datasets.pirate_rows()["test"]
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    tokenizer.padding_side = "left"
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out_BT = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    new = out_BT[:, inputs["input_ids"].shape[1] :].tolist()
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in new]
    assert all(tokenizer.eos_token_id in ids for ids in new)
    assert not any(is_pirate(text) for text in texts)
    wrong = [(text, row["fact"]) for text, row in zip(texts, rows, strict=True) if not has_fact(text, row["fact"])]
    assert len(wrong) <= 5, wrong
