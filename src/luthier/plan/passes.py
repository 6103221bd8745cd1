"""What a layer does beside its large products, of one token: elements read and written, and calls whatever the token.

Counted in model/decoder.py and kernels/ for layers under autograd, in model/by_hand.py, model/joint.py and kernels/ for
those with gradients by hand. There each operation reads and writes a row once, and the products with frozen weights add
into the residual stream.

Legend: D hidden size, Q query width, K key width, F inner size, I inputs, O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from luthier.model.config import projection_shapes
from luthier.plan.by_hand import SAME_INPUT
from luthier.plan.work import Work

__all__ = ["Passes", "backward_passes", "forward_passes", "hand_elements"]


@dataclass(frozen=True)
class Passes:
    """Of one layer. narrow: elements that a token has read or written in the compute dtype; wide: in fp32.
    operations: calls, attention counted once, dequantisation not counted."""

    narrow: float
    wide: float
    operations: float


def hand_elements(hidden: int, queries: int, keys: int, inner: int) -> tuple[int, int]:
    """Elements that the kernels of a layer by hand read and write for a token, forward and backward.

    Two norms, q and k turned, the SwiGLU; backward the norms once more, their gradients added to the stream's, and the
    gradients of the others.
    """
    forward = 4 * hidden + 2 * (queries + keys) + 3 * inner
    backward = (4 + 8) * hidden + 2 * (queries + keys) + 6 * inner
    return forward, backward


def forward_passes(work: Work, *, training: bool) -> Passes:
    """One layer forward."""
    config, shapes = work.config, projection_shapes(work.config)
    targets = [shapes[name] for name in work.targets]
    turned, casts = (config.heads + config.kv_heads) * config.head_dim, 0 if work.precision == "fp32" else 1
    dropped = 3 * sum(inputs for _, inputs in targets) if training and work.dropout else 0
    if work.kernels != "reference":
        return _forward_by_hand(work, dropped)
    normed = 2 * config.hidden_size + (turned if config.qk_norm else 0)
    passes = 6 * config.hidden_size + 10 * turned + 5 * config.intermediate_size + 3 * sum(out for out, _ in targets)
    norms = 4 if config.qk_norm else 2
    calls = norms * (5 + 2 * casts) + 14 + len(shapes) + len(targets) * (4 + 2 * casts)
    return Passes(passes + dropped + 4 * normed, 7 * normed, calls)


def backward_passes(work: Work) -> Passes:
    """One layer backward; its operations without those that unpack weights."""
    config, shapes = work.config, projection_shapes(work.config)
    targets = [shapes[name] for name in work.targets]
    turned = (config.heads + config.kv_heads) * config.head_dim
    if work.kernels != "reference":
        return _backward_by_hand(work)
    normed = 2 * config.hidden_size + (turned if config.qk_norm else 0)
    passes = 15 * config.hidden_size + 16 * turned + 9 * config.intermediate_size
    passes += 3 * sum(inputs for _, inputs in targets)
    return Passes(passes + 6 * normed, 12 * normed, 1.6 * forward_passes(work, training=True).operations)


def _forward_by_hand(work: Work, dropped: int) -> Passes:
    config, shapes = work.config, projection_shapes(work.config)
    queries, keys = shapes["q_proj"][0], shapes["k_proj"][0]
    passes = hand_elements(config.hidden_size, queries, keys, config.intermediate_size)[0]
    passes += 4 * config.hidden_size  # two products added to the stream
    passes += 2 * sum(shapes[name][0] for name in work.targets) + dropped  # the adapters', added to the frozen ones'
    normed = 2 * (queries + keys) if config.qk_norm else 0
    calls = 6 + (2 if config.qk_norm else 0) + len(shapes) + 3 * _joints(work) + 3 * len(work.targets)
    return Passes(passes + normed, 0, calls)


def _backward_by_hand(work: Work) -> Passes:
    config, shapes = work.config, projection_shapes(work.config)
    queries, keys = shapes["q_proj"][0], shapes["k_proj"][0]
    passes = hand_elements(config.hidden_size, queries, keys, config.intermediate_size)[1]
    passes += 6 * config.hidden_size  # the products of k, v and up, added to those of q and gate
    shared = [shapes[group[0]][1] for group in SAME_INPUT if any(name in work.targets for name in group)]
    passes += 2 * sum(shared)
    if work.dropout:
        passes += 7 * sum(shapes[name][1] for name in work.targets)
    normed = 3 * (queries + keys) if config.qk_norm else 0
    calls = 8 + (2 if config.qk_norm else 0) + len(shapes) + 6 * _joints(work) + 6 * len(work.targets)
    return Passes(passes + normed, 0, calls)


def _joints(work: Work) -> int:
    """Low-rank products that are one: with dropout each adapter's is its own."""
    if work.dropout:
        return len(work.targets)
    return sum(any(name in work.targets for name in group) for group in SAME_INPUT)
