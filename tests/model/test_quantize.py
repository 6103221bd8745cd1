"""NF4 by itself: size, error, frozen weight. (Against transformers and PEFT: tests/parity/test_nf4.py.)"""

from __future__ import annotations

import re
from pathlib import Path

import bitsandbytes
import pytest
import torch

from luthier.model.cache import Cache
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters, projections
from luthier.model.quantize import NF4Linear
from tests import tiny


def layer(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> tuple[NF4Linear, torch.Tensor]:
    linear = NF4Linear(inputs, outputs, bias=True)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    linear.assign("weight", weight)
    linear.assign("bias", torch.randn(outputs, generator=torch.Generator().manual_seed(2)).to(dtype))
    return linear, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_multiplies_by_the_dequantised_weight(dtype: torch.dtype) -> None:
    linear, _ = layer(80, 33, dtype)
    x = torch.randn(5, 80).to(dtype)
    wanted = torch.nn.functional.linear(x.double(), linear.dense().double(), linear.bias.double())  # type: ignore[union-attr]
    # one rounding to the compute dtype of numbers up to 40; 80 additions in fp32, sqrt(80) x 40 x 2^-24 = 2e-5
    torch.testing.assert_close(linear(x).double(), wanted, atol=40 * torch.finfo(dtype).eps + 2e-5, rtol=0)


def test_the_levels_are_nf4s() -> None:
    """Half the widest gap between two of the 16 levels, which is 0.3038, times the block's largest weight, and the
    8-bit scale's own error of at most 1 %."""
    linear, weight = layer(128, 64)
    error = (linear.dense() - weight).view(-1, 64).abs().amax(1)
    largest = weight.view(-1, 64).abs().amax(1)
    assert (error <= largest * (0.3038 / 2 + 0.02)).all()
    assert error.mean() > 0.05 * largest.mean()  # 4 bits, not 8
    assert len(torch.unique(linear.dense().view(-1, 64)[0])) <= 16


def test_it_takes_four_bits_and_an_eighth() -> None:
    linear, weight = layer(512, 512)
    state = linear.quant_state
    assert state is not None
    scales = state.absmax.numel() * state.absmax.element_size() + state.state2.absmax.numel() * 4
    bits = 8 * (linear.weight.numel() * linear.weight.element_size() + scales) / weight.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-9)


def test_the_packed_weight_is_passed_as_every_release_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As (1, packed): releases of bitsandbytes before 0.50 take (packed, 1) for the other direction."""
    linear, _ = layer(80, 33)
    shapes: list[tuple[int, ...]] = []
    real = bitsandbytes.matmul_4bit

    def noting(A: torch.Tensor, B: torch.Tensor, **others: object) -> torch.Tensor:
        shapes.append(tuple(B.shape))
        out: torch.Tensor = real(A, B, **others)
        return out

    monkeypatch.setattr(bitsandbytes, "matmul_4bit", noting)
    linear(torch.randn(5, 80))
    assert shapes == [(1, 80 * 33 // 2)]


def test_the_required_bitsandbytes_is_one_whose_results_are_tested() -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    (least,) = re.findall(r'"bitsandbytes>=(\d+)\.(\d+)"', project)
    assert tuple(map(int, least)) >= (0, 50)


def test_the_gradient_goes_through_to_the_input_only() -> None:
    linear, _ = layer(80, 33)
    x = torch.randn(5, 80, requires_grad=True)
    out = torch.randn(5, 33)
    (linear(x) * out).sum().backward()
    torch.testing.assert_close(x.grad, out @ linear.dense(), atol=1e-4, rtol=1e-5)
    assert not any(weight.requires_grad for weight in linear.parameters())


def test_a_quantised_model_trains_and_decodes_with_a_cache(tmp_path: Path) -> None:
    decoder = load_decoder(tiny.make_model(tmp_path, "qwen3"), dtype=torch.float32, quantize="nf4")
    assert all(isinstance(projection, NF4Linear) for _, projection in projections(decoder))
    add_lora(decoder, LoRASpec(3, 7.0), seed=1)
    tokens = torch.randint(0, 400, (18,), generator=torch.Generator().manual_seed(2))
    packed = [projection.weight.clone() for _, projection in projections(decoder)]
    optimizer = torch.optim.SGD(lora_parameters(decoder).values(), lr=0.1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(decoder(tokens[:-1]), tokens[1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p.weight, was) for (_, p), was in zip(projections(decoder), packed, strict=True))
    cache = Cache(decoder.config, 18, torch.float32, "cpu")
    with torch.inference_mode():
        steps = torch.cat([decoder.hidden(token, cache=cache) for token in tokens.split(1)])
        torch.testing.assert_close(steps, decoder.hidden(tokens), atol=5e-5, rtol=0)
