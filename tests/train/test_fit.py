"""Out of memory while training: said as what it is, with the step, the checkpoint that is left, and what to change."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from luthier.errors import FitError
from luthier.model.decoder import Decoder
from luthier.runs import RunDirectory
from luthier.train.events import StepEvent
from luthier.train.loop import train
from tests.train.test_loop import SETTINGS, assert_same_run, run_it
from tests.train.world import Recorder, events_of, make_rows, tiny_decoder

CPU_ALLOCATOR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
)
METAL = RuntimeError(
    "MPS backend out of memory (MPS allocated: 17 GiB, other allocations: 1 GiB, max allowed: 18 GiB)."
)


@dataclass
class Fills(Recorder):
    """After `at` updates the last norm runs out of memory, in training or only in evaluation. (A layer that is written
    by hand is not called as a module.)"""

    decoder: Decoder | None = None
    error: Exception | None = None
    at: int = 0
    training: bool = True

    def on_step(self, event: StepEvent) -> None:
        super().on_step(event)
        if event.step == self.at and self.decoder is not None:
            self.decoder.model.norm.register_forward_hook(self.fail)

    def fail(self, norm: nn.Module, *_: object) -> None:
        if norm.training == self.training and self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), CPU_ALLOCATOR, METAL, MemoryError()], ids=repr
)
def test_a_step_that_does_not_fit(tiny_llama: Path, tmp_path: Path, error: Exception) -> None:
    decoder = tiny_decoder(tiny_llama)
    listener = Fills(decoder=decoder, error=error, at=3)
    with pytest.raises(FitError) as caught:
        train(decoder, make_rows(), SETTINGS, RunDirectory(tmp_path), base="a/model", listener=listener)
    assert caught.value.exit_code == 4
    assert caught.value.__cause__ is error
    assert caught.value.message == "step 4: out of memory on cpu; the last checkpoint, of step 3, is whole"  # the best
    assert caught.value.remedy == (
        "train.micro_batch: 1 or less (the result is the same), train.checkpointing: true, quantize: nf4 "
        "or a train.max_length below 128; it is then another run, with a directory of its own (--out)"
    )
    assert listener.closed == 1
    assert events_of(tmp_path / "events.jsonl", "step")[-1]["step"] == 3
    resumed, expected = run_it(tiny_llama, tmp_path, resume=True), run_it(tiny_llama, tmp_path / "whole")
    assert_same_run(tmp_path, resumed, (tmp_path / "whole", expected))


def test_only_what_is_not_done_yet_is_advised(tiny_llama: Path, tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_llama)
    listener = Fills(decoder=decoder, error=torch.OutOfMemoryError("CUDA out of memory."), at=1)
    small = replace(SETTINGS, micro_batch=1, checkpointing=3, device="mps")
    with pytest.raises(FitError, match=r"step 2: out of memory on mps$") as caught:
        train(decoder, make_rows(), small, RunDirectory(tmp_path), base="a/model", listener=listener)
    assert str(caught.value.remedy).startswith("a train.max_length below 128; ")


def test_an_evaluation_that_does_not_fit(tiny_llama: Path, tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_llama)
    error = torch.OutOfMemoryError("CUDA out of memory.")
    listener = Fills(decoder=decoder, error=error, at=3, training=False)
    with pytest.raises(FitError, match=r"step 3, measuring the held-out loss: out of memory .* of step 2") as caught:
        train(decoder, make_rows(), SETTINGS, RunDirectory(tmp_path), base="a/model", listener=listener)
    assert str(caught.value.remedy).startswith("quantize: nf4 or a train.max_length below 128; ")


def test_another_fault_is_not_called_a_lack_of_memory(tiny_llama: Path, tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_llama)
    listener = Fills(decoder=decoder, error=RuntimeError("CUDA error: unspecified launch failure"), at=1)
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        train(decoder, make_rows(), SETTINGS, RunDirectory(tmp_path), base="a/model", listener=listener)
