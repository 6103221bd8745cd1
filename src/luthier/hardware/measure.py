"""The measurements of calibrate.py: each operation on tensors of its own, small enough that all take three seconds.

Legend: T tokens, I inputs, O outputs, r rank, B documents, L tokens of one, H heads, d head size, n elements.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING

from luthier.hardware.device import AttentionRate, Device, MatmulRate, Precision, Rates

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYER_OPERATIONS", "measure"]

_SECONDS = 3.0
_REPEATS = 9
_SHARE = 0.06
"""Seconds for one measurement, unless three repeats take longer."""

_LONG = 0.12
"""Seconds that one call may be expected to take: on slow machines large products get fewer tokens, and the longest
documents are left out."""

_RANK = 16
_BLOCK = 64  # weights that share a scale, as model/quantize.py has it


@dataclass(frozen=True)
class _Sizes:
    """tokens: of a product. widths: of square weights. lengths: of attention's documents. heads, head_dim: of them.
    elements: of the element-wise chain. fresh: bytes of a new block, 0: the device keeps its memory."""

    tokens: int
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: int
    head_dim: int
    elements: int
    fresh: int


class _Bench:
    """Times operations on one device."""

    def __init__(self, device: Device, clock: Callable[[], float]) -> None:
        import torch

        if find_spec("bitsandbytes") is not None:
            import bitsandbytes.functional  # noqa: F401  a second, which is no measurement's

        self.torch, self.kind, self.clock = torch, device.kind, clock
        self.dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
        self.end = clock() + _SECONDS
        threads = torch.get_num_threads()
        if device.kind == "cpu":
            self.sizes = _Sizes(512, (288, 2048), (128, 512, 2048), max(2, threads), 64, 2**18, 2**26)
        else:
            self.sizes = _Sizes(4096, (512, 4096), (512, 4096), 32, 128, 2**24, 0)

    def random(self, *shape: int, precision: Precision, grad: bool = False) -> Tensor:
        made = self.torch.randn(*shape, device=self.kind).to(self.dtypes[precision])
        return made.requires_grad_(grad)

    def now(self) -> float:
        if self.kind == "cuda":
            self.torch.cuda.synchronize()
        elif self.kind == "mps":
            self.torch.mps.synchronize()
        return self.clock()

    def seconds(self, call: Callable[[], object]) -> float:
        """The median; what is slow is repeated less, and once the three seconds are over, only once."""
        call()  # libraries choose and build their kernels at the first call of a shape
        taken: list[float] = []
        start = self.now()
        while True:
            before = self.now()
            call()
            after = self.now()
            taken.append(max(after - before, 1e-9))
            enough = len(taken) >= (3 if after - start < 3 * _SHARE else 1)
            if len(taken) >= _REPEATS or after > self.end or (enough and after - start > _SHARE):
                return statistics.median(taken)


def measure(device: Device, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """The rates of this machine's `device`, in about three seconds of `clock` after torch is imported."""
    bench = _Bench(device, clock)
    precisions: tuple[Precision, ...] = ("bf16", "fp16", "fp32") if device.kind == "cuda" else ("bf16", "fp32")
    trained = [one for one in precisions if one in device.fast or one == "fp32"]
    matmul: list[MatmulRate] = []
    attention: list[AttentionRate] = []
    for precision in trained:
        matmul.append(MatmulRate(precision, _RANK, _thin(bench, precision)))
        for width in bench.sizes.widths:
            matmul.append(MatmulRate(precision, width, _product(bench, precision, width, matmul[-1].flops)))
        attention += _attentions(bench, precision)
    bandwidth = _bandwidth(bench, trained[0])
    return Rates(
        matmul=tuple(matmul),
        attention=tuple(attention),
        bandwidth=bandwidth,
        dequantize=_dequantize(bench, trained[0]) or bandwidth / 8,
        operation=_operation(bench, trained[0]),
        source=f"measured on this machine, {datetime.now(UTC):%Y-%m-%d}",
        fresh=_fresh(bench) if bench.sizes.fresh else None,
    )


