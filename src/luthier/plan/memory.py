"""Memory in closed form: what a run holds on each device and on its host. No torch, nothing measured here.

    weights + adapter + gradients + optimizer state            fixed
    + activations + the fuller of (loss, backward)             per micro-batch, see activations.py
    + dequantised weights, workspaces, allocator slack         what libraries add
    + context                                                  the process before it holds a single weight

Bytes per parameter: 2 or 4 for weights; NF4 with double quantisation 4 + 8/64 + 32/(64 x 256) = 4.127 bits (QLoRA,
section 3), FP8 one and a fp32 scale for each output, for the projections of the layers; embedding, head and norms keep
the compute dtype. The adapter, its
gradients and AdamW's two moments are fp32 each; 8-bit moments are one byte and one fp32 scale per 256, two of them.

A micro-batch that a CPU takes as two halves at once (train/halves.py) keeps what the whole keeps. What exists for a
moment each half has for itself, and the adapter has the gradients of the halves beside those of earlier micro-batches.

FSDP2 cuts all of these over the devices and gathers one layer at a time (the next one ahead of it); DDP holds all on
each device and one more copy of the gradients in its buckets.

What libraries add is measured: docs/decisions/0009 says how, benchmarks/plan_cpu.py and plan_cuda.py hold the result
against real runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from luthier.hardware.device import DeviceKind
from luthier.model.config import parameters, projection_shapes
from luthier.plan.activations import (
    backward_bytes,
    evaluation_bytes,
    kept_bytes,
    largest_projection,
    loss_bytes,
    recomputed_bytes,
)
from luthier.plan.disk import NOTHING_KEPT, Written, predict_disk
from luthier.plan.footprint import Memory, Part, Phase
from luthier.plan.sizes import (
    NF4_BITS,
    adapter_parameters,
    base_bytes,
    element_bytes,
    layer_weights,
    moment_bytes,
)
from luthier.plan.work import Work
from luthier.recipe.micro_batch import LEAST, ROWS, WORTH

__all__ = ["CONTEXT", "NOT_TENSORS", "SLACK", "predict_memory", "weight_bytes"]

MIB = 2**20
_WIDE_BYTES = 4  # fp32
_DOCUMENT = 16
CONTEXT: dict[DeviceKind, int] = {"cpu": 330 * MIB, "cuda": 500 * MIB, "mps": 500 * MIB}
"""cpu: interpreter, torch, the other libraries, and what they load at their first step. cuda: driver and kernels, which
torch's own figures leave out. Measured on Linux with torch 2.13 (cpu); assumed elsewhere."""
_CONTEXT_NF4: dict[DeviceKind, int] = {"cpu": 100 * MIB, "cuda": 0, "mps": 0}  # bitsandbytes and what it imports

SLACK: dict[DeviceKind, float] = {"cpu": 0.10, "cuda": 0.05, "mps": 0.10}
"""Share of what comes and goes in a step that the allocator holds on top."""

_SHAPE = 24 * MIB
"""What oneDNN keeps for each number of rows that comes up: a kernel for each of a layer's products, of whatever size.
Fitted to three runs on GSM8K's rows (docs/decisions/0009)."""
_MOST_SHAPES = 16
_UNEQUAL = 1.05
"""Above so many times the average tokens a micro-batch's largest shows that their lengths differ; packs hardly do."""

_MATMUL_WORKSPACE: dict[DeviceKind, int] = {"cpu": 0, "cuda": 32 * MIB, "mps": 0}  # cuBLAS, on Hopper its largest
_HOST_CONTEXT = 1536 * MIB  # python and torch with the CUDA libraries; assumed
_SHARD = 5 * 10**9  # bytes of the largest file of weights, as models on the hub are usually cut
NOT_TENSORS = ("context", "allocator slack")
"""Parts that torch.cuda.max_memory_allocated does not count."""


def weight_bytes(work: Work) -> int:
    """The frozen base, whole."""
    others = parameters(work.config) - _linear(work)
    held = work.config.layers * base_bytes(work.config, work.quantize, work.precision)
    return int(held) + others * element_bytes(work.precision)


def predict_memory(work: Work, kind: DeviceKind, written: Written = NOTHING_KEPT) -> Memory:
    """What `work` holds on each device of this kind, on the host, and on disk where this is to be written."""
    shares, built = _shares(work, kind), _built(work, kind)
    if kind == "cpu" and work.precision != "fp32":
        work = _filled(work, shares)
    phases = [Phase("load", _load(work, kind)), Phase("train", (*_train(work, kind, shares), *built))]
    if work.evaluation_tokens:
        phases.append(Phase("evaluate", (*_evaluate(work, kind), *built)))
    disk = predict_disk(work.config, _trained(work), work.optimizer, written)
    return Memory(tuple(phases), _host(work, kind), disk)


