"""Small random models and a small tokenizer, made by transformers and tokenizers, never by our own code.

So a test that compares ours with the reference starts from files that nobody here wrote. Awkward on purpose: grouped
queries, a head size that is not hidden/heads, odd widths, non-trivial norm weights and biases.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog. What colour is the sky? The sky is blue, it's 1234 miles away!",
    "A king had three daughters; the eldest said: 'I'll go.' And they went on and on, over hill and dale.\n\nThe end.",
    "def add(a, b):\n    return a + b\n# naïve café — 你好",
]


@cache
def _tokenizer_json() -> str:
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(TEXT * 4, trainer)
    return tok.to_str()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 entries with Llama 3's split pattern, special tokens and chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(
    folder: Path, family: str = "llama", *, seed: int = 0, max_shard_size: str = "5GB", **overrides: object
) -> Path:
    """Write a random model of `family` (llama, mistral, qwen2, qwen3) in transformers' layout, fp32; returns `folder`.

    `overrides` go to the transformers config, e.g. `tie_word_embeddings=True` or `rope_parameters={...}`.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.08,
    }
    if family in ("qwen2",):  # qwen2's head size is always hidden/heads
        del settings["head_dim"]
    settings.update(overrides)
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms start at one and biases at zero, which would hide a mistake
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSONL; returns `path`."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
