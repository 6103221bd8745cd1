"""Sizes that memory and time both rest on, each in one place: parameters, bytes of a number, tokens of a group."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.hardware.device import Precision
from luthier.model.config import ModelConfig, projection_shapes
from luthier.plan.settings import Optimizer, Quantize

__all__ = [
    "CHUNK_LOGITS",
    "CUDA_CHUNK_LOGITS",
    "EVALUATION_TOKENS",
    "NF4_BITS",
    "SCORES",
    "TILE",
    "adapter_parameters",
    "base_bytes",
    "element_bytes",
    "layer_weights",
    "moment_bytes",
]

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of one weight: 4 bits, an 8-bit scale for 64 of them, a 32-bit scale for 256 scales (QLoRA, section 3)."""

CHUNK_LOGITS = 2**25
"""Logits that exist at once; the loss's own constant (kernels/loss.py), held equal by a test."""

CUDA_CHUNK_LOGITS = 2**26
"""The same of the CUDA kernels (kernels/cuda.py), held equal by a test."""

SCORES = 2**22
"""Scores that exist at once with torch's kernels (kernels/batched.py), held equal by a test."""

TILE = 2**19
"""Numbers that several passes of torch's kernels go over at once (kernels/batched.py), held equal by a test."""

EVALUATION_TOKENS = 4096
"""Held-out tokens that go through together; evaluate/loss.py's own default, held equal by a test."""


def element_bytes(precision: Precision) -> int:
    """Bytes of one number."""
    return 4 if precision == "fp32" else 2


def moment_bytes(optimizer: Optimizer) -> float:
    """AdamW's two moments of one parameter: fp32, or one byte and a fp32 scale for 256."""
    return 8.0 if optimizer == "adamw" else 2 * (1 + 4 / 256)


def layer_weights(config: ModelConfig) -> int:
    """Weights of the seven projections of one layer."""
    return sum(out * inp for out, inp in projection_shapes(config).values())


def base_bytes(config: ModelConfig, quantize: Quantize, precision: Precision) -> float:
    """Bytes of the seven projections of one layer as they are held.

    FP8: one for a weight, and a fp32 scale for each output.
    """
    weights = layer_weights(config)
    if quantize == "nf4":
        return weights * NF4_BITS / 8
    if quantize == "fp8":
        return weights + 4 * sum(out for out, _ in projection_shapes(config).values())
    return weights * element_bytes(precision)


def adapter_parameters(config: ModelConfig, targets: Sequence[str], rank: int) -> int:
    """Trainable parameters: rank * (out + in) for each target of each layer."""
    shapes = projection_shapes(config)
    return config.layers * rank * sum(sum(shapes[name]) for name in targets)
