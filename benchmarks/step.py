"""One LoRA training step on sprig: ours against transformers + PEFT, interleaved in one run, on the bundled tales.

    python benchmarks/step.py [--rounds 30] [--threads 2]

Same rows, same rank and targets, fp32 and bf16; the peer pads its batch, as its collators do. Prints and writes
results/step.json: median milliseconds of each, their ratio, real tokens per second, and that both losses agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

from luthier.data.batches import Batches
from luthier.data.conversation import Example
from luthier.data.prepare import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.hardware.probe import this_device
from luthier.model.config import PROJECTIONS
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.recipe.load import recipe_from_mapping
from luthier.train.step import forward_backward

RANK, ALPHA, BATCH = 16, 32, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def padded(rows: list[Example]) -> dict[str, torch.Tensor]:
    """The rows as the peer takes them: right-padded, with an attention mask; padding has no label."""
    width = max(len(row) for row in rows)
    ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
    for i, row in enumerate(rows):
        ids[i, : len(row)], labels[i, : len(row)] = torch.tensor(row.ids), torch.tensor(row.labels)
        mask[i, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("--rounds", type=int, default=30)
    args.add_argument("--threads", type=int, default=2)
    options = args.parse_args()
    torch.set_num_threads(options.threads)
    base = locate_model("sprig")
    recipe = recipe_from_mapping({"model": "sprig", "data": "tales"})
    dataset = prepare(recipe, load_tokenizer(base))
    batches = Batches(dataset.train, BATCH, BATCH, seed=0)
    results = [measure(base, dataset.train, batches, name, options.rounds) for name in DTYPES]
    device = this_device()
    machine = {"cpu": device.name, "cores": device.cores, "threads": options.threads, "memory_gib": device.memory_gib}
    document = {"machine": machine, "torch": torch.__version__, "python": platform.python_version(), "results": results}
    out = Path(__file__).parent / "results" / "step.json"
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))


def measure(base: Path, rows: tuple[Example, ...], batches: Batches, name: str, rounds: int) -> dict[str, object]:
    """Both in turn on the same batch, `rounds` times, after three rounds that are not counted."""
    ours = load_decoder(base, dtype=DTYPES[name])
    add_lora(ours, LoRASpec(RANK, float(ALPHA)), seed=0)
    ours.train()
    peer = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[name])
    spec = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    peer = get_peft_model(peer, spec).train()
    by_row = {row.row: row for row in rows}
    times: dict[str, list[float]] = {"luthier": [], "peer": []}
    tokens = 0
    for round_ in range(rounds + 3):
        (batch,) = batches.step(round_)
        inputs = padded([by_row[row] for row in batch.rows])
        began = time.perf_counter()
        mine = forward_backward(ours, (batch,))
        middle = time.perf_counter()
        logits = peer(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        theirs = functional.cross_entropy(logits.float().flatten(0, 1), inputs["labels"][:, 1:].flatten())
        theirs.backward()  # type: ignore[no-untyped-call]
        ended = time.perf_counter()
        if abs(mine - theirs.item()) > 0.02 * mine:  # B is zero: both are the base's loss
            raise SystemExit(f"the losses differ: {mine} and {theirs.item()}")
        for parameters in (lora_parameters(ours).values(), peer.parameters()):
            for parameter in parameters:
                parameter.grad = None
        if round_ >= 3:
            times["luthier"].append(middle - began)
            times["peer"].append(ended - middle)
            tokens += sum(batch.lengths)
    medians = {who: statistics.median(seconds) for who, seconds in times.items()}
    return {
        "dtype": name,
        "rows": BATCH,
        "tokens_per_step": round(tokens / rounds),
        "milliseconds": {who: round(1000 * seconds, 1) for who, seconds in medians.items()},
        "tokens_per_second": {who: round(tokens / rounds / seconds) for who, seconds in medians.items()},
        "ratio": round(medians["peer"] / medians["luthier"], 2),
    }


if __name__ == "__main__":
    main()
