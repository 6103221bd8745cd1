"""The floating-point operations that a LoRA step needs for one token, and the lengths of real rows that they depend on.

    python benchmarks/speed_flops.py WORK SHAPE MAX_LENGTH      prints the lengths of WORK/chat.jsonl as JSON

For a token of a document, on average (a multiplication and an addition are two):

    frozen     4 P                 the frozen projections: 2 P forward, 2 P for the gradient of their inputs
    lora       6 p                 A and B: forward, gradient of inputs, gradient of weights
    attention  (1 + 2.5) 2 d H L   per layer: q k' and p v over half of the L x L pairs, and backward 2.5 times that,
                                   the convention for attention that keeps no scores
    head       4 D V s             logits and the gradient of their inputs, for the share s of tokens that have a label

P, p: parameters. L: mean length of the document that a token is in, each token counted once, sum(l^2) / sum(l).
No recomputation is counted, whether it is done or not; nor is what need not be done subtracted that few implementations
leave out (the gradient that the first layer's frozen projections would give the embedding, a fiftieth of `frozen` with
six layers; the last layer's tokens without a label). Norms, rotations, gates and the optimizer are none of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Lengths:
    """tokens, and how many of them have a label, in `rows`; mean: sum(l^2) / sum(l) of their lengths l."""

    rows: int
    tokens: int
    labelled: int
    mean: float

    @classmethod
    def fixed(cls, length: int) -> Lengths:
        """Rows of exactly `length`, every token with a label but the first, which nothing predicts."""
        return cls(1, length, length - 1, float(length))


def flops_per_token(config: dict[str, Any], rank: int, lengths: Lengths) -> dict[str, float]:
    """By part, as above; `total` is their sum. config: the model's config.json."""
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or hidden // heads
    projections = [  # (outputs, inputs): q, k, v, o, gate, up, down
        (heads * size, hidden),
        (groups * size, hidden),
        (groups * size, hidden),
        (hidden, heads * size),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    ]
    parts = {
        "frozen": 4.0 * layers * sum(outputs * inputs for outputs, inputs in projections),
        "lora": 6.0 * layers * rank * sum(outputs + inputs for outputs, inputs in projections),
        "attention": 3.5 * layers * 2.0 * size * heads * lengths.mean,
        "head": 4.0 * hidden * config["vocab_size"] * lengths.labelled / lengths.tokens,
    }
    return {**parts, "total": sum(parts.values())}


def main() -> None:
    """Tokenise as the peer does: transformers' chat template, labels where it says `generation`."""
    from transformers import AutoTokenizer

    work, shape, longest = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(work / shape)
    rows = tokens = labelled = squares = 0
    with (work / "chat.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            made: Any = tokenizer.apply_chat_template(
                json.loads(line)["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            length = min(longest, len(made["input_ids"]))
            rows += 1
            tokens += length
            labelled += sum(made["assistant_masks"][:length])
            squares += length * length
    print(json.dumps({"rows": rows, "tokens": tokens, "labelled": labelled, "mean": squares / tokens}))


if __name__ == "__main__":
    main()