def _product(bench: _Bench, precision: Precision, width: int, narrower: float) -> float:
    """FLOP/s of x W' and of g W, W a square weight: what a frozen projection does forward and backward.

    `narrower`: FLOP/s at the width before, for as many tokens as are not too slow.
    """
    linear = bench.torch.nn.functional.linear
    tokens = min(bench.sizes.tokens, max(16, int(_LONG * narrower / (4 * width * width))))
    weight_OI = bench.random(width, width, precision=precision)
    x_TI = bench.random(tokens, width, precision=precision)
    return 4.0 * x_TI.numel() * width / bench.seconds(lambda: (linear(x_TI, weight_OI), x_TI @ weight_OI))


def _thin(bench: _Bench, precision: Precision) -> float:
    """FLOP/s of the six products of a LoRA of rank 16: two forward, four backward."""
    linear = bench.torch.nn.functional.linear
    width = bench.sizes.widths[0] * 2
    x_TI = bench.random(bench.sizes.tokens, width, precision=precision)
    low_Tr = bench.random(bench.sizes.tokens, _RANK, precision=precision)
    a_rI = bench.random(_RANK, width, precision=precision)
    b_Or = bench.random(width, _RANK, precision=precision)

    def products() -> None:
        linear(x_TI, a_rI)
        linear(low_Tr, b_Or)
        x_TI @ b_Or
        low_Tr @ a_rI
        low_Tr.t() @ x_TI
        x_TI.t() @ low_Tr

    return 12.0 * x_TI.numel() * _RANK / bench.seconds(products)


def _attentions(bench: _Bench, precision: Precision) -> list[AttentionRate]:
    """Of each length, as far as they are not too slow."""
    found: list[AttentionRate] = []
    for length in bench.sizes.lengths:
        if found and 5.0 * length * length * bench.sizes.heads * bench.sizes.head_dim / found[-1].backward > _LONG:
            break
        found.append(_attention(bench, precision, length))
    return found


def _attention(bench: _Bench, precision: Precision, length: int) -> AttentionRate:
    torch, sizes = bench.torch, bench.sizes
    documents = max(1, sizes.lengths[0] * 2 // length)
    q_BHLd, k_BHLd, v_BHLd = (
        bench.random(documents, length, sizes.heads, sizes.head_dim, precision=precision).transpose(1, 2)
        for _ in range(3)
    )
    leaves = tuple(x.requires_grad_() for x in (q_BHLd, k_BHLd, v_BHLd))

    def attend() -> Tensor:
        out_BHLd: Tensor = torch.nn.functional.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, is_causal=True)
        return out_BHLd

    with torch.no_grad():
        forward = bench.seconds(attend)
    o_BHLd = attend()
    grad_BHLd = torch.ones_like(o_BHLd)
    backward = bench.seconds(lambda: torch.autograd.grad(o_BHLd, leaves, grad_BHLd, retain_graph=True))
    flops = 2.0 * documents * length * length * sizes.heads * sizes.head_dim
    return AttentionRate(precision, length, flops / forward, 2.5 * flops / backward)


def _bandwidth(bench: _Bench, precision: Precision) -> float:
    """Bytes a second of a chain as the norms, rotations and gates are: the passes over n elements counted."""
    torch, n = bench.torch, bench.sizes.elements
    x_n, y_n = (bench.random(n, precision=precision) for _ in range(2))

    def chain() -> None:
        wide = x_n.float()  # 2 passes; nothing where it is fp32 already
        wide = wide * wide.pow(2)  # 5
        narrow = wide.to(x_n.dtype)  # 2, or nothing
        narrow = narrow * y_n + x_n  # 6
        torch.nn.functional.silu(narrow).mul(y_n)  # 5

    passes = 16 if precision == "fp32" else 20
    width = 4 if bench.kind == "cpu" or precision == "fp32" else 2.8  # of a GPU: 12 passes of 2 bytes, 8 of 4
    return passes * width * n / bench.seconds(chain)


