"""Each operation of the CUDA kernels beside the reference, at the sizes of an 8b layer and two packs. Prints JSON.

    python benchmarks/gpu_operations.py ROWS.npz [--shared ../shared]

Milliseconds on the card, medians. Attention is timed for the documents of a real micro-batch. Products: the vendor's in
bf16, ours in FP8 with the rounding that belongs to them, and that rounding and transposing alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_rows import SHARED, load_rows
from gpu_steps import CARD, LLAMA_8B, PRODUCT, gemm_rate, seconds_of
from torch import Tensor
from torch.nn import functional

from luthier.kernels import fp8
from luthier.kernels.attention import attention
from luthier.kernels.batched import Batched
from luthier.kernels.by_hand import ByHand
from luthier.kernels.choose import kernels_for
from luthier.kernels.loss import cross_entropy

TOKENS, HIDDEN, INNER = PRODUCT
EPS = 1e-5
LOGITS_ROWS = 512


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=CARD)


def pointwise(plain: ByHand, ours: ByHand) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, the reference, ours."""
    x, grad, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(HIDDEN)
    yield "rms_norm", lambda: plain.rms_norm(x, weight, EPS), lambda: ours.rms_norm(x, weight, EPS)
    yield (
        "rms_norm, backward and added",
        lambda: plain.rms_norm_backward(grad, x, weight, EPS, grad),
        lambda: ours.rms_norm_backward(grad, x, weight, EPS, grad),
    )
    q_THd = random(TOKENS, LLAMA_8B.heads, LLAMA_8B.head_dim)
    cos_Td, sin_Td = random(TOKENS, LLAMA_8B.head_dim), random(TOKENS, LLAMA_8B.head_dim)
    yield "rope of q", lambda: plain.rope(q_THd, cos_Td, sin_Td), lambda: ours.rope(q_THd, cos_Td, sin_Td)
    gate, up, error = random(TOKENS, INNER), random(TOKENS, INNER), random(TOKENS, INNER)
    yield "swiglu", lambda: plain.swiglu(gate, up), lambda: ours.swiglu(gate, up)
    yield (
        "swiglu, backward",
        lambda: plain.swiglu_backward(error, gate, up),
        lambda: ours.swiglu_backward(error, gate, up),
    )


def attentions(
    ours: ByHand, lengths: tuple[int, ...]
) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    heads = (LLAMA_8B.heads, LLAMA_8B.kv_heads, LLAMA_8B.kv_heads)
    q, k, v = (random(sum(lengths), count, LLAMA_8B.head_dim) for count in heads)
    yield "attention", lambda: attention(q, k, v, lengths, None), lambda: ours.attention(q, k, v, lengths, None)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o_THd, grad = attention(leaves[0], leaves[1], leaves[2], lengths, None), random(*q.shape)
    outputs = ours.attention(q, k, v, lengths, None)
    yield (
        "attention, backward",
        lambda: torch.autograd.grad(o_THd, leaves, grad, retain_graph=True),
        lambda: ours.attention_backward(grad, (q, k, v), outputs, lengths, None),
    )


def losses() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    from luthier.kernels.cuda import Cuda

    logits, labels = random(LOGITS_ROWS, LLAMA_8B.vocab_size), torch.zeros(LOGITS_ROWS, dtype=torch.int64, device=CARD)
    yield (
        f"cross-entropy of {LOGITS_ROWS} rows",
        lambda: cross_entropy(logits, labels, None, True),
        lambda: Cuda.cross_entropy(logits, labels, None, True),
    )


def products() -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    x_TI, grad_TO, weight_OI = random(TOKENS, HIDDEN), random(TOKENS, INNER), random(INNER, HIDDEN)
    packed_OI, scale_O1 = fp8.rounded(weight_OI)
    scale_O = scale_O1.flatten()
    yield (
        "product: bf16, FP8",
        lambda: functional.linear(x_TI, weight_OI),
        lambda: fp8.product(x_TI, packed_OI, scale_O),
    )
    yield (
        "product back: bf16, FP8",
        lambda: grad_TO @ weight_OI,
        lambda: fp8.product_back(grad_TO, packed_OI, scale_O),
    )
    yield (
        "rounding to FP8 with a factor",
        lambda: fp8.quantize_rows(grad_TO, scale_O),
        lambda: fp8.rounded(grad_TO, scale_O),
    )
    yield (
        "transposing a weight in FP8",
        lambda: fp8.transpose(packed_OI),
        lambda: fp8._passes(x_TI.device).transpose(packed_OI),
    )


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("rows", type=Path)
    args.add_argument("--shared", type=Path, default=SHARED)
    options = args.parse_args()
    lengths = load_rows(options.rows, options.shared).batches(2, 4096)[0].lengths
    device = torch.device(CARD, 0)
    choice = kernels_for(device, torch.bfloat16)
    if choice.kernels.by_hand is None:
        raise SystemExit(f"nothing to time: {choice.notice}")
    ours = choice.kernels.by_hand
    cases = [*pointwise(Batched(), ours), *attentions(ours, lengths), *losses()]
    lacks = fp8.missing(device, torch.bfloat16)
    if not lacks:
        cases += products()
    found = []
    for name, plain, fast in cases:
        milliseconds = [seconds_of(run) * 1e3 for run in (plain, fast)]
        found.append({"operation": name, "reference_ms": milliseconds[0], "ours_ms": milliseconds[1]})
    print(json.dumps({"kernels": choice.kernels.name, "fp8": lacks or "yes", "gemm_flops": gemm_rate(), "rows": found}))


if __name__ == "__main__":
    main()
