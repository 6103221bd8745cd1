"""On a CPU a micro-batch is taken as two halves at the same time, each with half of the threads.

Between its products a layer has a hundred small things to do, one after another: calls, allocations, thin products.
With all threads at one operation, all but one wait for them (of two cores that train 135M the second stood still for
18 % of the time, sampled). Two halves fill each other's gaps; Python's lock is let go during each operation. What it is
worth (docs/decisions/0012) was measured on two threads only.

Together the halves keep what the whole keeps for its backward pass. What exists for a moment (the chunk of logits, the
backward pass's own, a weight dequantised) each has for itself, each is filled up to a number of rows by itself, and the
adapter's gradients exist twice where an earlier micro-batch left some; plan/memory.py counts it.

The same run gives the same bits: the two gradients of a parameter are added in the order in which they come, and a + b
is b + a in floating point too. That is why there are never more than two, and why what earlier micro-batches left in
`.grad` is put aside meanwhile: (g + a) + b is not (g + b) + a. Dropout draws from one generator, so it goes undivided.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from luthier.data.batches import Batch, in_two
from luthier.model.decoder import Decoder
from luthier.model.lora import lora_parameters
from luthier.model.projection import Adapter
from luthier.recipe.micro_batch import LEAST, WORTH

__all__ = ["add_both", "halves"]

EVEN = 0.55
"""The most tokens of a micro-batch that a half may have. The step waits for the larger half: beyond this it would gain
less than it loses."""


def halves(decoder: Decoder, batch: Batch) -> tuple[Batch, Batch] | None:
    """`batch` in two; None where it goes undivided: elsewhere than on a CPU, with an odd number of threads, with
    dropout, and where it is too small or its documents make no two even halves that have labels each."""
    if decoder.device.type != "cpu" or torch.get_num_threads() % 2 or _drops(decoder):
        return None
    if len(batch.lengths) < 2 or batch.tokens * decoder.config.hidden_size < WORTH:
        return None
    larger, smaller = in_two(batch)
    even = larger.tokens <= EVEN * batch.tokens and smaller.tokens >= LEAST
    return (larger, smaller) if even and larger.labelled and smaller.labelled else None


def _drops(decoder: Decoder) -> bool:
    """Whether its adapters drop inputs; one spec made those of all layers."""
    first = decoder.layers[0].modules()
    return decoder.training and any(isinstance(one, Adapter) and one.dropout > 0 for one in first)


def add_both(decoder: Decoder, two: tuple[Batch, Batch], work: Callable[[Batch], Tensor]) -> Tensor:
    """The sum of `work` of each, both at once; each adds its gradient to those of the decoder's adapters.

    Raises what one of them raises, when the other has ended too.
    """
    leaves, threads = lora_parameters(decoder).values(), torch.get_num_threads()
    before = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    other = _Other(work, two[1], threads // 2)
    torch.set_num_threads(threads // 2)
    try:
        other.start()
        sum_of_first = work(two[0])
        other.wait()  # in here: a Ctrl-C may come while this half waits for the other
    except BaseException:
        other.stop()
        raise
    finally:
        try:
            other.wait()
        finally:
            torch.set_num_threads(threads)
    sum_of_both = sum_of_first + other.result()
    for leaf, former in zip(leaves, before, strict=True):
        if former is not None:
            leaf.grad = former if leaf.grad is None else former.add_(leaf.grad)
    return sum_of_both


class _Other(threading.Thread):
    """Does `work(batch)` with so many of torch's threads (their number is each thread's own)."""

    def __init__(self, work: Callable[[Batch], Tensor], batch: Batch, threads: int) -> None:
        super().__init__(name="second half", daemon=True)
        self._work, self._batch, self._threads = work, batch, threads
        self._done: list[Tensor] = []
        self._error: BaseException | None = None
        self._ended = threading.Event()

    def run(self) -> None:
        try:
            torch.set_num_threads(self._threads)
            self._done.append(self._work(self._batch))
        except BaseException as error:  # noqa: BLE001  handed to the thread that waits, whatever it is
            self._error = error
        finally:
            self._ended.set()

    def stop(self) -> None:
        """Ask it to end at its next line of Python: what it computes is not wanted any more."""
        if self.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(KeyboardInterrupt))

    def wait(self) -> None:
        """Until it has ended, if it ever began.

        `join` alone would not do: when a signal breaks into it, Python before 3.13 takes the thread for ended, and the
        next `join` does not wait. Now and then it is asked whether it lives: `stop` may have hit its last line.
        """
        while self.is_alive():
            if self._ended.wait(1.0):
                self.join()

    def result(self) -> Tensor:
        """What came of it, when it has ended; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._done[0]
