"""What each technique of the CPU training step is worth: the step with it against the step without it, in turn.

    python ../shared/bench/make_workload.py WORK --shapes 8m,135m
    python benchmarks/techniques.py WORK [--shapes 8m,135m] [--rounds 12]

In one process all variants take the same batches of eight GSM8K rows in bf16, forward and backward, one after another,
so that a machine that changes its speed changes it for all; the first two rounds are not counted. What a process has
from its start (the allocator) is measured by processes of their own, in turn. Prints and writes
results/techniques.json: for each variant its median time over that of the step as it is, so 1.30 means that a step
takes 1.30 times as long without the technique (or, of what is named "tried", with it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from luthier.cli.allocator import TUNABLES
from luthier.data.batches import Batch, Batches
from luthier.data.prepare import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.hardware.probe import this_device
from luthier.kernels import REFERENCE, Kernels
from luthier.kernels.batched import Batched
from luthier.kernels.choose import TORCH, kernels_for
from luthier.kernels.loss import linear_cross_entropy
from luthier.kernels.native import Native
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.recipe.load import recipe_from_mapping
from luthier.train import halves
from luthier.train.step import forward_backward

BATCH, RANK, ALPHA, DTYPE = 8, 16, 32.0, torch.bfloat16
REUSE = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
ALLOCATORS = {
    "the allocator as glibc has it": "glibc.malloc.perturb=0",
    "the allocator reusing, but giving back": REUSE,
    "tried: huge pages": f"{TUNABLES}:glibc.malloc.hugetlb=1",
}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("work", type=Path)
    args.add_argument("--shapes", default="8m,135m")
    args.add_argument("--rounds", type=int, default=12)
    args.add_argument("--worker", choices=["all", "one"], help=argparse.SUPPRESS)
    options = args.parse_args()
    if options.worker:
        print(json.dumps(measure(options.work / options.shapes, options.rounds, alone=options.worker == "one")))
        return
    results = {shape: compared(shape, options) for shape in options.shapes.split(",")}
    device = this_device()
    machine = {"cpu": device.name, "cores": device.cores, "memory_gib": device.memory_gib}
    document = {"machine": machine, "torch": torch.__version__, "python": platform.python_version(), "results": results}
    out = Path(__file__).parent / "results" / "techniques.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def compared(shape: str, options: argparse.Namespace) -> dict[str, float]:
    """Each variant's median time over the whole step's."""
    times = worker(shape, "all", TUNABLES, options)
    ratios = {name: times[name] / times[WHOLE] for name in times if name != WHOLE}
    rounds = [
        {name: worker(shape, "one", tunables, options)[WHOLE] for name, tunables in sides().items()} for _ in "123"
    ]
    for name in ALLOCATORS:
        ratios[name] = statistics.median(taken[name] / taken[WHOLE] for taken in rounds)
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


WHOLE = "as it is"
UNDIVIDED = "micro-batches not taken as two halves at once"
FEWER_ROWS = "micro-batches of two rows"


def sides() -> dict[str, str]:
    return {WHOLE: TUNABLES, **ALLOCATORS}


def worker(shape: str, which: str, tunables: str, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds by variant, from a process that begins with these tunables."""
    words = [sys.executable, __file__, str(options.work), "--shapes", shape, "--rounds", str(options.rounds)]
    environment = {**os.environ, "GLIBC_TUNABLES": tunables}
    done = subprocess.run(
        [*words, "--worker", which], env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=3600
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(base: Path, rounds: int, *, alone: bool) -> dict[str, float]:
    """Median seconds of a step by variant; `alone`: of the whole step only."""
    decoder = load_decoder(base, dtype=DTYPE)
    add_lora(decoder, LoRASpec(RANK, ALPHA), seed=0)
    decoder.train()
    recipe = {"model": str(base), "data": str(base.parent / "chat.jsonl"), "split": {"train": 1.0, "eval": 0.0}}
    dataset = prepare(recipe_from_mapping(recipe), load_tokenizer(base))
    whole, split = Batches(dataset.train, BATCH, BATCH, seed=0), Batches(dataset.train, BATCH, BATCH // 4, seed=0)
    runs, worth = variants(decoder), halves.WORTH
    taken: dict[str, list[float]] = {name: [] for name in ([WHOLE] if alone else [*runs, UNDIVIDED, FEWER_ROWS])}
    for round_ in range(rounds + 2):
        for name in taken:
            decoder.use(runs.get(name, runs[WHOLE]))
            halves.WORTH = 2**60 if name == UNDIVIDED else worth
            seconds = step(decoder, (split if name == FEWER_ROWS else whole).step(round_ % 4))
            if round_ >= 2:
                taken[name].append(seconds)
    return {name: statistics.median(times) for name, times in taken.items()}


def variants(decoder: Decoder) -> dict[str, Kernels]:
    """The step as it is, and with one technique taken away."""
    chosen = kernels_for(decoder.device, DTYPE)
    native = chosen.kernels.by_hand
    if not isinstance(native, Native):
        raise SystemExit(f"nothing to compare: {chosen.notice}")
    plain = Batched()

    def with_torch(*names: str) -> Kernels:
        mixed = Mixed(native, plain, names)
        return replace(chosen.kernels, by_hand=mixed, document=16 if "attention" in names else 1)

    elementwise = ("rms_norm", "rms_norm_backward", "rope", "swiglu", "swiglu_backward")
    return {
        WHOLE: chosen.kernels,
        "attention by torch's batched products": with_torch("attention", "attention_backward"),
        "element-wise parts by torch": with_torch(*elementwise),
        "loss by torch": replace(chosen.kernels, linear_cross_entropy=linear_cross_entropy),
        "documents filled up to 16 tokens": replace(chosen.kernels, document=16),
        "no C at all": TORCH,
        "no layer by hand: torch's operations under autograd": REFERENCE,
    }


class Mixed:
    """A native set of operations, some of them torch's."""

    def __init__(self, native: Native, plain: Batched, names: tuple[str, ...]) -> None:
        for name in (
            "rms_norm",
            "rms_norm_backward",
            "rope",
            "swiglu",
            "swiglu_backward",
            "attention",
            "attention_backward",
        ):
            method: Callable[..., object] = getattr(plain if name in names else native, name)
            setattr(self, name, method)


def step(decoder: Decoder, micro_batches: tuple[Batch, ...]) -> float:
    began = time.perf_counter()
    forward_backward(decoder, micro_batches)
    seconds = time.perf_counter() - began
    for parameter in lora_parameters(decoder).values():
        parameter.grad = None
    return seconds


if __name__ == "__main__":
    main()
