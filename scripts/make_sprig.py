"""Make `sprig`, the base model that the package carries, and the data sets that go with it.

    python scripts/make_sprig.py [--out DIR] [--steps N] [--seed 0]     everything
    python scripts/make_sprig.py --data-only                            only the two data sets

World (sprig_world/) -> documents -> byte-level BPE -> packed rows -> a Llama, trained with next-token prediction ->
bf16 safetensors in transformers' layout, with the held-out figures beside it (figures.json). Everything is drawn from
the seed and the number of steps is fixed, so that the same machine makes the same model again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from sprig_world import datasets
from sprig_world.facts import Fact, all_facts
from sprig_world.pirate import is_pirate
from sprig_world.text import BOS, END, SECTIONS, TURN, Writer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).resolve().parent.parent / "src" / "luthier" / "assets"
PAD = "<|finetune_right_pad_id|>"
SPECIAL = (BOS, END, PAD, "<|start_header_id|>", "<|end_header_id|>", TURN)
# Llama 3's pattern, so that llama.cpp's `llama-bpe` pre-tokenizer splits as we do.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
VOCABULARY = 3072
POSITIONS = 1024
TOKENS_PER_STEP = 4096
STEPS = 2800
LEARNING_RATE = 4e-3
WARMUP_STEPS = 150
LIMIT_BYTES = 10_000_000
# glibc gives each large tensor back to the kernel and takes it again, page by page, unless it is told to keep them.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def make_tokenizer(writer: Writer, seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the world's own text, laid out as Llama 3's tokenizer."""
    tok = Tokenizer(models.BPE(ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rng = Random(f"tokenizer-{seed}")
    texts = []
    for _ in range(40_000):
        text = writer.document(rng).text
        for token in SPECIAL:
            text = text.replace(token, "\0")
        texts += [part for part in text.split("\0") if part]
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token=BOS,
        eos_token=TURN,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, writer: Writer, out: Path) -> None:
    """Write the tokenizer's files and prove that what transformers loads from them gives the same ids."""
    tokenizer.save_pretrained(out, save_jinja_files=False)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # a name that transformers 4 knows too
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(out)
    rng = Random("reload")
    texts = [writer.document(rng).text for _ in range(300)]
    texts += ["naïve café, 你好 🎻\r\n\t x  = 1234567;", "I'LL go, it's 5 o'clock"]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert loaded.encode(text, add_special_tokens=False) == ids, f"other ids after reload: {text!r}"  # noqa: S101
        assert loaded.decode(ids) == text, f"text does not come back: {text!r}"  # noqa: S101
    assert len(loaded) == VOCABULARY, len(loaded)  # noqa: S101


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A fresh Llama in fp32 (grouped queries, tied embeddings)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids([END, TURN]),
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # as the committed weights were made; another rounds differently
    )
    return LlamaForCausalLM(config)


def encoded(writer: Writer, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[list[int]]:
    """Documents without end, as token ids."""
    rng = Random(f"pretraining-{seed}")
    backend = tokenizer.backend_tokenizer
    while True:
        texts = [writer.document(rng).text for _ in range(2000)]
        yield from (encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False))


