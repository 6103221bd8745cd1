"""GSM8K's rows as Llama 3's tokens, packed, for gpu.py; kept in one small file for machines without shared/.

    python benchmarks/gpu_rows.py FILE.npz [--shared ../shared]      make the file (needs the library tokenizers)

A row is a chat of two messages in Llama 3's layout; the answer and its end are trained. Packs are filled best-fit with
whole rows, as the data stage does it, and their order is shuffled with seed 0.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from luthier.data.batches import Batch, pack
from luthier.data.conversation import Example
from luthier.data.packing import best_fit

SHARED = Path(__file__).resolve().parents[2] / "shared"
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """All rows one after another: their ids, the tokens of each, and how many of these stand before the answer."""

    ids: NDArray[np.int32]
    lengths: NDArray[np.int32]
    prompts: NDArray[np.int32]

    def examples(self) -> list[Example]:
        found, start = [], 0
        for row, (length, prompt) in enumerate(zip(self.lengths.tolist(), self.prompts.tolist(), strict=True)):
            ids = self.ids[start : start + length]
            labels = ids.copy()
            labels[:prompt] = IGNORED
            found.append(Example(ids=ids, labels=labels, row=row))
            start += length
        return found

    def batches(self, rows: int, capacity: int) -> list[Batch]:
        """Micro-batches of `rows` packs of at most `capacity` tokens, each row seen once."""
        examples = self.examples()
        descending = np.argsort(-self.lengths, kind="stable")
        shape = best_fit(self.lengths, capacity)
        packs = [shape.places[shape.starts[p] : shape.starts[p + 1]] for p in range(len(shape))]
        random.Random(0).shuffle(packs)
        groups = [np.concatenate(packs[at : at + rows]) for at in range(0, len(packs) - rows + 1, rows)]
        return [pack([examples[int(row)] for row in descending[places]]) for places in groups]


def load_rows(file: Path, shared: Path) -> Rows:
    """From `file` where it is there, else tokenised."""
    if file.is_file():
        with np.load(file) as held:
            return Rows(held["ids"], held["lengths"], held["prompts"])
    return tokenised(shared)


def tokenised(shared: Path) -> Rows:
    """As shared/bench/make_workload.py lays them out, its order too."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / "tokenizers" / "llama-3" / "tokenizer.json"))
    with (shared / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    random.Random(0).shuffle(found)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    prompts = ["<|begin_of_text|>" + head.format("user") + r["question"] + "<|eot_id|>" for r in found]
    prompts = [prompt + head.format("assistant") for prompt in prompts]
    before = [one.ids for one in tokenizer.encode_batch(prompts, add_special_tokens=False)]
    answers = [r["answer"] + "<|eot_id|>" for r in found]
    after = [one.ids for one in tokenizer.encode_batch(answers, add_special_tokens=False)]
    rows = [[*a, *b] for a, b in zip(before, after, strict=True)]
    return Rows(
        np.concatenate([np.array(row, np.int32) for row in rows]),
        np.array([len(row) for row in rows], np.int32),
        np.array([len(row) for row in before], np.int32),
    )


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("file", type=Path)
    args.add_argument("--shared", type=Path, default=SHARED)
    options = args.parse_args()
    rows = tokenised(options.shared)
    np.savez_compressed(options.file, ids=rows.ids, lengths=rows.lengths, prompts=rows.prompts)
    print(f"{len(rows.lengths):,} rows, {len(rows.ids):,} tokens, {options.file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
