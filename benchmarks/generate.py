"""Speed of generation beside transformers' `generate`, on this CPU: one text, and eight at once.

    python benchmarks/generate.py build/bench/work [--shapes 8m,135m] [--tokens 64] [--rounds 3] [--threads 2]
                                  [--adapter]

The model folders are those of `make bench` (random weights of real shapes, bf16). Both sides write the same number of
tokens greedily after the same prompts (24 tokens; of eight, 24 to 31, which transformers pads on the left), with the
KV cache each has by default, in a process of their own for each round, and take turns, so that a machine that changes
its speed changes it for both. Per side the fastest round counts. Decoding is timed from the first new token to the
last, reading the prompt apart. --adapter also times an adapter of rank 16 on every projection, unmerged, on 16-bit and
on NF4 weights; merged is the model itself.

Prints a table and writes results/generate.json: tokens a second, and how many times transformers' ours is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

BATCHES = (1, 8)
PROMPT = 24
OURS = ("luthier", "unmerged", "nf4")


def prompts(batch: int) -> list[list[int]]:
    return [[(7919 * (row + 1) * (n + 1)) % 8000 + 100 for n in range(PROMPT + row)] for row in range(batch)]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("work", type=Path)
    args.add_argument("--shapes", default="8m,135m")
    args.add_argument("--tokens", type=int, default=64)
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--threads", type=int, default=2)
    args.add_argument("--adapter", action="store_true")
    args.add_argument("--side", help=argparse.SUPPRESS)
    args.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "generate.json")
    options = args.parse_args()
    if options.side:
        print(json.dumps(one_side(options.side, options.work, options.tokens, options.threads)))
        return
    sides = ["transformers", "luthier", *(OURS[1:] if options.adapter else ())]
    results = [row for shape in options.shapes.split(",") for row in measure(shape, sides, options)]
    from luthier.hardware.compiled import compiled_kernels
    from luthier.hardware.probe import this_device

    device = this_device()
    machine = {"cpu": device.name, "cores": device.cores, "threads": options.threads}
    document = {
        "machine": machine,
        "compiled": compiled_kernels().variant,
        "tokens": options.tokens,
        "results": results,
    }
    options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def measure(shape: str, sides: list[str], options: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each batch: tokens a second of each side, and times transformers'."""
    best: dict[tuple[str, str], float] = {}
    for _ in range(options.rounds):
        for side in sides:
            command = [sys.executable, __file__, str(options.work / shape), "--side", side]
            command += ["--tokens", str(options.tokens), "--threads", str(options.threads)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise SystemExit(f"{side} on {shape} failed:\n{done.stderr[-2000:]}")
            for batch, rate in json.loads(done.stdout.splitlines()[-1]).items():
                best[side, batch] = max(rate, best.get((side, batch), 0.0))
    rows: list[dict[str, object]] = []
    for batch in map(str, BATCHES):
        rates = {side: round(best[side, batch], 1) for side in sides}
        times = {side: round(best[side, batch] / best["transformers", batch], 2) for side in sides[1:]}
        rows.append({"shape": shape, "batch": int(batch), "tokens_per_second": rates, "times_transformers": times})
        print(f"{shape:5s} batch {batch}  ", rates, times, flush=True)
    return rows


def one_side(side: str, folder: Path, tokens: int, threads: int) -> dict[str, float]:
    """Batch -> tokens a second, the fastest of two, after one that is not timed."""
    import torch

    torch.set_num_threads(threads)
    write = by_transformers(folder, tokens) if side == "transformers" else by_luthier(folder, tokens, side)
    found: dict[str, float] = {}
    for batch in BATCHES:
        found[str(batch)] = max(write(batch) for _ in range(3))
    return found


def by_transformers(folder: Path, tokens: int) -> Callable[[int], float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    class Watch:
        """When each token was there: a stopping criterion is asked after each."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    def write(batch: int) -> float:
        rows = prompts(batch)
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        watch = Watch()
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=tokens,
            eos_token_id=[-1],
            pad_token_id=0,
            stopping_criteria=[watch],
        )
        return batch * (tokens - 1) / (watch.times[-1] - watch.times[0])

    return write


def by_luthier(folder: Path, tokens: int, side: str) -> Callable[[int], float]:
    import torch

    from luthier.data.tokenizer import load_tokenizer
    from luthier.generate.engine import Engine
    from luthier.generate.request import Request
    from luthier.kernels.choose import kernels_for
    from luthier.model.load import load_decoder
    from luthier.model.lora import LoRASpec, add_lora

    decoder = load_decoder(folder, dtype=torch.bfloat16, quantize="nf4" if side == "nf4" else "none")
    decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)
    if side != "luthier":
        add_lora(decoder, LoRASpec(16, 32.0), seed=0)
    tokenizer = load_tokenizer(folder)

    def write(batch: int) -> float:
        engine = Engine(decoder, lambda ids: tokenizer.decode(ids, skip_special=True), slots=batch)
        for row in prompts(batch):
            engine.add(Request(tuple(row), max_new_tokens=tokens))
        engine.step()  # reads every prompt and draws each first token, as the watch above begins after them
        began, drawn = time.perf_counter(), 0
        while not engine.idle:
            drawn += len(engine.step())
        if drawn != batch * (tokens - 1):
            raise SystemExit(f"{drawn} tokens were drawn, not {batch * (tokens - 1)}")
        return drawn / (time.perf_counter() - began)

    return write


if __name__ == "__main__":
    main()
