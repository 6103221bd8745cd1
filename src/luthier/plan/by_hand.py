"""activations.py for the layer whose gradients are written by hand: what it keeps, and has for a moment.

Read off model/by_hand.py, model/joint.py and the kernels. Kept are the layer's input, q, k and v as attention takes
them, its output and (but for torch's kernels) a fp32 number for each token and head, the residual stream between the
halves, gate and up, and the adapters' low-rank products; where q and k are normed, both before it; with dropout a mask
of a byte for each input of an adapter. A recomputed layer keeps its input, and the low-rank product of its last
projection.

The native kernels and those for CUDA compute in place and in registers; torch's (`batched`) go through memory, so that
more exists for a moment.

Legend: T tokens, D hidden size, Q query width (heads x head size), K key width, F inner size, R the sum of ranks, e
bytes of one number in the compute dtype, V vocabulary.
"""

from __future__ import annotations

from luthier.model.config import projection_shapes
from luthier.plan.sizes import CHUNK_LOGITS, CUDA_CHUNK_LOGITS, SCORES, TILE, element_bytes
from luthier.plan.work import Work

__all__ = ["SAME_INPUT", "backward_bytes", "kept_bytes", "loss_bytes", "recomputed_bytes", "score_bytes"]

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections that read the same input."""

_WIDE = 4  # fp32


def kept_bytes(work: Work) -> int:
    """What one layer keeps that is not recomputed. (The last layer keeps less: its second half has labelled tokens
    alone. All may have labels.)"""
    config, e, shapes = work.config, element_bytes(work.precision), projection_shapes(work.config)
    queries, keys, inner = shapes["q_proj"][0], shapes["k_proj"][0], shapes["gate_proj"][0]
    turned = (queries + keys) * (2 if config.qk_norm else 1)
    token = e * (2 * config.hidden_size + turned + keys + queries + 2 * inner + len(work.targets) * work.rank)
    masks = sum(shapes[name][1] for name in work.targets) if work.dropout else 0
    lse = 0 if work.kernels == "torch" else _WIDE * config.heads
    return work.tokens * (token + lse + masks)


def recomputed_bytes(work: Work) -> int:
    """What one layer keeps that is recomputed."""
    low = work.rank if "down_proj" in work.targets else 0
    return work.tokens * (work.config.hidden_size + low) * element_bytes(work.precision)


def backward_bytes(work: Work) -> int:
    """What exists for a moment in the backward pass of a layer, the incoming gradient counted: at its fullest in the
    MLP, in attention, or when the norm before attention is done."""
    config, e, shapes = work.config, element_bytes(work.precision), projection_shapes(work.config)
    queries, keys, inner = shapes["q_proj"][0], shapes["k_proj"][0], shapes["gate_proj"][0]
    dropped, slow = bool(work.dropout and work.targets), work.kernels == "torch"
    # The product's gradient, in whose place the product comes; with dropout also the adapter's part and the mask in the
    # compute dtype; torch's kernels hold silu(gate) and the product of some rows besides.
    mlp = work.tokens * e * (config.hidden_size + inner * (3 if dropped else 1))
    mlp += 2 * e * _tile(work.tokens, inner) if slow and not dropped else 0
    # Gradients of what comes out of the layer, of its middle, of attention's output, of q, k and v; the last two of a
    # document in several blocks in fp32.
    several = slow and _block_rows(work) < work.longest
    attention = e * (2 * config.hidden_size + 2 * queries) + keys * (2 * _WIDE if several else 2 * e)
    # Gradients of output and middle, of q, k and v, of the norm; the norm once more; what is given back.
    more = max(3 * e if dropped else 0, 3 * _WIDE if slow else 0)  # with dropout each projection's part; in fp32
    normed = e * (5 * config.hidden_size + queries + 2 * keys) + more * config.hidden_size
    return max(mlp, work.tokens * normed, work.tokens * attention + score_bytes(work))


def score_bytes(work: Work) -> int:
    """One block of queries with torch's kernels (kernels/batched.py): of each score, itself and its probability in
    fp32, and that in 16 bits (in fp32 the probability, its gradient and the score's); and the mask, which the heads
    share."""
    if work.kernels != "torch":
        return 0
    e = element_bytes(work.precision)
    score = 2 * _WIDE + e if e < _WIDE else 3 * _WIDE
    return _block_rows(work) * work.longest * (score * work.config.heads + _WIDE)


def _block_rows(work: Work) -> int:
    """Queries of one block of the longest document."""
    return min(work.longest, max(16, SCORES // (work.config.heads * work.longest)))


def _tile(rows: int, width: int) -> int:
    """Numbers of those rows that torch's kernels go over at once."""
    return min(rows, max(1, TILE // width)) * width


def loss_bytes(work: Work, *, tokens: int, trains: bool) -> int:
    """The head and the loss: rows before and after the final norm, their gradient, and a chunk of logits, in
    whose place the gradient comes."""
    e, vocabulary = element_bytes(work.precision), work.config.vocab_size
    most = CUDA_CHUNK_LOGITS if work.kernels == "cuda" else CHUNK_LOGITS
    logits = min(tokens, max(1, most // vocabulary)) * vocabulary
    if work.kernels == "torch":  # of some rows at a time also the probabilities in fp32, and in 16 bits the logits
        tile = _tile(logits // vocabulary, vocabulary) * (2 * _WIDE if e < _WIDE else _WIDE)
    else:
        tile = 0
    return logits * e + tile + tokens * work.config.hidden_size * e * (4 if trains else 2)
