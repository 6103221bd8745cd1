"""A micro-batch in two halves at once: the gradient of the whole, the same bits each time, and no half left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from luthier.data.batches import Batch, pack
from luthier.model.decoder import Decoder
from luthier.train import halves as module
from luthier.train.halves import add_both, halves
from luthier.train.session import make_trainee
from luthier.train.step import Trainee, forward_backward
from tests.train.test_step import gradients, moved
from tests.train.world import make_examples, make_settings, tiny_decoder


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two threads, and no micro-batch too small."""
    monkeypatch.setattr(module, "WORTH", 0)
    monkeypatch.setattr(module, "LEAST", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def batch(*lengths: int, seed: int = 1) -> Batch:
    rows = [make_examples(1, seed=seed + i, shortest=n, longest=n, first_row=i)[0] for i, n in enumerate(lengths)]
    return pack(rows)


def trainee_of(folder: Path, **changes: object) -> Trainee:
    return moved(make_trainee(tiny_decoder(folder), make_settings(**changes)))


def undivided(monkeypatch: pytest.MonkeyPatch, trainee: Trainee, batches: list[Batch]) -> tuple[float, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(module, "WORTH", 2**60)
        return forward_backward(trainee.decoder, batches), gradients(trainee)


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
