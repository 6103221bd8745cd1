"""From JSONL to packs: ours against the bare tokenizer and against TRL + datasets, and what it costs at scale.

    python benchmarks/data.py ROWS.jsonl TOKENIZER [--only rate,fill,check,start,memory,growth] [--scratch DIR]

ROWS is GSM8K's training split (question, answer), TOKENIZER a folder with Llama 3's vocabulary and chat template. Each
part runs in a process of its own and prints a line; all of them are written to results/data.json.

    rate    tokens a second from the file to a packed store, as a share of `encode_batch` on the rendered texts, and of
            TRL's preparation (load_dataset, chat template with its assistant mask, tokenise, best-fit packing)
    fill    share of positions that are filled, packed at 2,048
    check   validation alone (read, parse, every rule of the format), MB a second
    start   a second start: the store is there
    memory  1 GB of JSONL: peak resident set
    growth  10 thousand to 1 million rows: time a row
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROUNDS = 5
PACK = 2048
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def varied(rows: list[dict[str, str]], seed: int) -> Iterator[bytes]:
    """The rows again and again, with other numbers in them each time: no two are the same."""
    draw = random.Random(seed)
    number = 0
    while True:
        for row in rows:
            number += 1
            changed = {key: re.sub(r"\d", lambda _: str(draw.randrange(10)), text) for key, text in row.items()}
            changed["question"] += f" ({number})"
            yield json.dumps(changed, ensure_ascii=False).encode() + b"\n"


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def peak_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)


def prepared(path: Path, tokenizer: Path) -> object:
    from luthier.data.prepare import prepare
    from luthier.data.tokenizer import load_tokenizer
    from luthier.recipe.schema import Recipe

    return prepare(
        Recipe(model="unused", data=[str(path)], split={"train": 1.0, "eval": 0.0}), load_tokenizer(tokenizer)
    )


def rate(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    """Interleaved: ours into an empty cache, the bare tokenizer on the same texts, the peer into an empty cache."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    from luthier.data.conversation import Turn
    from luthier.data.packing import best_fit
    from luthier.data.prepare import prepare
    from luthier.data.render import make_template
    from luthier.data.tokenizer import load_tokenizer
    from luthier.recipe.schema import Recipe

    loaded = load_tokenizer(tokenizer)
    template = make_template("model", loaded)
    texts = [template.render((Turn("user", r["question"]), Turn("assistant", r["answer"]))) for r in read(path)]
    bare = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    recipe = Recipe(model="unused", data=[str(path)], split={"train": 1.0, "eval": 0.0})
    seconds: dict[str, list[float]] = {"luthier": [], "encode_batch": []}
    tokens = 0
    for round_ in range(ROUNDS + 1):  # the first is not counted
        os.environ["LUTHIER_CACHE"] = str(scratch / f"cache{round_}")
        began = time.perf_counter()
        dataset = prepare(recipe, loaded)
        best_fit(dataset.train.lengths, PACK)
        middle = time.perf_counter()
        encoded = bare.encode_batch(texts, add_special_tokens=False)
        ended = time.perf_counter()
        tokens = sum(len(one.ids) for one in encoded)
        if int(dataset.train.lengths.sum()) != tokens:
            raise SystemExit("the tokens are not those of the tokenizer alone")
        if round_:
            seconds["luthier"].append(middle - began)
            seconds["encode_batch"].append(ended - middle)
    seconds["trl"] = [trl_seconds(path, tokenizer, scratch / f"trl{round_}") for round_ in range(3)]
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    return {
        "tokens": tokens,
        "seconds": {who: round(value, 3) for who, value in medians.items()},
        "tokens_per_second": {who: round(tokens / value) for who, value in medians.items()},
        "of_encode_batch": round(medians["encode_batch"] / medians["luthier"], 3),
        "times_trl": round(medians["trl"] / medians["luthier"], 2),
    }


