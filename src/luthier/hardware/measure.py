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
from luthier.hardware.timed import RANK, Documents, Timed, TorchTimed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["measure"]

_SECONDS = 3.0
_REPEATS = 9
_SHARE = 0.06
"""Seconds for one measurement, unless three repeats take longer."""

_LONG = 0.12
"""Seconds that one call may be expected to take: on slow machines large products get fewer tokens, and the longest
documents are left out."""

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

    def random(self, *shape: int, precision: Precision) -> Tensor:
        return self.torch.randn(*shape, device=self.kind).to(self.dtypes[precision])

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


def measure(device: Device, clock: Callable[[], float] = time.perf_counter, timed: Timed | None = None) -> Rates:
    """The rates of this machine's `device`, in about three seconds of `clock` after torch is imported.

    timed: what its runs compute with; None: torch's own operations.
    """
    bench = _Bench(device, clock)
    timed = TorchTimed(device.kind) if timed is None else timed
    precisions: tuple[Precision, ...] = ("bf16", "fp16", "fp32") if device.kind == "cuda" else ("bf16", "fp32")
    trained = [one for one in precisions if one in device.fast or one == "fp32"]
    matmul: list[MatmulRate] = []
    attention: list[AttentionRate] = []
    for precision in trained:
        matmul.append(MatmulRate(precision, RANK, _thin(bench, precision)))
        for width in bench.sizes.widths:
            matmul.append(MatmulRate(precision, width, _product(bench, precision, width, matmul[-1].flops)))
        attention += _attentions(bench, precision, timed)
    chain, elements = timed.elements(trained[0], bench.sizes.elements)
    bandwidth = 4 * elements / bench.seconds(chain)
    layers, operations = timed.layers(trained[0])
    return Rates(
        matmul=tuple(matmul),
        attention=tuple(attention),
        bandwidth=bandwidth,
        dequantize=_dequantize(bench, trained[0]) or bandwidth / 8,
        operation=bench.seconds(layers) / operations,
        source=f"measured on this machine, {datetime.now(UTC):%Y-%m-%d}",
        fresh=_fresh(bench) if bench.sizes.fresh else None,
        kernels=timed.kernels,
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
    low_Tr = bench.random(bench.sizes.tokens, RANK, precision=precision)
    a_rI = bench.random(RANK, width, precision=precision)
    b_Or = bench.random(width, RANK, precision=precision)

    def products() -> None:
        linear(x_TI, a_rI)
        linear(low_Tr, b_Or)
        x_TI @ b_Or
        low_Tr @ a_rI
        low_Tr.t() @ x_TI
        x_TI.t() @ low_Tr

    return 12.0 * x_TI.numel() * RANK / bench.seconds(products)


def _attentions(bench: _Bench, precision: Precision, timed: Timed) -> list[AttentionRate]:
    """Of each length, as far as they are not too slow."""
    found: list[AttentionRate] = []
    lengths = bench.sizes.lengths
    for length in lengths:
        if found and 5.0 * length * length * bench.sizes.heads * bench.sizes.head_dim / found[-1].backward > _LONG:
            break
        one = Documents(max(1, lengths[0] * 2 // length), length, bench.sizes.heads, bench.sizes.head_dim)
        forward, backward = timed.attention(precision, one)
        flops = 2.0 * one.count * length * length * one.heads * one.head_dim
        with bench.torch.no_grad():
            seconds = bench.seconds(forward)
        found.append(AttentionRate(precision, length, flops / seconds, 2.5 * flops / bench.seconds(backward)))
    return found


def _dequantize(bench: _Bench, precision: Precision) -> float | None:
    """Weights a second from NF4 with double quantisation; None where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None or bench.kind == "mps":
        return None
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    width = bench.sizes.widths[-1]
    weight_OI = bench.random(width, width // 2, precision=precision)
    packed, state = quantize_4bit(weight_OI, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
    return weight_OI.numel() / bench.seconds(lambda: dequantize_4bit(packed, state))


def _fresh(bench: _Bench) -> float:
    """Bytes a second of blocks that are taken from the system and given back at each use."""
    torch, n = bench.torch, bench.sizes.fresh // 4
    kept = torch.ones(n)
    new, old = bench.seconds(lambda: torch.empty(n).fill_(1.0)), bench.seconds(lambda: kept.fill_(1.0))
    return bench.sizes.fresh / max(new - old, 0.01 * new)
