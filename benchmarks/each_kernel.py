"""Each kernel of a layer, forward and backward: the reference under autograd, torch's by hand, and the C ones.

    python benchmarks/each_kernel.py [--threads 2] [--rounds 15]

The shapes are those of the 135M workload with a batch of eight rows (1,152 tokens in documents of 144, 9 heads and 3
key heads of 64, 1,536 inner, 49,152 words; 320 labelled rows for the loss), in bf16 and fp32. The three sides take
turns, so that a machine that changes its speed changes it for all; what is printed and written to
results/each_kernel.json are medians in milliseconds and how many times the reference's speed the others have.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from luthier.hardware.compiled import compiled_kernels
from luthier.hardware.probe import this_device
from luthier.kernels import REFERENCE, Kernels
from luthier.kernels.choose import TORCH, kernels_for

TOKENS, LENGTH, HEADS, KEY_HEADS, SIZE, HIDDEN, INNER, WORDS, LABELLED = 1152, 144, 9, 3, 64, 576, 1536, 49152, 320
LENGTHS = (LENGTH,) * (TOKENS // LENGTH)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("--rounds", type=int, default=15)
    args.add_argument("--threads", type=int, default=2)
    options = args.parse_args()
    torch.set_num_threads(options.threads)
    results = [row for name in DTYPES for row in measure(name, options.rounds)]
    device = this_device()
    machine = {"cpu": device.name, "cores": device.cores, "threads": options.threads, "memory_gib": device.memory_gib}
    document = {"machine": machine, "torch": torch.__version__, "python": platform.python_version(), "results": results}
    document["compiled"] = compiled_kernels().variant
    out = Path(__file__).parent / "results" / "each_kernel.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    for row in results:
        print(f"{row['dtype']}  {row['kernel']:14s}", *(f"{side} {row[side]:8.2f} ms" for side in SIDES), row["times"])


SIDES = ("reference", "torch", "native")


def measure(name: str, rounds: int) -> list[dict[str, object]]:
    """A row for each kernel in one dtype."""
    dtype = DTYPES[name]
    chosen = kernels_for(torch.device("cpu"), dtype)
    if chosen.notice:
        raise SystemExit(f"nothing to compare: {chosen.notice}")
    sides: dict[str, Kernels] = dict(zip(SIDES, (REFERENCE, TORCH, chosen.kernels), strict=True))
    rows: list[dict[str, object]] = []
    for kernel, call, inputs in cases(dtype):
        taken: dict[str, list[float]] = {side: [] for side in SIDES}
        for round_ in range(rounds + 2):
            for side, kernels in sides.items():
                leaves = [x.detach().requires_grad_() for x in inputs]
                began = time.perf_counter()
                call(kernels, leaves).sum().backward()
                if round_ >= 2:
                    taken[side].append(1000 * (time.perf_counter() - began))
        medians = {side: round(statistics.median(times), 3) for side, times in taken.items()}
        times = {side: round(medians["reference"] / medians[side], 2) for side in SIDES[1:]}
        rows.append({"kernel": kernel, "dtype": name, **medians, "times": times})
    return rows


def cases(dtype: torch.dtype) -> list[tuple[str, Callable[[Kernels, list[Tensor]], Tensor], list[Tensor]]]:
    """Name, what is called, and the tensors that get a gradient."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, angle_Td, head = random(HIDDEN), random(TOKENS, SIZE // 2).repeat(1, 2), random(WORDS, HIDDEN) * 0.05
    labels = torch.randint(0, WORDS, (LABELLED,), generator=generator)
    q, k, v = random(TOKENS, HEADS, SIZE), random(TOKENS, KEY_HEADS, SIZE), random(TOKENS, KEY_HEADS, SIZE)
    return [
        ("rms_norm", lambda on, x: on.rms_norm(x[0], weight, 1e-5), [random(TOKENS, HIDDEN)]),
        ("rope", lambda on, x: on.rope(x[0], angle_Td.cos(), angle_Td.sin()), [q]),
        ("swiglu", lambda on, x: on.swiglu(x[0], x[1]), [random(TOKENS, INNER), random(TOKENS, INNER)]),
        ("attention", lambda on, x: on.attention(x[0], x[1], x[2], LENGTHS, None), [q, k, v]),
        ("head and loss", lambda on, x: on.linear_cross_entropy(x[0], head, labels), [random(LABELLED, HIDDEN)]),
    ]


if __name__ == "__main__":
    main()