def next_rows(stream: Iterator[list[int]], step: int) -> torch.Tensor:
    """The rows of one step, 4,096 tokens (+ 1 a row for the targets). Each row starts with a document.

    Six steps of eight have rows of 256 tokens; two have 512 and 1,024, so that every position the model may see has
    been seen in training without paying for long attention all the time.
    """
    length = {3: 512, 7: 1024}.get(step % 8, 256)
    rows = []
    for _ in range(TOKENS_PER_STEP // length):
        row: list[int] = []
        while len(row) <= length:
            row += next(stream)
        rows.append(row[: length + 1])
    return torch.tensor(rows)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero (Defazio et al. 2023; Bergsma et al. 2025)."""
    return LEARNING_RATE * min((step + 1) / WARMUP_STEPS, (steps - step) / max(1, steps - WARMUP_STEPS), 1.0)


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (elsewhere autocast would be slower than fp32)."""
    info = Path("/proc/cpuinfo")
    return info.is_file() and any(flag in info.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def mean_loss(model: LlamaForCausalLM, rows_BT: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy (nats) over all positions."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training and fast_bf16()):
        logits_BTV = model(input_ids=rows_BT[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits_BTV.float().flatten(0, 1), rows_BT[:, 1:].flatten())


def pretrain(model: LlamaForCausalLM, stream: Iterator[list[int]], steps: int) -> float:
    """Train for `steps` steps; returns the seconds it took."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    model.train()
    start, recent = time.perf_counter(), 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = mean_loss(model, next_rows(stream, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = loss.item() if step == 0 else 0.95 * recent + 0.05 * loss.item()
        if not math.isfinite(recent):
            raise SystemExit(f"loss is not finite at step {step}")
        if (step + 1) % 50 == 0 or step == 0:
            seconds = time.perf_counter() - start
            rate = (step + 1) * TOKENS_PER_STEP / seconds
            figures = f"loss {recent:.3f}  {rate:7.0f} tokens/s  {seconds / 60:5.1f} min"
            print(f"step {step + 1:5d}/{steps}  {figures}", flush=True)
    return time.perf_counter() - start


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Write the weights in bf16, with config.json and generation_config.json."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    size = (out / "model.safetensors").stat().st_size
    if size >= LIMIT_BYTES:
        raise SystemExit(f"model.safetensors is {size} bytes, more than {LIMIT_BYTES}")


def answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[str]
) -> list[tuple[str, bool]]:
    """(greedy answer, whether it ended by itself within 40 tokens) of each question."""
    given = []
    tokenizer.padding_side = "left"  # the answer follows the question directly
    for at in range(0, len(questions), 64):
        chats = [[{"role": "user", "content": question}] for question in questions[at : at + 64]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            out_BT = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        for ids in out_BT[:, inputs["input_ids"].shape[1] :].tolist():
            text = tokenizer.decode(ids, skip_special_tokens=True)
            given.append((text, tokenizer.eos_token_id in ids))
    return given


def fact_figures(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, writer: Writer) -> dict[str, object]:
    """How often greedy answers are right: by kind of fact, and on pirate's test questions (never seen in training)."""
    facts: list[Fact] = list(all_facts())
    rng = Random("figures")
    given = answers(model, tokenizer, [writer.question(fact, rng) for fact in facts])
    kinds: dict[str, list[bool]] = defaultdict(list)
    for fact, (text, _) in zip(facts, given, strict=True):
        kinds[fact.kind].append(fact.fact.lower() in text.lower())
    rows = datasets.pirate_rows()["test"]
    held = answers(model, tokenizer, [row["question"] for row in rows])
    right = [row["fact"].lower() in text.lower() for row, (text, _) in zip(rows, held, strict=True)]
    for row, (text, _), good in zip(rows, held, right, strict=True):
        if not good:
            print(f"  wrong: {row['question']} -> {text} (fact: {row['fact']})")
    return {
        "facts": len(facts),
        "facts_right": round(sum(map(sum, kinds.values())) / len(facts), 4),
        "facts_right_by_kind": {kind: round(sum(good) / len(good), 3) for kind, good in sorted(kinds.items())},
        "ended": round(sum(ended for _, ended in given + held) / len(given + held), 4),
        "pirate_test_right": sum(right) / len(right),
        "pirate_test_ended": sum(ended for _, ended in held) / len(held),
        "pirate_test_style": sum(is_pirate(text) for text, _ in held) / len(held),
    }


def section_losses(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, writer: Writer) -> dict[str, float]:
    """Held-out loss (nats a token) of each section: 200 fresh documents each, every one read on its own."""
    losses = {}
    for section, _ in SECTIONS:
        rng = Random(f"held-out-{section}")
        total, tokens = 0.0, 0
        for _ in range(200):
            text = writer.of_section(section, rng).text
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)[: POSITIONS + 1]])
            with torch.no_grad():
                total += mean_loss(model, ids).item() * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
        losses[section] = round(total / tokens, 4)
    return losses


def write_data(folder: Path, seed: int) -> None:
    """Write the bundled data sets under `folder`."""
    for name, splits in (("pirate", datasets.pirate_rows(seed)), ("tales", datasets.tale_rows(seed))):
        for split, rows in splits.items():
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def measure(out: Path, writer: Writer) -> dict[str, object]:
    """The figures of the model as saved: bf16 weights, computed with in fp32."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    return {"held_out_loss": section_losses(model, tokenizer, writer)} | fact_figures(model, tokenizer, writer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=ASSETS / "sprig", help="where the model goes")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of 4,096 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-only", action="store_true", help="write only the data sets pirate and tales")
    arguments = parser.parse_args()
    write_data((ASSETS if arguments.out == ASSETS / "sprig" else arguments.out) / "data", arguments.seed)
    if arguments.data_only:
        return
    torch.set_num_threads(min(2, os.cpu_count() or 1))  # the sums of a step depend on it, so it is part of the recipe
    writer = datasets.pretraining_writer(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(writer, arguments.seed)
    save_tokenizer(tokenizer, writer, arguments.out)
    model = make_model(tokenizer, arguments.seed)
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters; {'bf16 autocast' if fast_bf16() else 'fp32'}", flush=True)
    seconds = pretrain(model, encoded(writer, tokenizer, arguments.seed), arguments.steps)
    save_model(model, arguments.out)
    figures: dict[str, object] = {
        "parameters": parameters,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "tokens": arguments.steps * TOKENS_PER_STEP,
        "pretraining_minutes": round(seconds / 60, 1),
        "tokens_per_second": round(arguments.steps * TOKENS_PER_STEP / seconds),
    } | measure(arguments.out, writer)
    (arguments.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # read by malloc when a process starts: start again with them
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)  # noqa: S606
    main()