def trl_seconds(path: Path, tokenizer: Path, cache: Path) -> float:
    """TRL in a process of its own: load_dataset and SFTTrainer's preparation, without its imports and its model."""
    command = [sys.executable, __file__, str(path), str(tokenizer), "--part", "trl", "--scratch", str(cache)]
    environment = {**os.environ, "HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def trl(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    scratch.mkdir(parents=True, exist_ok=True)
    chats = scratch / "chat.jsonl"
    with chats.open("w", encoding="utf-8") as out:
        for row in read(path):
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            out.write(json.dumps({"messages": turns}) + "\n")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.chat_template = TEMPLATE
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(loaded), **shape)).to(torch.bfloat16)
    config = SFTConfig(
        output_dir=str(scratch / "out"), max_length=PACK, packing=True, assistant_only_loss=True, report_to="none",
        use_cpu=True, bf16=False, dataset_num_proc=psutil.cpu_count(),
    )  # fmt: skip
    began = time.perf_counter()
    data = load_dataset("json", data_files=str(chats), split="train")
    trainer = SFTTrainer(model=model, args=config, train_dataset=data, processing_class=loaded)
    seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 3), "packs": len(trainer.train_dataset)}


def fill(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    os.environ["LUTHIER_CACHE"] = str(scratch)
    from luthier.data.packing import best_fit

    lengths = prepared(path, tokenizer).train.lengths  # type: ignore[attr-defined]
    packs = len(best_fit(lengths, PACK))
    return {"capacity": PACK, "rows": len(lengths), "packs": packs, "filled": round(lengths.sum() / packs / PACK, 5)}


def check(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    from luthier.data.problems import BadRow
    from luthier.data.sources import open_sources
    from luthier.recipe.schema import DataSource

    rows = read(path)
    chats = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    results: dict[str, object] = {}
    for name, records in (("question-answer", rows), ("messages", chats)):
        file = scratch / f"{name}.jsonl"
        block = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        with file.open("wb") as out:
            for _ in range(200 * 2**20 // len(block)):
                out.write(block)
        rates: list[float] = []
        for _ in range(ROUNDS):
            (source,) = open_sources([DataSource(path=str(file))])
            began = time.perf_counter()
            bad = sum(isinstance(row, BadRow) for row in source.rows())
            rates.append(file.stat().st_size / 1e6 / (time.perf_counter() - began))
            if bad:
                raise SystemExit("rows were refused")
        results[name] = {"mb_per_second": round(statistics.median(rates), 1)}
        file.unlink()
    return results


def start(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    os.environ["LUTHIER_CACHE"] = str(scratch)
    from luthier.data.prepare import prepare
    from luthier.data.tokenizer import load_tokenizer
    from luthier.recipe.schema import Recipe

    big = scratch / "big.jsonl"
    write_rows(big, path, rows=100_000)
    results: dict[str, object] = {}
    loaded = load_tokenizer(tokenizer)
    for name, file in (("gsm8k", path), ("100,000 rows", big)):
        recipe = Recipe(model="unused", data=[str(file)])
        prepare(recipe, loaded)
        time.sleep(2.5)  # a file that has just been written is read again, to be sure
        prepare(recipe, loaded)
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            prepare(recipe, loaded)
            times.append(time.perf_counter() - began)
        results[name] = {"seconds": round(statistics.median(times), 3)}
    return results


def write_rows(out: Path, path: Path, rows: int = 0, size: int = 0) -> int:
    """Write that many rows, or as many as make `size` bytes; gives how many."""
    written = count = 0
    with out.open("wb") as file:
        for line in varied(read(path), seed=0):
            if (rows and count == rows) or (size and written >= size):
                return count
            written += file.write(line)
            count += 1
    return count


def memory(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    os.environ["LUTHIER_CACHE"] = str(scratch)
    big = scratch / "big.jsonl"
    count = subprocess_rows(big, path, size=10**9)
    before = peak_gib()
    began = time.perf_counter()
    dataset = prepared(big, tokenizer)
    seconds = time.perf_counter() - began
    report = dataset.report  # type: ignore[attr-defined]
    return {
        "bytes": big.stat().st_size,
        "rows": count,
        "tokens": sum(side.tokens for side in report.splits.values()),
        "seconds": round(seconds, 1),
        "peak_rss_gib": peak_gib(),
        "rss_before_gib": before,
    }


def subprocess_rows(out: Path, path: Path, **size: int) -> int:
    """Write rows in another process, so that its memory is not counted here."""
    (limit,) = [f"{name}={value}" for name, value in size.items()]
    call = f"write_rows(Path({str(out)!r}), Path({str(path)!r}), {limit})"
    code = f"from benchmarks.data import write_rows, Path; print({call})"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout)


def growth(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    """Time a row for more and more short rows (a quarter of GSM8K's), each in a process of its own."""
    short = scratch / "short.jsonl"
    with short.open("w", encoding="utf-8") as out:
        for row in read(path):
            out.write(json.dumps({"question": row["question"][:60], "answer": row["answer"][-40:]}) + "\n")
    seconds: dict[str, float] = {}
    for rows in (10_000, 100_000, 1_000_000):
        times = []
        for round_ in range(3 if rows < 1_000_000 else 1):
            file = scratch / f"{rows}.jsonl"
            write_rows(file, short, rows=rows)
            command = [sys.executable, __file__, str(file), str(tokenizer), "--part", "once"]
            cache = {**os.environ, "LUTHIER_CACHE": str(scratch / f"cache{rows}.{round_}")}
            done = subprocess.run(command, env=cache, capture_output=True, text=True, check=True)
            times.append(float(json.loads(done.stdout.splitlines()[-1])["seconds"]))
            shutil.rmtree(cache["LUTHIER_CACHE"])
        seconds[str(rows)] = statistics.median(times)
    each = {rows: round(value / int(rows) * 1e6, 2) for rows, value in seconds.items()}
    return {"seconds": seconds, "microseconds_a_row": each, "1M_to_10k": round(each["1000000"] / each["10000"], 3)}


def once(path: Path, tokenizer: Path, scratch: Path) -> dict[str, object]:
    from luthier.data.prepare import prepare
    from luthier.data.tokenizer import load_tokenizer
    from luthier.recipe.schema import Recipe

    loaded = load_tokenizer(tokenizer)
    began = time.perf_counter()
    prepare(Recipe(model="unused", data=[str(path)], split={"train": 1.0, "eval": 0.0}), loaded)
    return {"seconds": round(time.perf_counter() - began, 3), "peak_rss_gib": peak_gib()}


PARTS = {"rate": rate, "fill": fill, "check": check, "start": start, "memory": memory, "growth": growth}
INNER = {"trl": trl, "once": once}


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("rows", type=Path)
    args.add_argument("tokenizer", type=Path)
    args.add_argument("--only", default=",".join(PARTS))
    args.add_argument("--part", choices=[*PARTS, *INNER], help="run one part here, and print its JSON")
    args.add_argument("--scratch", type=Path)
    options = args.parse_args()
    if options.part:
        scratch = options.scratch or Path(tempfile.gettempdir())
        print(json.dumps({**PARTS, **INNER}[options.part](options.rows, options.tokenizer, scratch)))
        return
    out = Path(__file__).parent / "results" / "data.json"
    document = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"results": {}}
    from luthier.hardware.probe import this_device

    device = this_device()
    document["machine"] = {"cpu": device.name, "cores": device.cores, "memory_gib": device.memory_gib}
    document["python"] = platform.python_version()
    for name in options.only.split(","):
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            command = [sys.executable, __file__, str(options.rows), str(options.tokenizer), "--part", name]
            done = subprocess.run([*command, "--scratch", scratch], stdout=subprocess.PIPE, text=True, check=True)
        document["results"][name] = json.loads(done.stdout.splitlines()[-1])
        print(name, json.dumps(document["results"][name]), flush=True)
    out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
