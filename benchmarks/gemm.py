"""What this machine's matrix products reach right now: prints FLOP/s of two products as one JSON object.

    python benchmarks/gemm.py bf16|fp32

2048 x 2048 x 2048, and 1,024 tokens through a weight of 2048 x 2048; each the median over half a second or more, after
a tenth of a second of warming up. torch takes as many threads as it does in training.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
PRODUCTS = ((2048, 2048, 2048), (1024, 2048, 2048))
WARM, SECONDS = 0.1, 0.5


def rate(tokens: int, inputs: int, outputs: int, dtype: torch.dtype) -> float:
    """FLOP/s of x W'. Letters: T tokens, I inputs, O outputs."""
    x_TI, weight_OI = torch.randn(tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    taken: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < WARM + SECONDS:
        start = time.perf_counter()
        torch.nn.functional.linear(x_TI, weight_OI)
        end = time.perf_counter()
        if start - began > WARM or not taken:  # the first: a machine so slow that it takes all of the time
            taken.append(end - start)
    return 2.0 * tokens * inputs * outputs / statistics.median(taken)


def main() -> None:
    dtype = DTYPES[sys.argv[1]]
    with torch.no_grad():
        print(json.dumps({"x".join(map(str, product)): rate(*product, dtype) for product in PRODUCTS}))


if __name__ == "__main__":
    main()
