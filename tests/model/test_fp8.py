"""FP8 by itself: error of the rounding, size, the products' layouts, and that it is refused where it cannot be had."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.errors import UsageError
from luthier.kernels import fp8
from luthier.kernels.choose import kernels_for
from luthier.model.fp8 import FP8Linear, check_fp8
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.model.projection import Projection

has_fp8 = torch.cuda.is_available() and not fp8.missing(torch.device("cuda"), torch.bfloat16)
needs_fp8 = pytest.mark.skipif(not has_fp8, reason="needs an NVIDIA card with FP8 products")


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("factored", [False, True])
def test_rows_are_rounded_to_within_half_a_step(spread: float, factored: bool) -> None:
    """3 bits of mantissa: half of 1/8 of a number; below 2^-6 of the scale half of 2^-9 of it."""
    x_TI = random(7, 300) * spread
    factor_I = random(300, seed=2).abs() if factored else None
    q_TI, scale_T1 = fp8.quantize_rows(x_TI, factor_I)
    wide_TI = x_TI.double() if factor_I is None else x_TI.double() * factor_I.double()
    bound_TI = (wide_TI.abs() / 16).clamp_min(scale_T1.double() * 2**-10) * (1 + 1e-6)
    assert ((q_TI.double() * scale_T1.double() - wide_TI).abs() <= bound_TI).all()
    assert (q_TI.float().abs().amax(1) == fp8.LARGEST).all()
    assert (q_TI.double() * scale_T1.double() - wide_TI).norm() > 0.01 * wide_TI.norm()  # 8 bits, not 16


def test_a_row_of_zeros_stays_one() -> None:
    q_TI, scale_T1 = fp8.quantize_rows(torch.zeros(1, 5))
    assert not q_TI.float().any()
    assert scale_T1.item() == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    q_TI, scale_T1 = fp8.quantize_rows(torch.tensor([[1.0, bad], [1.0, 2.0]]))
    assert not (q_TI.float() * scale_T1)[0].isfinite().any()
    assert (q_TI.float() * scale_T1)[1].isfinite().all()


def layer(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16) -> tuple[FP8Linear, torch.Tensor]:
    linear = FP8Linear(inputs, outputs, bias=True)
    weight = random(outputs, inputs).to(dtype)
    linear.assign("weight", weight)
    linear.assign("bias", random(outputs, seed=2).to(dtype))
    return linear, weight


def test_it_takes_a_byte_and_a_scale_for_each_output() -> None:
    linear, weight = layer(512, 48)
    assert linear.weight.nbytes + linear.scale_O.nbytes == weight.numel() + 4 * 48
    assert not linear.weight.requires_grad


def test_dense_is_the_weight_to_within_a_sixteenth() -> None:
    linear, weight_OI = layer(512, 48)
    dense_OI = linear.dense()
    assert dense_OI.dtype == weight_OI.dtype
    rounding = weight_OI.float().abs() * (1 / 16 + 2**-8)  # to e4m3, and of what comes out to bf16
    tiny = linear.scale_O.unsqueeze(1) * 2**-10
    assert ((dense_OI.float() - weight_OI.float()).abs() <= torch.maximum(rounding, tiny)).all()
    torch.testing.assert_close(
        dense_OI.double(), linear.weight.double() * linear.scale_O.double()[:, None], rtol=2**-8, atol=0
    )


def test_sides_that_the_products_do_not_take_are_multiplied_dense() -> None:
    """Forward and backward, under autograd: the plain products with the rounded weight."""
    linear, _ = layer(80, 33)
    x = random(5, 80, seed=3).bfloat16().requires_grad_()
    y = linear(x)
    grad = random(5, 33, seed=4).bfloat16()
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(y, torch.nn.functional.linear(x, linear.dense(), linear.bias))
    assert torch.equal(dx, grad @ linear.dense())


@pytest.mark.parametrize("bias", [False, True])
def test_products_by_hand_are_autograd_s(bias: bool) -> None:
    projection = Projection(80, 33, bias)
    projection.assign("weight", random(33, 80))
    if bias:
        projection.assign("bias", random(33, seed=2))
    x, onto, grad, before = random(5, 80, seed=3), random(5, 33, seed=4), random(5, 33, seed=5), random(5, 80, seed=6)
    leaf = x.clone().requires_grad_()
    y = projection(leaf)
    (dx,) = torch.autograd.grad(y, leaf, grad)
    kept = onto.clone()
    torch.testing.assert_close(projection.multiply(x), y)
    torch.testing.assert_close(projection.multiply(x, onto), y + onto)
    assert torch.equal(onto, kept)
    torch.testing.assert_close(projection.multiply_back(grad), dx)
    sum_TI = before.clone()
    assert projection.multiply_back(grad, sum_TI) is sum_TI
    torch.testing.assert_close(sum_TI, dx + before)


def test_it_is_refused_where_there_is_none(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"compute capability 8\.9 or more have them, and this is a CPU") as caught:
        load_decoder(tiny_llama, dtype=torch.bfloat16, quantize="fp8")
    assert caught.value.remedy == "set quantize: none"
    with pytest.raises(UsageError, match="this is Apple's GPU"):
        check_fp8(torch.device("mps"), torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    with pytest.raises(UsageError, match=r"Ada, Hopper, Blackwell\), and this one has 8\.6"):
        check_fp8(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(UsageError, match="their results are bf16, not float16") as caught:
        check_fp8(torch.device("cuda"), torch.float16)
    assert "train.precision: bf16" in str(caught.value.remedy)


@needs_fp8
def test_on_a_card_both_products_are_those_of_the_rounded_operands() -> None:
    linear, _ = layer(512, 48)
    linear.weight, linear.scale_O = torch.nn.Parameter(linear.weight.cuda(), False), linear.scale_O.cuda()
    linear.bias = torch.nn.Parameter(linear.bias.cuda(), False)
    x_TI, grad_TO = random(33, 512, seed=3).cuda().bfloat16(), random(33, 48, seed=4).cuda().bfloat16()
    for ours, of, weight, scale in (
        (linear.multiply(x_TI) - linear.bias, x_TI, linear.weight.float().t() * linear.scale_O, None),
        (linear.multiply_back(grad_TO), grad_TO, linear.weight.float(), linear.scale_O),
    ):
        q, s = fp8.quantize_rows(of, scale)
        wanted = (q.float() * s) @ weight
        # rounded to bf16 (twice with the bias), and a few operands to the other of two neighbours
        assert (ours.float() - wanted).norm() <= 0.01 * wanted.norm()


@needs_fp8
def test_on_a_card_it_trains(tiny_llama: Path) -> None:
    """The tiny model's widths are not all multiples of 16: both ways of multiplying take part."""
    losses = {}
    for quantize in ("none", "fp8"):
        decoder = load_decoder(tiny_llama, dtype=torch.bfloat16, device="cuda", quantize=quantize)  # type: ignore[arg-type]
        add_lora(decoder, LoRASpec(4, 8.0), seed=0)
        decoder.train()
        decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)
        leaves = lora_parameters(decoder)
        optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2)
        ids_T = torch.randint(0, 400, (70,), generator=torch.Generator().manual_seed(1)).cuda()
        for _ in range(20):
            optimizer.zero_grad()
            hidden_TD = decoder.hidden(ids_T, (1, 40, 29))
            loss = decoder.kernels.linear_cross_entropy(hidden_TD, decoder.head_weight, ids_T.roll(-1)) / 70
            loss.backward()  # type: ignore[no-untyped-call]
            assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves.values())
            optimizer.step()
        losses[quantize] = float(loss)
    assert losses["fp8"] == pytest.approx(losses["none"], rel=0.05)
