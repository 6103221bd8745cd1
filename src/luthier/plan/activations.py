"""Bytes that one micro-batch holds while it is trained: what each layer keeps for the backward pass, and what exists
for a moment only.

Of layers under autograd, with the reference's kernels; by_hand.py has the others'. Read off the code that allocates it:
decoder.py, lora.py, kernels/. A frozen projection keeps nothing (its gradient
needs only its weight); an adapter keeps its input and the low-rank product; a norm keeps its input in fp32; attention
keeps q, k, v, its output and one fp32 number a token and head; SwiGLU keeps gate, silu(gate), up and their product.

Legend: T tokens, D hidden size, Q query width (heads x head size), K key width, F inner size, r rank, e bytes of one
number in the compute dtype.
"""

from __future__ import annotations

from luthier.model.config import projection_shapes
from luthier.plan import by_hand
from luthier.plan.sizes import CHUNK_LOGITS, adapter_parameters, element_bytes
from luthier.plan.work import Work

__all__ = [
    "backward_bytes",
    "evaluation_bytes",
    "kept_bytes",
    "largest_projection",
    "loss_bytes",
    "recomputed_bytes",
]

_WIDE = 4  # fp32


def largest_projection(work: Work) -> int:
    """Weights of the largest projection of a layer."""
    return max(out * inp for out, inp in projection_shapes(work.config).values())


def kept_bytes(work: Work) -> int:
    """What one layer keeps that is not recomputed."""
    if work.kernels != "reference":
        return by_hand.kept_bytes(work)
    config, e = work.config, element_bytes(work.precision)
    shapes = projection_shapes(config)
    queries, keys, inner = shapes["q_proj"][0], shapes["k_proj"][0], shapes["gate_proj"][0]
    norms = 2 * (_WIDE * config.hidden_size + _WIDE)
    qk_norms = _WIDE * (queries + keys + config.heads + config.kv_heads) if config.qk_norm else 0
    swiglu = 3 * inner * e
    token = norms + qk_norms + _attention_token_bytes(work, queries, keys) + swiglu + _adapter_token_bytes(work)
    return work.tokens * token + _attention_square_bytes(work) + _cast_bytes(work)


def _attention_token_bytes(work: Work, queries: int, keys: int) -> int:
    """A token's q, k, v, output and log-sum-exp. Where queries share keys, "efficient" and "math" repeat the keys;
    "math" computes in fp32 and needs no log-sum-exp."""
    e = element_bytes(work.precision)
    if work.attention == "math":
        return 3 * queries * _WIDE + queries * e
    held = keys if work.attention == "flash" else queries
    return (2 * queries + 2 * held) * e + _WIDE * work.config.heads


def _attention_square_bytes(work: Work) -> int:
    """What grows with the square of a document's length: only "math" holds the probabilities of every head, in fp32."""
    return work.tokens * work.longest * work.config.heads * _WIDE if work.attention == "math" else 0


def _equal_documents(work: Work) -> bool:
    return work.documents * work.longest == work.tokens


def _adapter_token_bytes(work: Work) -> int:
    """Inputs of the adapters and the low-rank products. An input is shared where projections read the same; that of
    o_proj is what attention keeps anyway, unless it had to be joined from documents of several lengths. With dropout
    each has its own, and a mask (in the compute dtype on a CPU; CUDA needs less)."""
    e, shapes = element_bytes(work.precision), projection_shapes(work.config)
    inputs = 0
    for group in by_hand.SAME_INPUT:
        targeted = [name for name in group if name in work.targets]
        if work.dropout:
            inputs += sum(shapes[name][1] * 2 * e for name in targeted)
        elif targeted and (group != ("o_proj",) or not _equal_documents(work)):
            inputs += shapes[targeted[0]][1] * e
    return inputs + len(work.targets) * work.rank * e


def _cast_bytes(work: Work) -> int:
    """A and B of one layer in the compute dtype; fp32 uses the masters themselves."""
    if work.precision == "fp32":
        return 0
    return adapter_parameters(work.config, work.targets, work.rank) // work.config.layers * 2


def recomputed_bytes(work: Work) -> int:
    """What one layer keeps that is recomputed: its input."""
    if work.kernels != "reference":
        return by_hand.recomputed_bytes(work)
    return work.tokens * work.config.hidden_size * element_bytes(work.precision)


def backward_bytes(work: Work) -> int:
    """What exists for a moment in the backward pass, at its fullest: in the MLP the gradient of the product from the
    frozen weight and from the adapter, or those of its two factors; and the gradients of the residual stream."""
    if work.kernels != "reference":
        return by_hand.backward_bytes(work)
    e, shapes = element_bytes(work.precision), projection_shapes(work.config)
    inner = shapes["gate_proj"][0]
    mlp = work.tokens * (2 * inner + 3 * work.config.hidden_size) * e
    return max(mlp, 2 * _attention_square_bytes(work))  # the gradients of the probabilities and of the scores


def loss_bytes(work: Work, *, tokens: int, trains: bool) -> int:
    """The head and the loss: rows, their gradient, and one chunk of logits twice in fp32 (the logits, and inside
    logsumexp their exponentials) or in both dtypes."""
    if work.kernels != "reference":
        return by_hand.loss_bytes(work, tokens=tokens, trains=trains)
    e, vocabulary = element_bytes(work.precision), work.config.vocab_size
    rows = min(tokens, max(1, CHUNK_LOGITS // vocabulary))
    chunk = rows * vocabulary * 2 * _WIDE
    held = tokens * work.config.hidden_size * (e * (3 if trains else 2) + (_WIDE if trains else 0))
    return chunk + held


def evaluation_bytes(work: Work, tokens: int) -> int:
    """One layer without a backward pass: the residual stream, a norm in fp32, and the MLP's gate, up and products."""
    e, shapes = element_bytes(work.precision), projection_shapes(work.config)
    mlp = 4 * shapes["gate_proj"][0] * e
    scores = 2 * work.longest * work.config.heads * _WIDE if work.attention == "math" else 0
    blocks = by_hand.score_bytes(work)
    return tokens * ((3 * e + 2 * _WIDE) * work.config.hidden_size + max(mlp, scores)) + blocks