def _dequantize(bench: _Bench, precision: Precision) -> float | None:
    """Weights a second from NF4 with double quantisation; None where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None or bench.kind == "mps":
        return None
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    width = bench.sizes.widths[-1]
    weight_OI = bench.random(width, width // 2, precision=precision)
    packed, state = quantize_4bit(weight_OI, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    return weight_OI.numel() / bench.seconds(lambda: dequantize_4bit(packed, state))


LAYER_OPERATIONS: dict[Precision, float] = {"bf16": 203.0, "fp16": 203.0, "fp32": 156.0}
"""Of a layer forward and backward, as plan/speed.py counts them: fp32 has no casts in its norms and adapters."""


def _operation(bench: _Bench, precision: Precision) -> float:
    """Seconds of one operation: small decoder layers with LoRA, forward and backward, over a few tokens.

    Each layer has weights of its own, for a part of what an operation costs is fetching what no cache holds any more.
    """
    torch, linear = bench.torch, bench.torch.nn.functional.linear
    tokens, hidden, inner, heads, layers = 16, 256, 768, 4, 5
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    frozen = [[bench.random(o, i, precision=precision) * 0.01 for o, i in shapes] for _ in range(layers)]
    adapters = [
        (bench.random(_RANK, i, precision="fp32", grad=True), bench.random(o, _RANK, precision="fp32", grad=True))
        for _ in range(layers)
        for o, i in shapes
    ]
    x_TI, scale_I = bench.random(tokens, hidden, precision=precision), bench.random(hidden, precision=precision)

    def norm(h_TI: Tensor) -> Tensor:
        wide = h_TI.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        scaled_TI: Tensor = scale_I * wide.to(h_TI.dtype)
        return scaled_TI

    def project(h_TI: Tensor, layer: int, which: int) -> Tensor:
        a_rI, b_Or = adapters[layer * len(shapes) + which]
        low_Tr = linear(h_TI, a_rI.to(h_TI.dtype)) * 0.01
        y_TO: Tensor = linear(h_TI, frozen[layer][which]) + linear(low_Tr, b_Or.to(h_TI.dtype))
        return y_TO

    def rotate(h_THd: Tensor) -> Tensor:
        half = h_THd.shape[-1] // 2
        turned_THd: Tensor = h_THd * 0.5 + torch.cat((-h_THd[..., half:], h_THd[..., :half]), dim=-1) * 0.5
        return turned_THd

    def layers_of_a_decoder() -> None:
        h_TI = x_TI
        for layer in range(layers):
            y_TI = norm(h_TI)
            q_THd, k_THd, v_THd = (project(y_TI, layer, which).view(tokens, heads, -1) for which in range(3))
            q_HTd, k_HTd, v_HTd = (one.transpose(0, 1)[None] for one in (rotate(q_THd), rotate(k_THd), v_THd))
            o_HTd = torch.nn.functional.scaled_dot_product_attention(q_HTd, k_HTd, v_HTd, is_causal=True)
            h_TI = h_TI + project(o_HTd[0].transpose(0, 1).reshape(tokens, hidden), layer, 3)
            y_TI = norm(h_TI)
            gate_TI = torch.nn.functional.silu(project(y_TI, layer, 4))
            h_TI = h_TI + project(gate_TI * project(y_TI, layer, 5), layer, 6)
        torch.autograd.backward(h_TI.float().sum())

    return bench.seconds(layers_of_a_decoder) / (layers * LAYER_OPERATIONS[precision])


def _fresh(bench: _Bench) -> float:
    """Bytes a second of blocks that are taken from the system and given back at each use."""
    torch, n = bench.torch, bench.sizes.fresh // 4
    kept = torch.ones(n)
    new, old = bench.seconds(lambda: torch.empty(n).fill_(1.0)), bench.seconds(lambda: kept.fill_(1.0))
    return bench.sizes.fresh / max(new - old, 0.01 * new)
