"""Native kernels touch their tensors and nothing else, fill them wholly, and do not depend on the number of threads.

Each tensor, those that the kernels make included, lies in the middle of a larger one: numbers that were read from
around it would make the results NaN, and what is written there is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from luthier.hardware.compiled import VARIANTS
from luthier.kernels.native import Native
from tests.kernels import exact
from tests.kernels.libraries import native_ops

MARGIN = 1037  # elements, odd: nothing is aligned to a whole vector
LENGTHS = (1, 61, 7, 130)
TOKENS = sum(LENGTHS)

Operation = Callable[[Native, list[Tensor]], tuple[Tensor, ...]]


@pytest.fixture(scope="module", params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Native:
    return native_ops(request.param)


@dataclass
class Margins:
    """Places tensors inside larger ones and says whether these are as they were."""

    around: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # a buffer's bytes, and what they were

    def place(self, x: Tensor) -> Tensor:
        """A copy of `x`, between NaN; between zeros where it holds integers."""
        filling = torch.nan if x.is_floating_point() else 0
        buffer = torch.full((x.numel() + 2 * MARGIN,), filling, dtype=x.dtype)
        self.around.append((buffer, buffer.clone()))
        return buffer[MARGIN : MARGIN + x.numel()].view(x.shape).copy_(x)

    def intact(self) -> bool:
        return all(
            torch.equal(buffer[part].view(torch.uint8), was[part].view(torch.uint8))
            for buffer, was in self.around
            for part in (slice(0, MARGIN), slice(buffer.numel() - MARGIN, None))
        )


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> Iterator[Margins]:
    """What is made by torch.empty and torch.empty_like meanwhile starts as NaN and has margins too."""
    made = Margins()

    def empty(rows: int | torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = rows if isinstance(rows, torch.Size) else torch.Size([rows])
        return made.place(torch.full(shape, torch.nan, dtype=dtype))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda x: empty(x.shape, dtype=x.dtype))
        yield made


def attention_backward(ops: Native, x: list[Tensor], window: int | None) -> tuple[Tensor, ...]:
    o, lse = ops.attention(x[0], x[1], x[2], LENGTHS, window)
    return o, lse, *ops.attention_backward(x[3], (x[0], x[1], x[2]), (o, lse), LENGTHS, window)


def swiglu_backward(ops: Native, x: list[Tensor]) -> tuple[Tensor, ...]:
    return ops.swiglu_backward(x[2], x[0], x[1]), x[0], x[1]


def swiglu_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [random(seed, 131, 701, dtype=dtype) for seed in range(3)]


def norm_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [*swiglu_inputs(dtype), random(3, 701, dtype=dtype)]


def attention_inputs(dtype: torch.dtype) -> list[Tensor]:
    return [random(seed, TOKENS, heads, 34, dtype=dtype) for seed, heads in enumerate((6, 2, 2, 6))]


def rope_inputs(dtype: torch.dtype) -> list[Tensor]:
    turn = random(1, TOKENS, 17).repeat(1, 2)
    return [random(0, TOKENS, 7, 34, dtype=dtype), turn.cos().to(dtype), turn.sin().to(dtype)]


def logits(dtype: torch.dtype) -> list[Tensor]:
    labels = torch.randint(0, 4099, (13,), generator=torch.Generator().manual_seed(5))
    return [random(0, 13, 4099, dtype=dtype), labels, random(1, 13).abs()]


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


CASES: dict[str, tuple[Callable[[torch.dtype], list[Tensor]], Operation]] = {
    "rms_norm": (norm_inputs, lambda ops, x: (ops.rms_norm(x[0], x[3], 1e-5),)),
    "rms_norm_backward": (norm_inputs, lambda ops, x: (ops.rms_norm_backward(x[0], x[1], x[3], 1e-5),)),
    "rms_norm_backward onto": (norm_inputs, lambda ops, x: (ops.rms_norm_backward(x[0], x[1], x[3], 1e-5, x[2]),)),
    "rope": (rope_inputs, lambda ops, x: (ops.rope(x[0], x[1], x[2]),)),
    "rope back": (rope_inputs, lambda ops, x: (ops.rope(x[0], x[1], x[2], back=True),)),
    "swiglu": (swiglu_inputs, lambda ops, x: (ops.swiglu(x[0], x[1]),)),
    "swiglu_backward": (swiglu_inputs, swiglu_backward),
    "attention": (attention_inputs, lambda ops, x: attention_backward(ops, x, None)),
    "attention in a window": (attention_inputs, lambda ops, x: attention_backward(ops, x, 19)),
    "cross_entropy": (logits, lambda ops, x: ops.cross_entropy(x[0], x[1], x[2], True)),
    "cross_entropy alone": (logits, lambda ops, x: ops.cross_entropy(x[0], x[1], None, False)),
}

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
cases = pytest.mark.parametrize("case", list(CASES))


def on_threads(count: int, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


@dtypes
@cases
@pytest.mark.parametrize("threads", [1, 2])
def test_nothing_around_the_tensors_is_read_or_written(
    native: Native, margins: Margins, dtype: torch.dtype, case: str, threads: int
) -> None:
    make, operation = CASES[case]
    plain = on_threads(threads, lambda: operation(native, make(dtype)))
    placed = on_threads(threads, lambda: operation(native, [margins.place(x) for x in make(dtype)]))
    assert len(margins.around) >= len(placed)
    assert margins.intact()
    for one, other in zip(plain, placed, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


@dtypes
@cases
def test_the_number_of_threads_is_no_part_of_the_result(native: Native, dtype: torch.dtype, case: str) -> None:
    """But for the gradients of keys and values: with more threads these are sums of several parts (attention.h), whose
    order is another, so fp32 differs by the rounding of a sum, and bf16 by that of the result too."""
    make, operation = CASES[case]
    one, two, three = (on_threads(count, lambda: operation(native, make(dtype))) for count in (1, 2, 3))
    for number, (alone, shared, again) in enumerate(zip(one, two, three, strict=True)):
        if case.startswith("attention") and number >= 3:  # dk and dv
            largest = float(alone.float().abs().max())
            allowed = (exact.summed(6 * max(LENGTHS)) + 2 * exact.unit(dtype)) * largest
            torch.testing.assert_close(shared, alone, rtol=0, atol=allowed)
            torch.testing.assert_close(again, alone, rtol=0, atol=allowed)
        else:
            assert torch.equal(shared, alone)
            assert torch.equal(again, alone)


@dtypes
def test_the_same_threads_give_the_same_bits_each_time(native: Native, dtype: torch.dtype) -> None:
    first = on_threads(2, lambda: attention_backward(native, attention_inputs(dtype), None))
    for _ in range(5):
        again = on_threads(2, lambda: attention_backward(native, attention_inputs(dtype), None))
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
