"""Untrained chat tokens, read off real files that transformers wrote, in each number format and over shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.model.untrained import untrained_tokens


def saved(source: Path, folder: Path, dtype: torch.dtype, shard: str = "5GB") -> Path:
    """The tiny llama with token 20 all but zero, and 30 and 31 the same, as rows are that were only initialised."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[20] *= 1e-6
        rows[31] = rows[30]
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_tokens_without_training_are_found(tiny_llama, tmp_path, dtype, shard):
    folder = saved(tiny_llama, tmp_path / "model", dtype, shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "40KB")
    assert untrained_tokens(folder, [10, 20, 30]) == (20,)
    assert untrained_tokens(folder, [10, 20, 30, 31]) == (20, 30, 31)
    assert untrained_tokens(folder, [10, 11, 10**9]) == ()


def test_the_bundled_model_was_trained_on_its_chat_tokens():
    from luthier.data.tokenizer import load_tokenizer
    from luthier.model.locate import locate_model

    folder = locate_model("sprig")
    tokenizer = load_tokenizer(folder)
    used = [tokenizer.token_id(name) for name in ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")]
    assert untrained_tokens(folder, [number for number in used if number is not None]) == ()
