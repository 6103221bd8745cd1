"""The Triton kernels over awkward shapes against float64 (exact.py), wherever they can run.

    TRITON_INTERPRET=1 python -m tests.kernels.triton_cases      on a CPU, by Triton's interpreter, in fp32

The interpreter reads that variable when the kernels are defined, so it has a process of its own. Its 16-bit results are
cut off instead of rounded, so there they are held to the tolerance of the first look (kernels/check_cuda.py) alone.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from luthier.kernels import IGNORED, REFERENCE, check_cuda, triton_fp8
from luthier.kernels.batched import Batched
from luthier.kernels.choose import _table
from luthier.kernels.cuda import Cuda
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny
from tests.kernels import exact

EPS = 1e-5


class Cases:
    """On one device in one dtype; each method raises AssertionError where a kernel is off."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype, self.ops = torch.device(device), dtype, Cuda()
        self.generator = torch.Generator().manual_seed(0)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def all(self) -> None:
        self.rms_norm()
        self.rope()
        self.swiglu()
        self.cross_entropy()

    def rms_norm(self) -> None:
        for rows, size, spread in itertools.product((1, 3), (1, 37, 128, 5000), (1e-3, 1.0, 1e3)):
            x, weight, grad, onto = (
                self.random(rows, size) * spread,
                self.random(size),
                self.random(rows, size),
                self.random(rows, size),
            )
            kept = x.clone(), grad.clone(), onto.clone()
            exact.rms_norm(x, weight, EPS).holds(self.ops.rms_norm(x, weight, EPS))
            for before in (None, onto):
                wanted = exact.rms_norm_backward(grad, x, weight, EPS, before)
                wanted.holds(self.ops.rms_norm_backward(grad, x, weight, EPS, before))
            assert all(torch.equal(one, was) for one, was in zip((x, grad, onto), kept, strict=True))

    def rope(self) -> None:
        for tokens, heads, half, back in itertools.product((1, 5), (1, 3, 8), (1, 9, 64), (False, True)):
            x = self.random(tokens, heads, 2 * half)
            angles_Td = self.random(tokens, half).repeat(1, 2) * 3
            cos_Td, sin_Td = angles_Td.cos(), angles_Td.sin()
            wanted = exact.rope(x, cos_Td, sin_Td, back)
            turned = self.ops.rope(x, cos_Td, sin_Td, back)
            assert turned is x
            wanted.holds(turned)

    def swiglu(self) -> None:
        for shape in ((1, 1), (5, 37), (3, 1024), (7, 1000)):
            gate, up, grad = self.random(*shape) * 3, self.random(*shape), self.random(*shape)
            exact.swiglu(gate, up).holds(self.ops.swiglu(gate, up))
            wanted = exact.swiglu_backward(grad, gate, up)
            product = self.ops.swiglu_backward(grad, gate, up)
            assert product.data_ptr() == grad.data_ptr()
            for one, ours in zip(wanted, (gate, up, product), strict=True):
                one.holds(ours)

    def cross_entropy(self) -> None:
        for size, weighted in itertools.product((2, 41, 8192, 20000), (False, True)):
            logits = self.random(4, size) * 3
            labels = torch.tensor([0, size - 1, size // 2, IGNORED], device=self.device)
            weights = torch.tensor([1.0, 0.5, 0.0, 1.0], device=self.device) if weighted else None
            some = None if weights is None else weights[:3].cpu()
            wanted, wanted_error = exact.cross_entropy(logits[:3].cpu(), labels[:3].cpu(), some)
            loss, _ = self.ops.cross_entropy(logits.clone(), labels, weights, False)
            wanted.holds(loss[:3].cpu())
            loss, error = self.ops.cross_entropy(logits, labels, weights, True)
            assert error is logits
            wanted.holds(loss[:3].cpu())
            wanted_error.holds(error[:3].cpu())
            assert loss[3] == 0
            assert not error[3].any()


def fp8(device: str) -> None:
    """Numbers that e4m3 has, times a power of two for each row: nothing is rounded, so all must come out as it was."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = every[every.float().isfinite()].to(device)
    for size in (1, 37, 1000):
        picked = torch.randint(0, len(finite), (4, size), generator=torch.Generator().manual_seed(0))
        q_TI = finite.float()[picked.to(device)]
        q_TI[:, 0] = 448.0
        scale_T1 = torch.tensor([[1.0], [2.0**-9], [2.0**7], [2.0**-20]], device=device)
        factor_I = 2.0 ** torch.randint(-3, 4, (size,), generator=torch.Generator().manual_seed(1)).float().to(device)
        for factor in (None, factor_I):
            x_TI = q_TI * scale_T1 if factor is None else q_TI * scale_T1 / factor
            ours_TI, ours_T1 = triton_fp8.quantize_rows(x_TI, factor)
            assert torch.equal(ours_T1, scale_T1)
            assert torch.equal(ours_TI.float(), q_TI)
    zero_TI, one_T1 = triton_fp8.quantize_rows(torch.zeros(2, 37, device=device))
    assert torch.equal(one_T1, torch.ones_like(one_T1))
    assert not zero_TI.float().any()
    for rows, columns in ((1, 1), (64, 64), (70, 130)):
        x_OI = finite[torch.randint(0, len(finite), (rows, columns)).to(device)]
        assert torch.equal(triton_fp8.transpose(x_OI).view(torch.uint8), x_OI.view(torch.uint8).t())


class _OnCpu(Cuda):
    """Torch's flash attention needs a card: here it is batched.py's."""

    attention = Batched.attention
    attention_backward = Batched.attention_backward


def layers(folder: Path) -> None:
    """A model whose layers are written by hand over these kernels: loss and each gradient are the reference's."""
    decoder = load_decoder(folder, dtype=torch.float32)
    add_lora(decoder, LoRASpec(3, 7.0), seed=0)
    leaves, generator = lora_parameters(decoder), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.05)
    ids_T = torch.randint(0, 400, (12,), generator=generator)
    rows_n, ops = torch.arange(0, 12, 2), _OnCpu()
    ours = replace(_table("cuda, but for attention", ops, None), linear_cross_entropy=ops.linear_cross_entropy)
    found = []
    for kernels in (REFERENCE, ours):
        decoder.use(kernels)
        decoder.train()
        hidden_nD = decoder.hidden(ids_T, (1, 7, 4), rows_n=rows_n)
        loss = kernels.linear_cross_entropy(hidden_nD, decoder.head_weight, ids_T.roll(-1)[rows_n])
        found.append((loss.detach(), torch.autograd.grad(loss, list(leaves.values()))))
    (wanted, of_reference), (got, of_ours) = found
    assert abs(float(got / wanted) - 1) < 1e-6
    for name, plain, fast in zip(leaves, of_reference, of_ours, strict=True):
        assert (fast - plain).norm() <= 1e-5 * plain.norm(), f"{folder.name}: the gradient of {name} is off"


def main() -> None:
    cpu = torch.device("cpu")
    Cases("cpu", torch.float32).all()
    fp8("cpu")
    with TemporaryDirectory() as scratch:
        for family in ("qwen2", "qwen3"):  # with biases, with norms of queries and keys
            layers(tiny.make_model(Path(scratch) / family, family))
    for dtype, tolerance in check_cuda.TOLERANCE.items():
        for kernel, ours, wanted in check_cuda.pairs(Cuda(), cpu, dtype):
            error = float((ours.float() - wanted).abs().max() / wanted.abs().max())
            assert error <= tolerance, f"{kernel} in {dtype}: off by {error:.2g} of the largest number"


if __name__ == "__main__":
    main()
