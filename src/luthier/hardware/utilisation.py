"""From a datasheet's peaks to the rates that training reaches: one factor for each kind of thing, each with its reason.

A product of T tokens with a weight whose smaller side is w does 2 T w N FLOP and moves about T N elements of the wider
side, so its rate is bounded by arithmetic and by memory alike (the roofline of Williams, Waterman and Patterson, 2009):
1 / (1 / arithmetic + bytes / (2 w bandwidth)). LoRA's thin products come out slow for this reason alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from luthier.hardware.device import AttentionRate, MatmulRate, Precision, Rates

__all__ = ["CPU", "CUDA", "CUDA_LIMITED", "MPS", "ROCM", "Peaks", "Utilisation", "rates_of"]

_WIDTHS = (16, 512, 4096)
_LENGTH = 2048
_BYTES: dict[Precision, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
_NF4_BYTES = 0.52  # half a byte and an eighth of scales, doubly quantised (QLoRA, section 3: 0.127 bits)


@dataclass(frozen=True)
class Utilisation:
    """Parts of the peak: of large products in 16 and in 32 bits, of fused attention forward and backward; of the
    memory's bandwidth. operation: seconds of one operation. fresh: as in `Rates`."""

    half: float
    single: float
    forward: float
    backward: float
    bandwidth: float
    operation: float
    fresh: float | None = None


# Products: NeMo's whole LoRA step reaches 402 of H100's 989 TFLOP/s (NeMo's performance summary, 2025-10-02), products
# alone more; 0.65-0.75 of the dense peak is usual for shapes of these models. fp32 outside tensor cores: 0.7.
# Attention: FlashAttention-2 (arXiv:2307.08691) reports 50-73 % of an A100 forward and up to 63 % backward, causal and
# at 2,048 tokens at the low end; on H100 torch's own reaches 0.3 (pytorch/benchmark #2296). Bandwidth: 0.8.
CUDA = Utilisation(0.65, 0.7, 0.4, 0.3, 0.8, 1e-5)

# 70 W cards cannot hold their boost clock in products: T4's 65 and L4's 121 TFLOP/s are at clocks above what they keep.
# T4 has no FlashAttention-2; its memory-efficient kernels reach about half as much. An assumption, not a measurement.
CUDA_LIMITED = Utilisation(0.45, 0.5, 0.2, 0.12, 0.8, 1e-5)

# MI300X cannot hold its boost clock in products either (AMD's blog on max-achievable FLOPs, part 1, 2025-02-14, says
# why); how much is left for shapes of these models is an assumption, not a measurement.
ROCM = Utilisation(0.45, 0.5, 0.25, 0.15, 0.8, 1e-5)

# Metal's matrix kernels come near the shader cores' peak; there is no fused attention with a backward pass.
MPS = Utilisation(0.7, 0.7, 0.2, 0.15, 0.8, 2e-5)

# oneDNN's products at full clock; attention does much besides products. Fresh pages: the kernel clears 4 KiB in a
# microsecond or a little more.
CPU = Utilisation(0.5, 0.6, 0.2, 0.15, 0.8, 1e-5, 3e9)


@dataclass(frozen=True)
class Peaks:
    """A datasheet's figures in FLOP/s by precision and bytes a second."""

    flops: Mapping[Precision, float]
    bandwidth: float
    source: str


def rates_of(peaks: Peaks, part: Utilisation) -> Rates:
    """What training is taken to reach on a device with `peaks`."""
    bandwidth = peaks.bandwidth * part.bandwidth
    matmul: list[MatmulRate] = []
    attention: list[AttentionRate] = []
    for precision, peak in peaks.flops.items():
        arithmetic = peak * (part.single if precision == "fp32" else part.half)
        for width in _WIDTHS:
            moved = _BYTES[precision] / (2 * width * bandwidth)
            matmul.append(MatmulRate(precision, width, 1 / (1 / arithmetic + moved)))
        attention.append(AttentionRate(precision, _LENGTH, peak * part.forward, peak * part.backward))
    dequantize = bandwidth / (_NF4_BYTES + _BYTES["bf16"])
    most = part.single if set(peaks.flops) == {"fp32"} else part.half
    source = f"{peaks.source}; {most:.0%} of its peak, {part.bandwidth:.0%} of its bandwidth (docs/hardware.md)"
    return Rates(tuple(matmul), tuple(attention), bandwidth, dequantize, part.operation, source, part.fresh)
