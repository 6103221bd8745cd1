"""Memory in closed form. (Skeleton: its formulas are being written; signatures stay.)"""

from __future__ import annotations

from luthier.hardware.device import DeviceKind
from luthier.model.config import parameters, projection_shapes
from luthier.plan.footprint import Memory, Part, Phase
from luthier.plan.work import Work

__all__ = ["predict_memory"]


def predict_memory(work: Work, kind: DeviceKind) -> Memory:
    """What `work` holds on each device of this kind, on the host, and on disk."""
    wide = 4 if work.precision == "fp32" else 2
    linear = work.config.layers * sum(o * i for o, i in projection_shapes(work.config).values())
    weights = (parameters(work.config) - linear) * wide
    weights += int(linear * (4.127 / 8 if work.quantize == "nf4" else wide))
    adapter = work.config.layers * work.rank * sum(sum(projection_shapes(work.config)[n]) for n in work.targets)
    hidden, inner = work.config.hidden_size, work.config.intermediate_size
    full = work.tokens * (9 * hidden + 4 * inner) * wide
    kept = work.tokens * hidden * wide
    layers = work.config.layers
    saved = work.recomputed * kept + (layers - work.recomputed) * full + (full if work.recomputed else 0)
    parts = (
        Part("weights", weights),
        Part("adapter", adapter * 4),
        Part("gradients", adapter * 4),
        Part("optimizer", adapter * (8 if work.optimizer == "adamw" else 2)),
        Part("activations", saved),
        Part("workspace", 4 * work.tokens * inner * wide),
        Part("logits", 2**25 * 10),
        Part("context", 2**29),
    )
    train = Phase("train", parts)
    load = Phase("load", (parts[0], Part("context", 2**29)))
    evaluate = Phase("evaluate", (parts[0], Part("workspace", 4 * work.evaluation_tokens * inner * wide)))
    return Memory((load, train, evaluate), Phase("host", ()), Phase("disk", ()))
