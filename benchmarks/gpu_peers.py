"""One peer of gpu.py, in a process of its own: TRL + PEFT (+ bitsandbytes) or Unsloth on the same shape. Prints JSON.

    python benchmarks/gpu_peers.py make WORK --shared ../shared
    python benchmarks/gpu_peers.py trl|unsloth WORK --quantize none|nf4 --shared ../shared [--rows ROWS.npz]
        [--checkpointing] [--steps 20]

`make` writes an 8b-shaped random model, Llama 3's tokenizer and GSM8K's chats to WORK, as shared/bench/make_workload.py
does, but with the weights made on the card. TRL is run by shared/bench/peer_trl.py, unchanged: packing, 2 x 4,096,
rank 16, all projections, dropout 0, flash_attention_2 where the library flash_attn is installed, else sdpa. Unsloth
gets the tokens of ROWS with the mask of the answers and the same settings through the same trainer.
"""

from __future__ import annotations

import argparse
import json
import runpy
import statistics
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHAPE, RANK, LENGTH, PACKS, FIRST = "8b", 16, 4096, 2, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    workload = runpy.run_path(str(options.shared / "bench" / "make_workload.py"), run_name="workload")
    folder = options.work / SHAPE
    folder.mkdir(parents=True, exist_ok=True)
    with (options.work / "chat.jsonl").open("w", encoding="utf-8") as out:
        for row in workload["rows"]():
            messages = [("user", row["question"]), ("assistant", row["answer"])]
            out.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in messages]}) + "\n")
    tokenizer = workload["big_tokenizer"]()
    tokenizer.save_pretrained(folder)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    shape = workload["SHAPES"][SHAPE]
    config = LlamaConfig(**shape, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=500000.0, **ids)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def trl(options: argparse.Namespace) -> dict[str, Any]:
    attention = "flash_attention_2" if find_spec("flash_attn") else "sdpa"
    words = [str(options.work), "--shape", SHAPE, "--quantize", options.quantize, "--batch", str(PACKS)]
    words += ["--accumulate", "1", "--steps", str(options.steps), "--max-length", str(LENGTH), "--rank", str(RANK)]
    words += ["--packing", "--attention", attention, *(["--checkpointing"] if options.checkpointing else [])]
    sys.argv = [str(options.shared / "bench" / "peer_trl.py"), *words]
    found = runpy.run_path(sys.argv[0], run_name="__main__")
    clock = found["clock"]
    return {"attention": attention, **measured(found["real"], clock.seconds, found["trainer"].state.log_history)}


def unsloth_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model with its adapter, and the tokenizer."""
    import torch
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(options.work / SHAPE),
        max_seq_length=LENGTH,
        dtype=torch.bfloat16,
        load_in_4bit=options.quantize == "nf4",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if options.checkpointing else False,
        random_state=0,
    )
    return model, tokenizer


def unsloth(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = unsloth_model(options)  # first: it patches what is imported here
    import time

    import torch
    from datasets import Dataset
    from gpu_rows import load_rows
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            torch.cuda.synchronize()
            self.began = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    examples = load_rows(options.rows, options.shared).examples()
    data = Dataset.from_list(
        [{"input_ids": one.ids.tolist(), "completion_mask": (one.labels >= 0).astype(int).tolist()} for one in examples]
    )
    config = SFTConfig(
        output_dir=str(options.work / "unsloth_out"),
        per_device_train_batch_size=PACKS,
        gradient_accumulation_steps=1,
        max_steps=options.steps,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=LENGTH,
        packing=True,
        completion_only_loss=True,
        bf16=True,
        disable_tqdm=True,
        optim="adamw_torch",
    )
    clock = Clock()
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    collate, counted = trainer.data_collator, []

    def counting(batch: Any) -> Any:
        made = collate(batch)
        mask = made.get("attention_mask")
        counted.append(int(mask.sum()) if mask is not None else made["input_ids"].numel())
        return made

    trainer.data_collator = counting
    trainer.train()
    return measured(counted[: len(clock.seconds)], clock.seconds, trainer.state.log_history)


def measured(tokens: Iterable[int], seconds: list[float], history: list[dict[str, Any]]) -> dict[str, Any]:
    """As gpu_steps.py has it: medians after the first steps, the gradient's norm above zero, a loss that falls."""
    import torch

    losses = [one["loss"] for one in history if "loss" in one]
    norms = [float(one["grad_norm"]) for one in history if "grad_norm" in one]
    if not norms or not min(norms) > 0:
        raise SystemExit(f"the gradient's norms are {norms}: nothing was measured")
    if not statistics.mean(losses[-FIRST:]) < statistics.mean(losses[:FIRST]):
        raise SystemExit(f"the loss does not fall: {losses}")
    rates = [count / taken for count, taken in zip(tokens, seconds, strict=True)][FIRST:]
    return {
        "steps": len(seconds),
        "tokens_per_second": statistics.median(rates),
        "seconds_per_step": statistics.median(seconds[FIRST:]),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": losses,
        "least_grad_norm": min(norms),
    }


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("what", choices=("make", "trl", "unsloth"))
    args.add_argument("work", type=Path)
    args.add_argument("--shared", type=Path, required=True)
    args.add_argument("--rows", type=Path, default=Path("rows.npz"))
    args.add_argument("--quantize", choices=("none", "nf4"), default="none")
    args.add_argument("--checkpointing", action="store_true")
    args.add_argument("--steps", type=int, default=20)
    options = args.parse_args()
    run = {"make": make, "trl": trl, "unsloth": unsloth}[options.what]
    found = run(options)
    print(json.dumps({"quantize": options.quantize, "checkpointing": options.checkpointing, **found}))


if __name__ == "__main__":
    main()
