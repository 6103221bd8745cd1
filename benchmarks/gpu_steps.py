"""One of gpu.py's cases of ours, in a process of its own: an 8b-shaped LoRA trained on packed rows. Prints JSON.

    python benchmarks/gpu_steps.py ROWS.npz --quantize none|nf4|fp8 [--packs 2] [--length 4096] [--steps 200]
        [--checkpointing LAYERS] [--optimizer adamw] [--shared ../shared]

Weights are random (0.02 in the standard deviation, norms 1, the same in every case) and made on the card: speed and
memory depend on shapes, and a random model learns too. Tokens are real, packed, none of them padding; seconds are of
whole optimizer steps, the card waited for. Rates are medians over the steps after the first five.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_rows import SHARED, load_rows
from speed_flops import Lengths, flops_per_token
from torch import Tensor, nn

from luthier.data.batches import Batch
from luthier.kernels.choose import kernels_for
from luthier.model.config import ModelConfig
from luthier.model.decoder import Decoder
from luthier.model.fp8 import check_fp8
from luthier.model.load import linear_of
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.model.projection import Projection
from luthier.train.optimizer import make_optimizer
from luthier.train.step import Trainee, take_step

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500000.0, max_positions=8192)
RANK, ALPHA, LEARNING_RATE = 16, 32.0, 2e-4
CARD = "cuda"
GIB = 2**30
FIRST = 5
"""Steps that are not timed: kernels are compiled and memory is found in them."""

PRODUCT = (8192, 4096, 14336)
"""T, I, O of the product that rates are held against: two packs through the largest projection."""


def seconds_of(run: Callable[[], object], repeats: int = 30) -> float:
    """Median seconds on the card, each call timed by itself, after five that are not."""
    for _ in range(5):
        run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for began, ended in pairs:
        began.record()
        run()
        ended.record()
    torch.cuda.synchronize()
    return statistics.median(began.elapsed_time(ended) / 1e3 for began, ended in pairs)


def gemm_rate() -> float:
    """FLOP/s of the vendor's bf16 product."""
    tokens, inputs, outputs = PRODUCT
    x_TI = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=CARD)
    weight_OI = torch.randn(outputs, inputs, dtype=torch.bfloat16, device=CARD)
    seconds = seconds_of(lambda: nn.functional.linear(x_TI, weight_OI))
    return 2.0 * tokens * inputs * outputs / seconds


def random_decoder(config: ModelConfig, linear: type[Projection]) -> Decoder:
    """Made on the card tensor by tensor, always the same numbers."""
    generator = torch.Generator(CARD).manual_seed(0)
    with torch.device("meta"):
        decoder = Decoder(config, linear=linear)
    for name, parameter in list(decoder.named_parameters()):
        owner_name, _, attribute = name.rpartition(".")
        owner = decoder.get_submodule(owner_name)
        made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=CARD)
        made = made.fill_(1.0) if made.ndim == 1 else made.normal_(0.0, 0.02, generator=generator)
        if isinstance(owner, Projection):
            owner.assign(attribute, made)
        else:
            setattr(owner, attribute, nn.Parameter(made, requires_grad=False))
    return decoder


def trainee_of(options: argparse.Namespace, config: ModelConfig) -> tuple[Trainee, str, str]:
    """The model with its optimizer, the name of its kernels, and what was said about them."""
    if options.quantize == "fp8":
        check_fp8(torch.device(CARD), torch.bfloat16)
    decoder = random_decoder(config, linear_of(options.quantize))
    add_lora(decoder, LoRASpec(RANK, ALPHA), seed=0)
    decoder.train()
    decoder.checkpointing = options.checkpointing
    choice = kernels_for(decoder.device, torch.bfloat16)
    decoder.use(choice.kernels)
    leaves = lora_parameters(decoder)
    optimizer = make_optimizer(options.optimizer, leaves, learning_rate=LEARNING_RATE, weight_decay=0.0)
    return Trainee(decoder, leaves, optimizer, None), choice.kernels.name, choice.notice


def trained(trainee: Trainee, batches: list[Batch], steps: int) -> dict[str, Any]:
    """Seconds, tokens, losses and gradient norms of the steps, and the peak of memory over all of them."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    seconds, tokens, losses, norms = [], [], [], []
    for step in range(steps):
        torch.cuda.synchronize()
        began = time.perf_counter()
        result = take_step(trainee, [batches[step % len(batches)]], 1.0)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        tokens.append(result.tokens)
        losses.append(result.loss)
        norms.append(result.grad_norm)
    if not min(norms) > 0:
        raise SystemExit("a gradient is zero: nothing was trained, so nothing was measured")
    if not statistics.mean(losses[-FIRST:]) < statistics.mean(losses[:FIRST]):
        raise SystemExit(f"the loss does not fall: {losses}")
    rates = [count / taken for count, taken in zip(tokens[FIRST:], seconds[FIRST:], strict=True)]
    return {
        "steps": steps,
        "tokens_per_second": statistics.median(rates),
        "tokens_per_step": statistics.mean(tokens),
        "seconds_per_step": statistics.median(seconds[FIRST:]),
        "first_step_seconds": seconds[0],
        "peak_gib": torch.cuda.max_memory_allocated() / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": [round(loss, 5) for loss in losses],
        "least_grad_norm": min(norms),
    }


def share(found: dict[str, Any], config: ModelConfig, batches: list[Batch]) -> dict[str, float]:
    """Useful FLOP/s (no recomputation counted) and its share of the product's rate."""
    lengths = [length for batch in batches for length in batch.lengths]
    tokens = sum(lengths)
    mean = sum(length * length for length in lengths) / tokens
    measured = Lengths(len(lengths), tokens, sum(batch.labelled for batch in batches), mean)
    shape = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    flops = flops_per_token(shape, RANK, measured)["total"]
    return {"flops_per_token": flops, "share_of_gemm": found["tokens_per_second"] * flops / found["gemm_flops"]}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("rows", type=Path)
    args.add_argument("--quantize", choices=("none", "nf4", "fp8"), default="none")
    args.add_argument("--packs", type=int, default=2)
    args.add_argument("--length", type=int, default=4096)
    args.add_argument("--steps", type=int, default=200)
    args.add_argument("--checkpointing", type=int, default=0)
    args.add_argument("--optimizer", choices=("adamw", "adamw-8bit"), default="adamw")
    args.add_argument("--layers", type=int, default=LLAMA_8B.layers, help="fewer, to try the benchmark itself")
    args.add_argument("--shared", type=Path, default=SHARED)
    options = args.parse_args()
    config = replace(LLAMA_8B, layers=options.layers)
    batches: list[Batch] = load_rows(options.rows, options.shared).batches(options.packs, options.length)
    before = gemm_rate()
    trainee, kernels, notice = trainee_of(options, config)
    weights: list[Tensor] = [*trainee.decoder.parameters()]
    found = {
        "quantize": options.quantize,
        "packs": options.packs,
        "length": options.length,
        "checkpointing": options.checkpointing,
        "optimizer": options.optimizer,
        "layers": options.layers,
        "kernels": kernels,
        "notice": notice,
        "weights_gib": sum(weight.nbytes for weight in weights) / GIB,
        **trained(trainee, batches, options.steps),
    }
    found["gemm_flops"] = max(before, gemm_rate())
    print(json.dumps({**found, **share(found, config, batches)}))


if __name__ == "__main__":
    main()