def _shares(work: Work, kind: DeviceKind) -> int:
    """How many parts of the micro-batch are computed at once: two where train/halves.py divides it, if its documents
    make two even halves and the threads are even in number, which is not known here."""
    alone = kind != "cpu" or work.dropout > 0 or work.precision == "fp16" or work.documents < 2
    small = work.tokens < 2 * LEAST or work.tokens * work.config.hidden_size < WORTH
    return 1 if alone or small else 2


def _built(work: Work, kind: DeviceKind) -> tuple[Part, ...]:
    """The kernels that oneDNN keeps where micro-batches differ in length: on GSM8K a third of the numbers of rows up to
    the largest come up, in multiples of ROWS. fp32 has more numbers and smaller kernels."""
    average = work.step_tokens / work.micro_batches
    if kind != "cpu" or not 0 < _UNEQUAL * average < work.tokens:
        return ()
    shapes = min(_MOST_SHAPES, work.tokens / (3 * ROWS))
    return (Part("kernels", int(shapes * _SHAPE), "oneDNN's, for each number of rows"),)


def _filled(work: Work, shares: int) -> Work:
    """The micro-batch as it is computed on a CPU in 16 bits: documents are filled up to 16 tokens, but for the native
    kernels, and those of a share all together to ROWS."""
    document = 1 if work.kernels == "native" else _DOCUMENT
    if work.documents * work.longest != work.tokens:
        tokens = _up(work.tokens + work.documents * (document - 1), ROWS) + (shares - 1) * ROWS
        return replace(work, tokens=tokens)
    length = _up(work.longest, document)
    tokens = sum(_up((work.documents + share) // shares * length, ROWS) for share in range(shares))
    # Documents of equal length that fill it stay of equal length.
    return replace(work, tokens=tokens, longest=length if tokens == work.documents * length else work.longest)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _linear(work: Work) -> int:
    return work.config.layers * layer_weights(work.config)


def _trained(work: Work) -> int:
    return adapter_parameters(work.config, work.targets, work.rank)


def _cut(size: float, work: Work) -> int:
    """This device's part of something that FSDP cuts."""
    return int(size / work.devices) if work.sharding == "fsdp" else int(size)


def _context(work: Work, kind: DeviceKind) -> Part:
    size = CONTEXT[kind] + (_CONTEXT_NF4[kind] if work.quantize == "nf4" else 0)
    return Part("context", size, "libraries and their kernels, before any weight is loaded")


def _weights(work: Work) -> Part:
    held = f"{parameters(work.config):,} parameters in {work.precision}"
    if work.quantize == "nf4":
        held += f", {_linear(work):,} of them in NF4 ({NF4_BITS:.3f} bits)"
    if work.quantize == "fp8":
        held += f", {_linear(work):,} of them in FP8"
    return Part("weights", _cut(weight_bytes(work), work), held)


def _state(work: Work, shares: int = 1) -> tuple[Part, ...]:
    """Adapter, gradients, optimizer. Those of two halves are apart from those that were there before, of an earlier
    micro-batch or the proof's."""
    count = _trained(work)
    moments = moment_bytes(work.optimizer)
    buckets = 4 * count if work.sharding == "ddp" else 0
    held = "fp32" + (", and DDP's buckets" if buckets else "") + (", twice" if shares > 1 else "")
    return (
        Part("adapter", _cut(4 * count, work), f"{count:,} parameters in fp32"),
        Part("gradients", _cut(4 * count * shares, work) + buckets, held),
        Part("optimizer", _cut(moments * count, work), f"{work.optimizer}, {moments:.3g} bytes a parameter"),
    )


def _gathered(work: Work, kind: DeviceKind, shares: int = 1) -> tuple[Part, ...]:
    """What a matrix product needs beside its operands: NF4 turned back into the compute dtype, operands rounded to FP8,
    a gathered layer."""
    parts = []
    if work.sharding == "fsdp":
        layer = base_bytes(work.config, work.quantize, work.precision)
        ends = 2 * work.config.vocab_size * work.config.hidden_size * element_bytes(work.precision)
        parts.append(Part("gathered weights", int(2 * layer) + ends, "two layers, embedding and head, whole"))
    if work.quantize == "nf4":
        size = shares * largest_projection(work) * element_bytes(work.precision)
        held = "one projection at a time" + (", of each half" if shares > 1 else "")
        parts.append(Part("dequantised weights", size, held))
    if work.quantize == "fp8":
        rows = work.tokens * max(max(shape) for shape in projection_shapes(work.config).values())
        parts.append(Part("operands in FP8", largest_projection(work) + rows, "a transposed weight, rounded rows"))
    if _MATMUL_WORKSPACE[kind]:
        parts.append(Part("matmul workspace", _MATMUL_WORKSPACE[kind], "cuBLAS"))
    return tuple(parts)


def _with_slack(fixed: Sequence[Part], moving: Sequence[Part], kind: DeviceKind) -> tuple[Part, ...]:
    slack = int(SLACK[kind] * sum(part.bytes for part in moving))
    held = Part("allocator slack", slack, f"{SLACK[kind]:.0%} of what comes and goes")
    return (*fixed, *(part for part in moving if part.bytes), held)


def _train(work: Work, kind: DeviceKind, shares: int) -> tuple[Part, ...]:
    layers, again = work.config.layers, work.recomputed
    kept = kept_bytes(work)
    activations = (layers - again) * kept + again * recomputed_bytes(work) + _positions(work)
    what = f"{layers - again} layers kept whole, {again} recomputed, {work.tokens:,} tokens"
    # While a recomputed layer is done again, the layers after it are gone already, and so is the loss.
    # All tokens of the heaviest micro-batch may have a label, whatever their share on average.
    share = replace(work, tokens=-(-work.tokens // shares))
    loss, backward = shares * loss_bytes(share, tokens=share.tokens, trains=True), shares * backward_bytes(share)
    last_recomputed = kept if again == layers else 0
    moving = [Part("activations", activations, what)]
    if loss >= backward + last_recomputed:
        moving.append(Part("loss", loss, "a chunk of logits, and its gradient"))
    else:
        moving.append(Part("backward", backward + last_recomputed, "gradients of the layer at hand"))
    moving.extend(_gathered(work, kind, shares))
    written = (_snapshot(work),) if kind == "cpu" else ()
    return _with_slack((_weights(work), *_state(work, shares), *written, _context(work, kind)), moving, kind)


def _snapshot(work: Work) -> Part:
    """The copy of adapter and optimizer that is written to disk while the next step is taken."""
    size = int(_trained(work) * (4 + moment_bytes(work.optimizer)))
    return Part("checkpoint", size, "a copy of adapter and optimizer, while it is written")


def _positions(work: Work) -> int:
    """Token ids, labels and weights (8 bytes each), and the rotary tables of the longest document and of all tokens."""
    return work.tokens * 24 + 2 * (work.longest + work.tokens) * work.config.head_dim * element_bytes(work.precision)


def _evaluate(work: Work, kind: DeviceKind) -> tuple[Part, ...]:
    tokens = work.evaluation_tokens
    forward = evaluation_bytes(work, tokens) + loss_bytes(work, tokens=tokens, trains=False)
    moving = [Part("forward", forward, f"{tokens:,} held-out tokens, nothing kept"), *_gathered(work, kind)]
    return _with_slack((_weights(work), *_state(work), _context(work, kind)), moving, kind)


def _load(work: Work, kind: DeviceKind) -> tuple[Part, ...]:
    """All weights and one tensor more: on a CPU as the file has it, and before it is quantised in the compute dtype."""
    stored = _WIDE_BYTES if work.config.dtype == "float32" else 2
    embedding = work.config.vocab_size * work.config.hidden_size
    as_stored = max(embedding, largest_projection(work)) * stored if kind == "cpu" else 0
    unquantised = largest_projection(work) * element_bytes(work.precision) if work.quantize != "none" else 0
    tensor = Part("one tensor", max(as_stored, unquantised), "as it is stored, or before it is quantised")
    return (_weights(work), *((tensor,) if tensor.bytes else ()), _context(work, kind))


def _host(work: Work, kind: DeviceKind) -> Phase:
    """Of a GPU's host: the process, one file of weights while it is merged, batches. Of a CPU: the merge."""
    merged = min(_SHARD, 2 * parameters(work.config))
    wide = 3 * _WIDE_BYTES * largest_projection(work)  # the embedding is copied as it is
    context = _HOST_CONTEXT if kind == "cuda" else CONTEXT[kind]
    parts = [
        Part("process", context),
        Part("merge", merged + wide, "one file of weights, and one tensor in fp32"),
    ]
    if kind != "cpu":
        parts.append(_snapshot(work))
    if work.optimizer == "paged-adamw-8bit":
        parts.append(Part("paged optimizer", int(_trained(work) * moment_bytes(work.optimizer))))
    return Phase("host", tuple(parts))
