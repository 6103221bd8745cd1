"""The plan against the run, on a CUDA card: predicted and measured memory and time per step, 8B-shaped random weights.

    python benchmarks/plan_cuda.py [--out benchmarks/results/plan_cuda-NAME.json] [--steps 5]

LoRA on a bf16 base and QLoRA on an NF4 base, from 1 x 2,048 to 4 x 4,096 tokens a micro-batch, activations kept or
recomputed, whatever of these the card has room for. Weights are made on the card, so nothing is read or fetched: memory
and speed depend on shapes, not on values. Memory is torch's max_memory_allocated against the plan's parts that it
counts; time is the median step against the speed model over rates that this card was calibrated to. Prints the table,
the largest errors last. Needs bitsandbytes for the QLoRA half, and says so where it is missing.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.data.batches import Batch, pack
from luthier.data.conversation import Example
from luthier.hardware.calibrate import calibrate
from luthier.hardware.device import GIB, Device
from luthier.hardware.probe import this_device
from luthier.model.config import PROJECTIONS, ModelConfig
from luthier.model.decoder import Decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.model.projection import Projection
from luthier.plan.memory import NOT_TENSORS, predict_memory
from luthier.plan.settings import Quantize
from luthier.plan.speed import predict_speed
from luthier.plan.work import Work
from luthier.train.optimizer import make_optimizer
from luthier.train.step import Trainee, take_step

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, max_positions=131072, dtype="bfloat16")
RANK, ALPHA = 16, 32.0
SHAPES = ((1, 2048), (2, 2048), (4, 2048), (1, 4096), (2, 4096), (4, 4096))
CARD = "cuda"


@dataclass(frozen=True)
class Case:
    """`documents` of `length` tokens at once, two micro-batches a step."""

    quantize: Quantize
    documents: int
    length: int
    recomputed: int

    def work(self) -> Work:
        tokens = self.documents * self.length
        return Work(
            LLAMA_8B,
            "bf16",
            self.quantize,
            "adamw",
            "flash",
            RANK,
            PROJECTIONS,
            tokens,
            self.length,
            self.documents,
            self.recomputed,
            step_tokens=2 * tokens,
            micro_batches=2,
        )

    def batch(self) -> Batch:
        generator = np.random.default_rng(0)
        rows = [generator.integers(5, LLAMA_8B.vocab_size, self.length).astype(np.int32) for _ in range(self.documents)]
        return pack([Example(ids=ids, labels=ids, row=row) for row, ids in enumerate(rows)])


def random_decoder(quantize: Quantize) -> Decoder:
    """An 8B-shaped decoder with random weights, made on the card tensor by tensor."""
    linear: type[Projection] = Projection
    if quantize == "nf4":
        from luthier.model.quantize import NF4Linear

        linear = NF4Linear
    with torch.device("meta"):
        decoder = Decoder(LLAMA_8B, linear=linear)
    for name, parameter in list(decoder.named_parameters()):
        made = torch.randn(parameter.shape, dtype=torch.bfloat16, device=CARD) * 0.02
        owner = decoder.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, Projection):
            owner.assign(name.rpartition(".")[2], made)
        else:
            setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(made, requires_grad=False))
    return decoder


def measure(case: Case, trainee: Trainee, device: Device, steps: int) -> dict[str, Any]:
    work = case.work()
    trainee.decoder.checkpointing = case.recomputed
    batch = case.batch()
    train = predict_memory(work, "cuda").phase("train")
    predicted = sum(part.bytes for part in train.parts if part.name not in NOT_TENSORS) / GIB
    speed = predict_speed(work, device)
    take_step(trainee, [batch, batch], 1.0)
    torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = take_step(trainee, [batch, batch], 1.0)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    if not result.grad_norm > 0:
        raise SystemExit("the gradient is zero: nothing was trained, so nothing was measured")
    memory, seconds = torch.cuda.max_memory_allocated() / GIB, statistics.median(taken)
    return {
        "quantize": case.quantize,
        "micro_batch": case.documents,
        "length": case.length,
        "recomputed": case.recomputed,
        "predicted_gib": predicted,
        "measured_gib": memory,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "memory_error": predicted / memory - 1,
        "predicted_seconds": speed.step_seconds,
        "measured_seconds": seconds,
        "time_error": speed.step_seconds / seconds - 1,
        "tokens_per_second": work.step_tokens / seconds,
    }


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("--out", type=Path)
    args.add_argument("--steps", type=int, default=5)
    options = args.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA card here")
    device = this_device()
    device = replace(device, rates=calibrate(device))
    free = torch.cuda.mem_get_info()[0]
    results: list[dict[str, Any]] = []
    formats: tuple[Quantize, ...] = ("none", "nf4") if find_spec("bitsandbytes") else ("none",)
    if len(formats) == 1:
        print("bitsandbytes is not installed: LoRA only")
    for quantize in formats:
        decoder = random_decoder(quantize)
        add_lora(decoder, LoRASpec(RANK, ALPHA), 0)
        decoder.train()
        leaves = lora_parameters(decoder)
        optimizer = make_optimizer("adamw", leaves, learning_rate=1e-4, weight_decay=0.0)
        trainee = Trainee(decoder, leaves, optimizer, None)
        for documents, length in SHAPES:
            for recomputed in (LLAMA_8B.layers, 0):
                case = Case(quantize, documents, length, recomputed)
                if predict_memory(case.work(), "cuda").peak.bytes > 0.95 * free:
                    continue
                results.append(measure(case, trainee, device, options.steps))
                print(json.dumps(results[-1]), flush=True)
                gc.collect()
                torch.cuda.empty_cache()
        del decoder, trainee, optimizer, leaves
        gc.collect()
        torch.cuda.empty_cache()
    if options.out is not None:
        machine = {"device": device.name, "torch": torch.__version__, "cuda": torch.version.cuda}
        options.out.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    worst = {key: max((one[key] for one in results), key=abs) for key in ("memory_error", "time_error")}
    print(f"largest error of {len(results)}: memory {worst['memory_error']:+.1%}, time {worst['time_error']:+.1%}")


if __name__ == "__main__":
    main()
