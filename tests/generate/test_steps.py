"""One step for several texts: in C as in the decoder's own layers, and the same bits whatever is beside a text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.generate.steps import Steps
from luthier.hardware.compiled import VARIANTS
from luthier.kernels import REFERENCE
from luthier.kernels.choose import _native, kernels_for
from luthier.model.cache import Cache
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny
from tests.kernels.libraries import file_of

CPU = torch.device("cpu")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "llama, tied, scaled": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 60}),
    "mistral, window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"vocab_size": 407}),
    "qwen3": ("qwen3", {"head_dim": 18}),
}
LENGTHS = (3, 20, 1, 9, 14)


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, settings = SHAPES[request.param]
    return tiny.make_model(tmp_path_factory.mktemp("steps") / family, family, **settings)


def prompts(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in LENGTHS]


def written(decoder: Decoder, which: tuple[int, ...], steps: int) -> Tensor:
    """Logits (steps, R, V) of the texts `which` decoded together, the tokens being the same in every call."""
    stepping, texts = Steps(decoder), prompts(decoder.config.vocab_size)
    caches = [Cache(decoder.config, 64, decoder.dtype, CPU) for _ in which]
    for text, cache in zip(which, caches, strict=True):
        stepping.read(texts[text], cache)
    ids = [[(5 * text + 11 * step) % decoder.config.vocab_size for text in which] for step in range(steps)]
    return torch.stack([stepping.step(row, caches) for row in ids])


def with_lora(decoder: Decoder) -> Decoder:
    add_lora(decoder, LoRASpec(3, 7.0, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.1, generator=generator)
    return decoder


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("adapted", [False, True])
def test_c_is_the_decoders_own_layers(folder: Path, variant: str, adapted: bool) -> None:
    decoder = load_decoder(folder, dtype=torch.float32)
    if adapted:
        with_lora(decoder)
    decoder.use(REFERENCE)
    assert not Steps(decoder).exact
    wanted = written(decoder, (0, 1, 2, 3, 4), 6)
    decoder.use(_native(file_of(variant), variant).kernels)
    assert Steps(decoder).exact
    ours = written(decoder, (0, 1, 2, 3, 4), 6)
    # Sums of at most 80 terms through 3 layers: some tens of roundings of fp32 of logits of about 1.
    torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-4)


def test_bf16_is_as_near_to_fp32_as_torch_is(folder: Path) -> None:
    exact = load_decoder(folder, dtype=torch.float32)
    wanted = written(exact, (0, 1, 2, 3, 4), 4)
    decoder = load_decoder(folder, dtype=torch.bfloat16)
    by_torch = written(decoder, (0, 1, 2, 3, 4), 4).float()
    decoder.use(kernels_for(CPU, torch.bfloat16).kernels)
    ours = written(decoder, (0, 1, 2, 3, 4), 4).float()
    error, theirs = (ours - wanted).square().mean().sqrt(), (by_torch - wanted).square().mean().sqrt()
    assert error < 1.2 * theirs  # both round to bf16 after each operation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_text_is_the_same_bits_beside_any_others(folder: Path, variant: str, dtype: torch.dtype) -> None:
    decoder = with_lora(load_decoder(folder, dtype=dtype))
    decoder.use(_native(file_of(variant), variant).kernels)
    together = written(decoder, (0, 1, 2, 3, 4), 5)
    for which in ((0,), (1,), (4,), (3, 1), (2, 4, 0), (1, 3, 4, 2)):
        some = written(decoder, which, 5)
        assert torch.equal(some, together[:, list(which)])


def test_the_number_of_threads_changes_no_bit(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.bfloat16)
    decoder.use(kernels_for(CPU, torch.bfloat16).kernels)
    before = torch.get_num_threads()
    found: list[Tensor] = []
    try:
        for threads in (1, 2, 3):
            stepping = Steps(decoder)
            caches = [Cache(decoder.config, 8, decoder.dtype, CPU) for _ in range(3)]
            torch.set_num_threads(threads)
            found.append(stepping.step([3, 9, 27], caches))
            found.append(stepping.step([4, 8, 16], caches))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found[::2])
    assert all(torch.equal(one, found[1]) for one in found[1::2])


def test_a_cache_grows_in_blocks_and_keeps_what_it_holds(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    decoder.use(kernels_for(CPU, torch.float32).kernels)
    stepping, cache = Steps(decoder), Cache(decoder.config, 300, torch.float32, "cpu")
    tokens = [(17 * n) % 400 for n in range(300)]
    assert cache.room == 0
    stepping.read(tokens[:120], cache)
    rooms, rows = [cache.room], []
    for token in tokens[120:]:
        rows.append(stepping.step([token], [cache])[0])
        rooms.append(cache.room)
    assert sorted(set(rooms)) == [128, 256, 300]
    with torch.inference_mode():
        whole = decoder(torch.tensor(tokens))[120:]
    torch.testing.assert_close(torch.stack(rows), whole, atol=5e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="room for 300 tokens, 301 are needed"):
        stepping.step([1], [cache])
    assert cache.length == 300
