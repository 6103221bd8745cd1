"""A micro-batch in two halves at once: the gradient of the whole, the same bits each time, and no half left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.data.batches import Batch, in_two, pack
from luthier.model.decoder import Decoder
from luthier.plan import memory
from luthier.plan.work import Work
from luthier.train import halves as module
from luthier.train import step
from luthier.train.halves import add_both, halves
from luthier.train.making import make_trainee
from luthier.train.step import Trainee, forward_backward
from tests.train.test_step import gradients, moved
from tests.train.world import make_examples, make_settings, tiny_decoder


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and no micro-batch too small, nor for the plan."""
    for one in (module, memory):
        monkeypatch.setattr(one, "WORTH", 0)
        monkeypatch.setattr(one, "LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def batch(*lengths: int, seed: int = 1) -> Batch:
    rows = [make_examples(1, seed=seed + i, shortest=n, longest=n, first_row=i)[0] for i, n in enumerate(lengths)]
    return pack(rows)


def weighted(one: Batch) -> Batch:
    """With a weight of its own for each label."""
    return replace(one, weights_T=torch.rand(one.tokens, generator=torch.Generator().manual_seed(one.tokens)) + 0.1)


def trainee_of(folder: Path, **changes: object) -> Trainee:
    return moved(make_trainee(tiny_decoder(folder), make_settings(**changes)))


def undivided(monkeypatch: pytest.MonkeyPatch, trainee: Trainee, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "WORTH", 2**60)
        return forward_backward(trainee.decoder, batches), gradients(trainee)


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("lengths", [(5, 5), (20, 33, 9, 18), (7, 3, 3, 2, 2, 2, 2)], ids=str)
def test_two_have_each_document_once_with_its_labels_and_weights(lengths: tuple[int, ...], with_weights: bool) -> None:
    one = weighted(batch(*lengths)) if with_weights else batch(*lengths)
    two = in_two(one)
    assert two[0].tokens >= two[1].tokens
    assert sorted(two[0].rows + two[1].rows) == sorted(one.rows) == list(range(len(lengths)))
    starts = dict(zip(one.rows, np.cumsum((0, *lengths)).tolist(), strict=False))
    for half in two:
        assert sum(half.lengths) == half.tokens == len(half.labels_T)
        here = 0
        for row, length in zip(half.rows, half.lengths, strict=True):
            assert length == lengths[row]
            of, was = slice(here, here + length), slice(starts[row], starts[row] + length)
            assert torch.equal(half.ids_T[of], one.ids_T[was])
            assert torch.equal(half.labels_T[of], one.labels_T[was])
            if one.weights_T is None:
                assert half.weights_T is None
            else:
                assert half.weights_T is not None
                assert torch.equal(half.weights_T[of], one.weights_T[was])
            here += length


@pytest.mark.parametrize("checkpointing", [0, 2])
def test_the_gradient_is_that_of_the_whole_and_has_the_same_bits_each_time(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: int
) -> None:
    """Three micro-batches, so that gradients are there already when the second and third come."""
    batches = [batch(20, 33, 9, 18), batch(31, 30, seed=9), batch(12, 11, 10, 9, 8, 10, seed=30)]
    trainee = trainee_of(tiny_llama, checkpointing=checkpointing)
    assert all(halves(trainee.decoder, one) is not None for one in batches)
    loss, whole = undivided(monkeypatch, trainee, batches)
    found = []
    for _ in range(6):
        trainee.optimizer.zero_grad()
        found.append((forward_backward(trainee.decoder, batches), gradients(trainee).clone()))
    assert all(one[0] == found[0][0] and torch.equal(one[1], found[0][1]) for one in found)
    assert found[0][0] == pytest.approx(loss, rel=1e-6)  # sums of a hundred fp32 terms in another order
    assert float((found[0][1] - whole).norm() / whole.norm()) < 1e-6


# In bf16 the halves differ from the whole by roundings of 2^-9 of numbers whose signs differ: 2^-8 of the norm at most.
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)], ids=["fp32", "bf16"])
def test_the_gradient_with_weights_is_that_of_the_whole(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, near: float
) -> None:
    batches = [weighted(batch(20, 33, 9, 18)), weighted(batch(31, 30, seed=9))]
    trainee = moved(make_trainee(tiny_decoder(tiny_llama, dtype), make_settings()))
    assert all(halves(trainee.decoder, one) is not None for one in batches)
    loss, whole = undivided(monkeypatch, trainee, batches)
    trainee.optimizer.zero_grad()
    assert forward_backward(trainee.decoder, batches) == pytest.approx(loss, rel=near)
    assert float((gradients(trainee) - whole).norm() / whole.norm()) < near
    trainee.optimizer.zero_grad()
    forward_backward(trainee.decoder, [replace(one, weights_T=None) for one in batches])
    assert float((gradients(trainee) - whole).norm() / whole.norm()) > 0.05, "weights that change nothing"


def test_whichever_half_comes_first_the_bits_are_the_same(tiny_llama: Path) -> None:
    """With a gradient there before: its sum with the halves' must not depend on which of them was added first."""
    trainee, one = trainee_of(tiny_llama), batch(20, 33, 9, 18)
    two = halves(trainee.decoder, one)
    assert two is not None
    forward_backward(trainee.decoder, [batch(31, 30, seed=9)])
    before = {name: leaf.grad.clone() for name, leaf in trainee.parameters.items() if leaf.grad is not None}
    assert len(before) == len(trainee.parameters)
    found: list[torch.Tensor] = []
    for first in two:
        done = threading.Event()
        for name, leaf in trainee.parameters.items():
            leaf.grad = before[name].clone()

        def work(half: Batch, first: Batch = first, done: threading.Event = done) -> torch.Tensor:
            if half is not first:
                assert done.wait(60)
            summed = step._add_gradient(trainee.decoder, half, one.weight, None)
            if half is first:
                done.set()
            return summed

        add_both(trainee.decoder, two, work)
        found.append(gradients(trainee))
    assert torch.equal(found[0], found[1])


