"""Time in closed form: what a step computes, over what the device does in a second (hardware/calibrate.py).

A frozen weight of m elements costs 2 m FLOP a token forward and 2 m backward, for it has no gradient of its own; the
factors of a LoRA cost 2 forward and 4 backward; a recomputed layer is computed forward again. A document of L tokens
costs attention 2 L² H d forward, the masked half not counted, and 2.5 times that backward (Dao 2023, arXiv 2307.08691,
section 4.1). Beside the products stand the bytes of element-wise operations (counted in model/decoder.py and kernels/),
the dequantisation of NF4 (once for each pass through a weight: forward, recomputation, backward), and what each
operation costs however small it is. A CPU does them one after another; an accelerator queues operations while it
computes, so there only what exceeds the computing counts.

Legend: T tokens of an average micro-batch, L tokens of a document, I inputs, O outputs, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.hardware.calibrate import estimate_rates
from luthier.hardware.device import Device, DeviceKind, Precision, Rates
from luthier.model.config import ModelConfig, projection_shapes
from luthier.plan.by_hand import SAME_INPUT
from luthier.plan.exchange import gathered_bytes, reduced_bytes
from luthier.plan.passes import backward_passes, forward_passes
from luthier.plan.sizes import (
    CHUNK_LOGITS,
    EVALUATION_TOKENS,
    adapter_parameters,
    element_bytes,
    layer_weights,
)
from luthier.plan.work import Work

__all__ = ["Speed", "predict_speed"]


@dataclass(frozen=True)
class Speed:
    """step_seconds: an average optimizer step. evaluation_seconds: 1,000 held-out tokens, forward only. parts: seconds
    of one step by what is done. flops_per_token: of training, the recomputation counted. source: whose rates."""

    step_seconds: float
    tokens_per_second: float
    evaluation_seconds: float
    flops_per_token: float
    parts: tuple[tuple[str, float], ...]
    source: str


_EMULATED = 0.5
"""A precision that no rate is known for is computed by conversion to fp32: at half its rate, guessed."""

_LINK = 1e10
"""Bytes a second between devices where nobody says: PCIe 3.0 with 16 lanes, less its protocol."""

_LARGE_BLOCK = 2**25
"""Blocks from here on go back to the system at once (glibc's largest M_MMAP_THRESHOLD, mallopt(3))."""

_TOKENS_TIMED = 512
_TOKENS_LOST = 45
_AMONG_OTHERS = 1.2
"""On a CPU: the tokens that products were timed with; as many tokens as packing a weight for the kernel is worth, which
every product does anew (2,048 x 2,048 at 128 and 512 tokens, bf16 and fp32); and how much slower operations run among
others, whose operands take the caches, than timed alone: whole steps against the sum of their parts (benchmarks/)."""

_FULL_HEAD = 64
"""Head size below which attention's kernels run partly empty; measured on a CPU: the rate goes with the root of it."""

_RECOMPUTE_OPERATIONS = 20  # of torch.utils.checkpoint for each layer, in operations
_TENSOR_OPERATIONS = 4  # of clipping and update for each adapter tensor
_OPTIMIZER_BYTES = {"adamw": 40, "adamw-8bit": 22, "paged-adamw-8bit": 22}
"""Read and written for each adapter parameter: norm 4, clip 8, and the update of weight, gradient and moments."""


@dataclass(frozen=True)
class _Cost:
    """Seconds of the device and the number of operations that make them, of one layer, once or of a micro-batch."""

    products: float = 0.0
    adapter: float = 0.0
    attention: float = 0.0
    elements: float = 0.0
    dequantize: float = 0.0
    loss: float = 0.0
    operations: float = 0.0

    def __add__(self, other: _Cost) -> _Cost:
        return _Cost(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    def times(self, factor: float) -> _Cost:
        return _Cost(*(factor * value for value in self.values))

    @property
    def values(self) -> tuple[float, ...]:
        return (
            *(self.products, self.adapter, self.attention, self.elements, self.dequantize, self.loss),
            self.operations,
        )

    @property
    def seconds(self) -> float:
        """Of the device; the operations are the host's."""
        return sum(self.values[:-1])


def predict_speed(work: Work, device: Device) -> Speed:
    """How long `work` takes on `device`, by its rates, or where it has none by those of `estimate_rates`."""
    rates = _rates(device)
    replicas = work.micro_batches * work.devices
    step_tokens = work.step_tokens or float(work.tokens * replicas)
    tokens = max(work.batch_tokens or step_tokens / replicas, 1.0)
    model = _Model(work, rates, device.kind, tokens)
    forward, backward = model.forward(training=True), model.backward()
    layers, again = work.config.layers, work.recomputed
    once = forward.times(layers) + backward.times(layers) + model.ends(training=True)
    recomputed = model.again().times(again)
    batch = once + recomputed
    host = batch.operations * rates.operation
    if device.kind != "cpu":
        host = max(0.0, host - batch.seconds)
    link = device.link or _LINK
    gather = max(0.0, gathered_bytes(work) / link - batch.seconds - host)
    optimizer = _optimizer(work, rates)
    n = work.micro_batches
    parts: tuple[tuple[str, float], ...] = (
        ("frozen products", n * once.products),
        ("adapter", n * once.adapter),
        ("attention", n * once.attention),
        ("element by element", n * once.elements),
        ("rounding to FP8" if work.quantize == "fp8" else "dequantisation", n * once.dequantize),
        ("head and loss", n * once.loss),
        ("recomputation", n * recomputed.seconds),
        ("host", n * host),
        ("communication", n * gather + reduced_bytes(work) / link),
        ("optimizer", optimizer),
    )
    together = _AMONG_OTHERS if device.kind == "cpu" else 1.0
    parts = tuple((name, part if name == "host" else together * part) for name, part in parts)  # host: timed as a layer
    seconds = max(sum(part for _, part in parts), 1e-9)
    return Speed(
        step_seconds=seconds,
        tokens_per_second=step_tokens / seconds,
        evaluation_seconds=_evaluation(work, rates, device.kind),
        flops_per_token=_flops(work, model.documents) / tokens,
        parts=tuple((name, part) for name, part in parts if part > 0),
        source=rates.source,
    )


def _rates(device: Device) -> Rates:
    """The device's; where training has the allocator keep its blocks (cli/allocator.py), no block is new."""
    rates = device.rates or estimate_rates(device)
    return replace(rates, fresh=None) if device.kind == "cpu" and device.installed.glibc else rates


def _evaluation(work: Work, rates: Rates, kind: DeviceKind) -> float:
    """Seconds for 1,000 held-out tokens that go through in groups, forward only."""
    tokens = float(work.evaluation_tokens or min(work.tokens, EVALUATION_TOKENS))
    model = _Model(work, rates, kind, max(tokens, 1.0), whole=True)
    cost = model.forward(training=False).times(work.config.layers) + model.ends(training=False)
    host = cost.operations * rates.operation
    seconds = _AMONG_OTHERS * cost.seconds + host if kind == "cpu" else max(cost.seconds, host)
    return 1000 / model.tokens * seconds


class _Model:
    """One micro-batch of `tokens` tokens through one layer, and through what is before and after all layers.

    `whole`: the tokens are many documents of the usual length, instead of the largest micro-batch scaled to fit.
    """

    def __init__(self, work: Work, rates: Rates, kind: DeviceKind, tokens: float, *, whole: bool = False) -> None:
        self.work, self.rates, self.kind, self.tokens = work, rates, kind, tokens
        self.config = work.config
        self.shapes = projection_shapes(work.config)
        self.documents = _documents(work, tokens, whole)
        self.stored = element_bytes(work.precision)
        self.width = 4 if kind == "cpu" else self.stored  # bytes that the rates count for an element
        self.casts = 0 if work.precision == "fp32" else 1
        few = (1 + _TOKENS_LOST / tokens) / (1 + _TOKENS_LOST / _TOKENS_TIMED)
        self.few = few if kind == "cpu" else 1.0
        self.by_hand = work.kernels != "reference"

    def elements(self, passes: float, wide: float = 0.0) -> float:
        """Seconds of reading or writing so many elements in the compute dtype, and `wide` ones in fp32."""
        return (passes * self.width + wide * 4) / self.rates.bandwidth

    def product(self, width: int, flops: float) -> float:
        """Seconds of a product with a weight whose smaller side is `width`."""
        points = [(r.precision, r.width, r.flops) for r in self.rates.matmul]
        return flops / _rate_at(self.rates, self.work.precision, points, width) * self.few

    def frozen(self, *names: str) -> float:
        """Seconds of the products with these weights, or all seven, in one direction; the weights are read once."""
        total = 0.0
        for out, inp in (self.shapes[name] for name in names or self.shapes):
            total += self.product(min(out, inp), 2.0 * self.tokens * out * inp)
            total += out * inp * self.stored / self.rates.bandwidth
        return total

    def dequantize(self) -> tuple[float, float]:
        """Seconds and operations of one pass through all weights of a layer that are held in NF4.

        For FP8 what rounding the rows and, backward, transposing the weights read and write, as a mean of both
        directions. Its products are counted at the compute dtype's rate: FP8's own has not been measured.
        """
        if self.work.quantize == "none":
            return 0.0, 0.0
        if self.work.quantize == "fp8":
            rows = sum(self.tokens * (out + inp) / 2 * (self.stored + 1) for out, inp in self.shapes.values())
            return (rows + layer_weights(self.config)) / self.rates.bandwidth, 2.0 * len(self.shapes)
        return layer_weights(self.config) / self.rates.dequantize, 3.0 * len(self.shapes)

    def forward(self, *, training: bool) -> _Cost:
        """One layer."""
        passes = forward_passes(self.work, training=training)
        unpacking, unpack_operations = self.dequantize()
        calls = 0 if self.by_hand else len(self.documents)
        return _Cost(
            products=self.frozen(),
            adapter=self.adapter(1.0) + self.casts * self.adapter_parameters * 6 / self.rates.bandwidth,
            attention=self.attention(backward=False),
            elements=self.elements(self.tokens * passes.narrow, self.tokens * passes.wide),
            dequantize=unpacking,
            operations=passes.operations + calls + unpack_operations,
        )

    def again(self) -> _Cost:
        """One layer that is recomputed; by hand without its last product."""
        cost = self.forward(training=True)
        if self.by_hand:
            return replace(cost, products=cost.products - self.frozen("down_proj"))
        return cost + _Cost(operations=_RECOMPUTE_OPERATIONS)

    def backward(self) -> _Cost:
        """One layer."""
        passes = backward_passes(self.work)
        unpacking, unpack_operations = self.dequantize()
        # The first layer's input has no gradient, so q, k and v need none for theirs.
        share = 1 - _unneeded(self.config) / self.config.layers
        calls = 0.0 if self.by_hand else 1.6 * len(self.documents)
        return _Cost(
            products=self.frozen() * share,
            adapter=self.adapter(2.0) + self.adapter_parameters * (6 * self.casts + 12) / self.rates.bandwidth,
            attention=self.attention(backward=True),
            elements=self.elements(self.tokens * passes.narrow, self.tokens * passes.wide),
            dequantize=unpacking * share,
            operations=passes.operations + calls + unpack_operations,
        )

    def adapter(self, times: float) -> float:
        """Seconds of the thin products of a layer's adapters, so many times; those of A with the ranks that go together
        where the gradients are by hand."""
        rank, total = self.work.rank, 0.0
        alone = not self.by_hand or bool(self.work.dropout)
        groups = tuple((name,) for name in self.work.targets) if alone else SAME_INPUT
        for group in groups:
            targets = [self.shapes[name] for name in group if name in self.work.targets]
            if targets:
                ranks, inputs = rank * len(targets), targets[0][1]
                total += self.product(min(ranks, inputs), 2.0 * times * self.tokens * ranks * inputs)
            total += sum(self.product(min(rank, out), 2.0 * times * self.tokens * rank * out) for out, _ in targets)
        return total

    @property
    def adapter_parameters(self) -> int:
        """Of one layer."""
        return _adapter_parameters(self.work) // self.config.layers

    def ends(self, *, training: bool) -> _Cost:
        """Embedding, final norm, head and loss: once for a micro-batch."""
        config = self.config
        labelled = self.tokens * self.work.labelled
        logits = labelled * config.vocab_size
        products = self.product(config.hidden_size, 2.0 * logits * config.hidden_size) * (2 if training else 1)
        chunks = math.ceil(logits / CHUNK_LOGITS)
        weight = config.vocab_size * config.hidden_size * self.stored * chunks * (2 if training else 1)
        wide = (10 if training else 6) + (2 * self.casts if self.kind == "cpu" else self.casts)
        narrow = self.casts * (2 if training else 1) * (1 if self.kind == "cpu" else 2)
        if self.work.kernels in ("native", "cuda"):  # the gradient comes in the logits' place
            wide, narrow = 0, 4 if training else 2
        loss = products + self.elements(logits * narrow, logits * wide) + weight / self.rates.bandwidth
        loss += self.fresh(logits, training=training)
        hidden = self.tokens * config.hidden_size
        passes = 8 if training else 4
        return _Cost(
            loss=loss,
            elements=self.elements(hidden * passes, hidden * (19 if training else 7)),
            operations=40 + 15 * chunks if training else 20 + 10 * chunks,
        )

    def fresh(self, logits: float, *, training: bool) -> float:
        """Seconds for the logits' blocks, which are too large for the allocator to keep."""
        if self.rates.fresh is None:
            return 0.0
        chunk = min(logits, CHUNK_LOGITS)
        narrow = self.stored * ((2 if training else 1) if self.casts else 1)  # logits; the error cast back
        wide = (4 if self.casts else 0) + 4  # logits in fp32; a copy inside of logsumexp
        total = 0.0
        if chunk * 4 >= _LARGE_BLOCK:
            total += wide
        if chunk * self.stored >= _LARGE_BLOCK:
            total += narrow
        return logits * total / self.rates.fresh

    def attention(self, *, backward: bool) -> float:
        """Seconds of one layer, averaged over those with and without a sliding window."""
        config = self.config
        windows = [config.layer_window(layer) for layer in range(config.layers)]
        return sum(self.document(length, windows, backward) * count for count, length in self.documents)

    def document(self, length: float, windows: Sequence[int | None], backward: bool) -> float:
        """Seconds of one document in an average layer."""
        heads, dim = self.config.heads, self.config.head_dim
        flops = (5.0 if backward else 2.0) * length * length * heads * dim
        masked = sum(window is not None and length > window for window in windows) / len(windows)
        if self.work.attention == "math":  # all scores of all heads, in fp32, several times over
            scores = length * length * heads
            return self.product(dim, 2 * flops) + self.elements(0, scores * (18 if backward else 12))
        rates = [(r.precision, r.length, r.backward if backward else r.forward) for r in self.rates.attention]
        rate = _rate_at(self.rates, self.work.precision, rates, length)
        lengths = {r.length for r in self.rates.attention}
        if len(lengths) > 1:  # below the shortest that was measured, a token costs what it costs there
            rate *= min(1.0, length / min(lengths))
        rate *= math.sqrt(min(1.0, dim / _FULL_HEAD))
        return flops * (1 + masked) / rate  # a mask leaves nothing out


def _documents(work: Work, tokens: float, whole: bool) -> tuple[tuple[float, float], ...]:
    """(how many, tokens of each): the longest and, if there are more, the others as equals, scaled to `tokens`."""
    rest = work.tokens - work.longest
    others = work.documents - 1
    if others < 1 or rest < 1:
        found: tuple[tuple[float, float], ...] = ((1.0, float(work.tokens)),)
    elif rest == others * work.longest:
        found = ((float(work.documents), float(work.longest)),)
    else:
        found = ((1.0, float(work.longest)), (float(others), rest / others))
    scale = tokens / work.tokens
    if whole and scale > 1:  # more documents
        return tuple((count * scale, length) for count, length in found)
    return tuple((count, length * scale) for count, length in found)  # shorter ones


def _rate_at(rates: Rates, precision: Precision, points: Sequence[tuple[Precision, int, float]], at: float) -> float:
    """FLOP/s at a size: on a straight line of logarithms between the sizes that are known, level beyond them."""
    order = {"bf16": ("bf16", "fp16"), "fp16": ("fp16", "bf16"), "fp32": ("fp32",)}[precision]
    known: list[tuple[int, float]] = []
    for one in order:
        known = known or sorted((size, flops) for found, size, flops in points if found == one)
    if not known:
        known = sorted((size, flops * _EMULATED) for found, size, flops in points if found == "fp32")
    if not known:
        raise ValueError(f"rates without {precision} and fp32: {rates.source}")
    low = max((point for point in known if point[0] <= at), default=known[0])
    high = min((point for point in known if point[0] >= at), default=known[-1])
    if low[0] >= high[0]:
        return low[1]
    share = math.log(at / low[0]) / math.log(high[0] / low[0])
    return math.exp((1 - share) * math.log(low[1]) + share * math.log(high[1]))


def _unneeded(config: ModelConfig) -> float:
    """The part of a layer's weights that the first layer needs no backward product of."""
    shapes = projection_shapes(config)
    sizes = {name: out * inp for name, (out, inp) in shapes.items()}
    return sum(sizes[name] for name in ("q_proj", "k_proj", "v_proj")) / sum(sizes.values())


def _adapter_parameters(work: Work) -> int:
    return adapter_parameters(work.config, work.targets, work.rank)


def _flops(work: Work, documents: Sequence[tuple[float, float]]) -> float:
    """Of one micro-batch."""
    config = work.config
    tokens = sum(count * length for count, length in documents)
    layer = layer_weights(config)
    pairs = sum(count * length * length for count, length in documents)
    adapter = tokens * _adapter_parameters(work)
    forward = config.layers * (2 * tokens * layer + 2 * pairs * config.heads * config.head_dim) + 2 * adapter
    backward = 2 * tokens * layer * (config.layers - _unneeded(config))
    backward += 5 * config.layers * pairs * config.heads * config.head_dim + 4 * adapter
    head = 4 * tokens * work.labelled * config.vocab_size * config.hidden_size
    return forward * (1 + work.recomputed / config.layers) + backward + head


def _optimizer(work: Work, rates: Rates) -> float:
    """Seconds of clipping and the update; under FSDP each device does its part."""
    count = _adapter_parameters(work) / (work.devices if work.sharding == "fsdp" else 1)
    tensors = 2 * work.config.layers * len(work.targets)
    update = count * _OPTIMIZER_BYTES[work.optimizer] / rates.bandwidth
    return update + tensors * _TENSOR_OPERATIONS * rates.operation
