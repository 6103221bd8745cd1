"""The decoder with itself: packing, cache, checkpointing. (Against transformers: tests/parity/.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.kernels import linear_cross_entropy
from luthier.model.cache import Cache
from luthier.model.config import parameters, read_config
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny

WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
MODELS = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "mistral with a window": ("mistral", {"sliding_window": 6}),
    "qwen2 with a window in its upper layers": ("qwen2", WINDOWED),
    "qwen3": ("qwen3", {}),
}
TOLERANCE = 2e-5
"""fp32 logits of size about 3: other row counts sum in another order: 2^-23 x sqrt(80) x 3 layers x 3, twice."""


@pytest.fixture(scope="module", params=list(MODELS))
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    family, overrides = MODELS[request.param]
    folder = tiny.make_model(tmp_path_factory.mktemp("decoder") / family, family, **overrides)
    return load_decoder(folder, dtype=torch.float32)


def ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 400, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("lengths", [(17, 1, 9), (8, 8, 8), (27,)])
def test_packed_documents_are_the_documents_alone(decoder: Decoder, lengths: tuple[int, ...]) -> None:
    tokens = ids(sum(lengths))
    with torch.no_grad():
        packed = decoder(tokens, lengths)
        alone = torch.cat([decoder(document) for document in tokens.split(lengths)])
    torch.testing.assert_close(packed, alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("steps", [(1,) * 21, (13, *(1,) * 8), (4, 9, 8), (21,)])
def test_cached_reading_is_the_full_forward(decoder: Decoder, steps: tuple[int, ...]) -> None:
    tokens = ids(21)
    cache = Cache(decoder.config, 21, torch.float32, "cpu")
    with torch.inference_mode():
        full = decoder(tokens)
        parts = [decoder.logits(decoder.hidden(part, cache=cache)) for part in tokens.split(steps)]
    assert cache.length == 21
    torch.testing.assert_close(torch.cat(parts), full, atol=TOLERANCE, rtol=0)


def test_a_cut_cache_goes_on_from_there(decoder: Decoder) -> None:
    tokens = ids(12)
    cache = Cache(decoder.config, 16, torch.float32, "cpu")
    with torch.inference_mode():
        decoder.hidden(tokens, cache=cache)
        cache.truncate(5)
        again = decoder.hidden(tokens[5:], cache=cache)
        torch.testing.assert_close(again, decoder.hidden(tokens)[5:], atol=TOLERANCE, rtol=0)


def test_a_full_cache_says_so(decoder: Decoder) -> None:
    cache = Cache(decoder.config, 4, torch.float32, "cpu")
    with pytest.raises(ValueError, match="room for 4 tokens, 5 are needed"):
        decoder.hidden(ids(5), cache=cache)


@pytest.mark.parametrize("lengths", [(3, 3), (7, 0), (), (8,)])
def test_lengths_that_are_not_the_ids_are_refused(decoder: Decoder, lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not make up ids"):
        decoder(ids(7), lengths)


def test_the_config_counts_the_weights(decoder: Decoder) -> None:
    assert sum(weight.numel() for weight in decoder.parameters()) == parameters(decoder.config)


def test_it_comes_frozen_and_in_eval_mode(decoder: Decoder) -> None:
    assert not decoder.training
    assert not any(weight.requires_grad for weight in decoder.parameters())


def _gradients(folder: Path, checkpointing: int, dropout: float) -> tuple[float, dict[str, torch.Tensor]]:
    decoder = load_decoder(folder, dtype=torch.float32)
    add_lora(decoder, LoRASpec(3, 7.0, dropout), seed=1)
    generator = torch.Generator().manual_seed(2)
    masters = lora_parameters(decoder)
    with torch.no_grad():
        for name, master in masters.items():
            if "lora_B" in name:
                master.normal_(0, 0.1, generator=generator)
    decoder.train()
    decoder.checkpointing = checkpointing
    torch.manual_seed(4)
    loss = linear_cross_entropy(decoder.hidden(ids(26), (9, 17)), decoder.head_weight, ids(26, seed=1))
    loss.backward()
    return loss.item(), {name: master.grad for name, master in masters.items() if master.grad is not None}


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_bits(tiny_llama: Path, dropout: float, layers: int) -> None:
    loss, kept = _gradients(tiny_llama, 0, dropout)
    again, recomputed = _gradients(tiny_llama, layers, dropout)
    assert loss == again
    assert len(kept) == 3 * 7 * 2
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_generating_first_does_not_spoil_training(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    with torch.inference_mode():
        decoder(ids(9))
    add_lora(decoder, LoRASpec(2, 4.0), seed=0)
    decoder(ids(300)).sum().backward()
    decoder(ids(9)).sum().backward()
    assert all(master.grad is not None for master in lora_parameters(decoder).values())


def test_parameter_names_are_hugging_faces(tiny_llama: Path) -> None:
    from safetensors import safe_open

    with safe_open(tiny_llama / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert {name for name, _ in load_decoder(tiny_llama, dtype=torch.float32).named_parameters()} == stored
    assert read_config(tiny_llama).family == "llama"