def test_the_plan_has_room_for_both_halves(tiny_llama: Path) -> None:
    """As they are filled up; to the token where all documents are of one length."""
    decoder, random = trainee_of(tiny_llama).decoder, np.random.default_rng(2)
    known, divided = Work(decoder.config, "bf16", "none", "adamw", "flash", 3, ("q_proj",), 1, 1, kernels="native"), 0
    for draw in range(120):
        count, longest = int(random.integers(2, 12)), int(random.integers(2, 90))
        lengths = [longest] * count if draw % 3 == 0 else random.integers(2, longest + 1, count).tolist()
        one = batch(*lengths)
        if (two := halves(decoder, one)) is None:
            continue
        divided += 1
        work = replace(known, tokens=one.tokens, longest=max(lengths), documents=count)
        assert memory._shares(work, "cpu") == 2
        for document, kernels in ((1, "native"), (16, "torch")):
            planned = memory._filled(replace(work, kernels=kernels), 2).tokens  # type: ignore[arg-type]
            computed = sum(half.rounded(document).tokens for half in two)
            assert computed == planned if len(set(lengths)) == 1 else computed <= planned
    assert divided > 50


@pytest.mark.parametrize(
    ("lengths", "changes", "threads"),
    [
        ((20, 20), {"dropout": 0.1}, 2),
        ((20, 20), {}, 1),
        ((20, 20), {}, 3),
        ((40,), {}, 2),
        ((40, 10), {}, 2),
    ],
    ids=["dropout", "one thread", "odd threads", "one document", "uneven"],
)
def test_what_goes_undivided(
    tiny_llama: Path, lengths: tuple[int, ...], changes: dict[str, object], threads: int
) -> None:
    trainee = trainee_of(tiny_llama, **changes)
    assert halves(trainee_of(tiny_llama).decoder, batch(20, 20)) is not None
    torch.set_num_threads(threads)
    assert halves(trainee.decoder, batch(*lengths)) is None


def test_a_half_without_a_label_is_no_half(tiny_llama: Path) -> None:
    one = batch(20, 20)
    one.labels_T[20:] = -100
    assert halves(trainee_of(tiny_llama).decoder, one) is None


def test_small_micro_batches_go_undivided(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = trainee_of(tiny_llama).decoder
    numbers = 40 * decoder.config.hidden_size
    for worth, least, divided in ((numbers, 20, True), (numbers + 1, 20, False), (numbers, 21, False)):
        monkeypatch.setattr(module, "WORTH", worth)
        monkeypatch.setattr(module, "LEAST", least)
        assert (halves(decoder, batch(20, 20)) is not None) == divided


def two_of(decoder: Decoder) -> tuple[Batch, Batch]:
    two = halves(decoder, batch(20, 20))
    assert two is not None
    return two


@pytest.mark.parametrize("at_fault", [0, 1])
def test_what_a_half_raises_is_raised(tiny_llama: Path, at_fault: int) -> None:
    decoder = trainee_of(tiny_llama).decoder
    two = two_of(decoder)

    def work(half: Batch) -> torch.Tensor:
        if half is two[at_fault]:
            raise MemoryError("no memory for its scratch space")
        return torch.zeros(())

    with pytest.raises(MemoryError, match="scratch space"):
        add_both(decoder, two, work)
    assert torch.get_num_threads() == 2


def test_the_other_half_is_stopped_and_waited_for(tiny_llama: Path) -> None:
    decoder, running = trainee_of(tiny_llama).decoder, threading.Event()
    two = two_of(decoder)

    def work(half: Batch) -> torch.Tensor:
        if half is two[0]:
            assert running.wait(10)
            raise KeyboardInterrupt  # as the second Ctrl-C does
        running.set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            time.sleep(0.001)
        raise AssertionError("nobody stopped it")

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        add_both(decoder, two, work)
    assert time.monotonic() - began < 8
    assert not [one for one in threading.enumerate() if one.name == "second half"]


def test_ctrl_c_while_the_first_half_waits_for_the_other_stops_it(tiny_llama: Path) -> None:
    decoder, began = trainee_of(tiny_llama).decoder, time.monotonic()
    two, main = two_of(decoder), threading.get_ident()

    def work(half: Batch) -> torch.Tensor:
        if half is two[1]:
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                time.sleep(0.001)
            raise AssertionError("nobody stopped it")
        return torch.zeros(())

    timer = threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT))  # wakes one who waits for a thread
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        add_both(decoder, two, work)
    timer.join()
    assert time.monotonic() - began < 8
    assert not [one for one in threading.enumerate() if one.name == "second half"]
    assert torch.get_num_threads() == 2


def test_a_thread_that_cannot_be_made_leaves_the_threads_as_they_were(tiny_llama: Path) -> None:
    decoder = trainee_of(tiny_llama).decoder
    two, before = two_of(decoder), threading.stack_size(2**56)  # more than any address space has
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            add_both(decoder, two, lambda _: torch.zeros(()))
    finally:
        threading.stack_size(before)
    assert torch.get_num_threads() == 2
