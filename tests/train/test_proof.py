"""The proof before the first step: what it measures, that it leaves no trace, how a run that does not fit goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.batches import Batches, pack
from luthier.data.conversation import Example
from luthier.errors import FitError, Interrupted
from luthier.model.decoder import Decoder
from luthier.plan.proof import Adopted, Expected, Load, ladder
from luthier.plan.settings import Settings
from luthier.runs import RunDirectory
from luthier.train.events import ProgressEvent, ProofEvent, WarningEvent
from luthier.train.loop import Hooks, TrainResult, train
from luthier.train.session import Session
from tests import tiny
from tests.train.test_loop import SETTINGS, assert_same_run, run_it
from tests.train.world import (
    Recorder,
    Rows,
    checkpoint,
    events_of,
    make_examples,
    make_rows,
    make_settings,
    tiny_decoder,
)

ROOT = Path(__file__).resolve().parents[2]


def proof_of(listener: Recorder) -> ProofEvent:
    (event,) = [event for event in listener.events if isinstance(event, ProofEvent)]
    return event


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"micro_batch": 4, "checkpointing": 2},
        {"packing": True, "max_length": 64},
        {"precision": "fp16"},
        {"optimizer": "adamw-8bit", "rank": 64, "targets": ("down_proj", "up_proj")},
    ],
    ids=str,
)
def test_a_run_is_bit_for_bit_the_run_without_a_proof(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object]
) -> None:
    settings = make_settings(dropout=0.1, **change)
    proved = run_it(tiny_llama, tmp_path / "proved", settings)
    monkeypatch.setattr(Session, "prove", lambda _: None)
    plain = run_it(tiny_llama, tmp_path / "plain", settings)
    assert len(events_of(tmp_path / "proved" / "events.jsonl", "proof")) == 1
    assert events_of(tmp_path / "plain" / "events.jsonl", "proof") == []
    assert_same_run(tmp_path / "proved", proved, (tmp_path / "plain", plain))


def test_it_takes_the_longest_rows_and_is_held_against_the_prediction(tiny_llama: Path, tmp_path: Path) -> None:
    rows, listener, asked = make_rows(), Recorder(), []

    def forecast(settings: Settings, load: Load) -> Expected:
        asked.append((settings, load))
        return Expected(gib=0.001, seconds=1e6)

    settings = make_settings(micro_batch=3)
    train(
        tiny_decoder(tiny_llama),
        rows,
        settings,
        RunDirectory(tmp_path),
        base="a/model",
        listener=listener,
        hooks=Hooks(forecast=forecast),
    )
    longest = sorted((len(row) for row in rows.train), reverse=True)[:3]
    event = proof_of(listener)
    assert asked == [(settings, Load(sum(longest), longest[0], 3))]
    assert (event.tokens, event.longest, event.documents) == (sum(longest), longest[0], 3)
    assert (event.step, event.micro_batch, event.checkpointing) == (0, 3, 0)
    assert 0 < event.measured_seconds < 100
    assert 0.1 < event.measured_gib < 64, "this process, with torch in it"
    assert event.error == pytest.approx(event.measured_gib / 0.001 - 1)
    assert event.error_seconds == pytest.approx(event.measured_seconds / 1e6 - 1)
    assert [one for one in listener.progress if one.doing == "proof"] == [ProgressEvent("proof", 0, 0, 1, sum(longest))]


def test_the_fullest_packs_are_the_heaviest() -> None:
    examples = make_examples(40, seed=3)
    batches = Batches(examples, 4, 2, 5, capacity=64)
    packs = [unit for step in range(30) for unit in batches.units(step)]
    fullest = sorted({tuple(p.tolist()): sum(len(examples[i]) for i in p) for p in packs}.values())[-2:]
    first_epoch = batches.units_per_epoch
    tokens = sorted(sum(len(examples[i]) for i in p) for p in packs[:first_epoch])
    assert batches.heaviest().tokens == sum(tokens[-2:]) <= sum(fullest)


@dataclass(frozen=True)
class Weighed(Sequence[Example]):
    """Rows that know their lengths and weights."""

    rows: list[Example]
    weights: NDArray[np.float64]

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.array([len(row) for row in self.rows], np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]


def test_a_row_that_is_never_seen_is_not_tried_and_one_that_counts_twice_is_tried_twice() -> None:
    rows = [row for n in (40, 30, 20, 10) for row in make_examples(1, seed=n, shortest=n, longest=n)]
    batches = Batches(Weighed(rows, np.array([0.0, 2.0, 0.5, 1.0])), 3, 3, 5)
    assert batches.heaviest().lengths == (30, 30, 20)


def test_the_longest_rows_are_cut_to_what_a_micro_batch_may_have() -> None:
    """Of the last its end is tried, where the labels are; the plan counts the same."""
    rows = [row for n in (*[100] * 3, *[40] * 50) for row in make_examples(1, seed=n, shortest=n, longest=n)]
    batches = Batches(rows, 8, 4, 5)
    heaviest, plain = batches.heaviest(), pack(rows[:3])
    assert batches.most_tokens == 256, "1.2 times four average rows are 209: up to 256 take no more memory"
    assert heaviest.lengths == (100, 100, 56)
    assert torch.equal(heaviest.ids_T, torch.cat((plain.ids_T[:200], plain.ids_T[244:])))
    assert torch.equal(heaviest.labels_T, torch.cat((plain.labels_T[:200], plain.labels_T[244:])))
    assert all(batches.step(step)[0].tokens <= heaviest.tokens for step in range(20))


def test_fewer_rows_than_a_micro_batch_come_again() -> None:
    """As they do in the batches of such a run."""
    rows = [row for n in (40, 30, 20) for row in make_examples(1, seed=n, shortest=n, longest=n)]
    for capacity in (None, 40):
        batches = Batches(rows, 8, 8, 5, capacity=capacity)
        assert batches.heaviest().lengths == (40, 30, 20, 40, 30, 20, 40, 30)
        assert batches.heaviest().tokens >= batches.step(0)[0].tokens


def test_the_ladder_recomputes_first_and_then_cuts_the_batch() -> None:
    def rungs(layers: int, **settings: object) -> list[tuple[int, int]]:
        found = ladder(make_settings(**settings), layers)
        assert {replace(one, micro_batch=1, checkpointing=0) for one in found} <= {
            replace(make_settings(**settings), micro_batch=1, checkpointing=0)
        }
        return [(one.micro_batch, one.checkpointing) for one in found]

    assert rungs(5, batch_size=8, micro_batch=4) == [(4, 3), (4, 4), (4, 5), (2, 5), (1, 5)]
    assert rungs(5, batch_size=8, micro_batch=4, checkpointing=4) == [(4, 5), (2, 5), (1, 5)]
    assert rungs(2, batch_size=1, micro_batch=1) == [(1, 1), (1, 2)]
    assert rungs(1, batch_size=6, micro_batch=6, checkpointing=1) == [(3, 1), (1, 1)]
    assert rungs(4, batch_size=12, micro_batch=9, checkpointing=4) == [(4, 4), (2, 4), (1, 4)]
    assert rungs(2, batch_size=2, micro_batch=64, checkpointing=2) == [(1, 2)]
    assert rungs(2, batch_size=7, micro_batch=7, checkpointing=2) == [(1, 2)]
    assert rungs(2, batch_size=4, micro_batch=1, checkpointing=2) == []


@dataclass
class Narrow:
    """A device that has no memory for more than `tokens` at once with less than `recomputed` layers recomputed."""

    decoder: Decoder
    tokens: int
    recomputed: int = 0
    error: Callable[[], Exception] = lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    seen: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hidden = self.decoder.hidden
        self.decoder.hidden = self.checked  # type: ignore[method-assign]

    def checked(self, ids_T: Tensor, *others: object, **named: object) -> Tensor:
        hidden_nD: Tensor = self.hidden(ids_T, *others, **named)  # type: ignore[arg-type]
        tokens = ids_T.shape[0]
        if self.decoder.training and torch.is_grad_enabled():
            self.seen.append((tokens, self.decoder.checkpointing))
            if tokens > self.tokens or self.decoder.checkpointing < self.recomputed:
                raise self.error()
        return hidden_nD


ROWS = Rows(
    tuple(make_examples(16, seed=7, shortest=64, longest=64)),
    tuple(make_examples(4, seed=8, first_row=16)),
    make_rows(16, 4).places,
)
"""Every row has 64 tokens, a number that no kernels want filled up."""


def narrow_run(
    folder: Path, out: Path, settings: Settings, tokens: int, recomputed: int, *, resume: bool = False
) -> tuple[TrainResult, Recorder, list[Adopted], Narrow]:
    decoder, listener, adopted = tiny_decoder(folder), Recorder(), []
    device = Narrow(decoder, tokens, recomputed)
    hooks = Hooks(adopt=adopted.append)
    result = train(
        decoder, ROWS, settings, RunDirectory(out), base="a/model", listener=listener, resume=resume, hooks=hooks
    )
    return result, listener, adopted, device


@pytest.mark.parametrize(
    ("tokens", "recomputed", "fits"),
    [
        (256, 1, {"micro_batch": 4, "checkpointing": 2}),
        (256, 3, {"micro_batch": 4, "checkpointing": 3}),
        (128, 0, {"micro_batch": 2, "checkpointing": 3}),
        (64, 0, {"micro_batch": 1, "checkpointing": 3}),
    ],
)
def test_out_of_memory_steps_down_to_what_fits(
    tiny_llama: Path, tmp_path: Path, tokens: int, recomputed: int, fits: dict[str, int]
) -> None:
    """The run is then the one that was planned so from the start, and goes on as such."""
    planned = make_settings(micro_batch=4, dropout=0.1)
    smaller = replace(planned, **fits)  # type: ignore[arg-type]
    result, listener, adopted, device = narrow_run(tiny_llama, tmp_path / "run", planned, tokens, recomputed)
    assert [one.settings for one in adopted] == [smaller]
    assert adopted[0].load == Load(64 * smaller.micro_batch, 64, smaller.micro_batch)
    assert "micro_batch 4 and 0 of 3 layers recomputed" in adopted[0].reason
    warnings = [event.message for event in listener.events if isinstance(event, WarningEvent)]
    rungs = [planned, *ladder(planned, 3)]
    assert len(warnings) == rungs.index(smaller)
    assert warnings[0].startswith("out of memory with micro_batch 4 and 0 of 3 layers recomputed (256 tokens at once)")
    assert (proof_of(listener).micro_batch, proof_of(listener).checkpointing) == tuple(fits.values())
    assert device.seen[0] == (256, 0)
    cut = smaller.micro_batch < 4
    assert warnings[-1].endswith("the same batches and gradient" + (", but for dropout's masks" if cut else ""))
    expected = run_it(tiny_llama, tmp_path / "planned", smaller, rows=ROWS)
    assert_same_run(tmp_path / "run", result, (tmp_path / "planned", expected))
    again, *_ = narrow_run(tiny_llama, tmp_path / "run", smaller, tokens, recomputed, resume=True)
    assert_same_run(tmp_path / "run", again, (tmp_path / "planned", expected))


def test_what_is_adopted_is_told_before_anything_is_trained(tiny_llama: Path, tmp_path: Path) -> None:
    decoder, seen = tiny_decoder(tiny_llama), []
    Narrow(decoder, 128)

    def adopt(_: Adopted) -> None:
        seen.extend(line["event"] for line in events_of(tmp_path / "events.jsonl"))

    settings, hooks = make_settings(micro_batch=4), Hooks(adopt=adopt)
    train(decoder, ROWS, settings, RunDirectory(tmp_path), base="a/model", listener=Recorder(), hooks=hooks)
    assert seen == ["start", "warning", "warning", "warning"]


def test_nothing_that_fits_is_said_so(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(FitError) as caught:
        narrow_run(tiny_llama, tmp_path, make_settings(micro_batch=4), 39, 0)
    assert caught.value.exit_code == 4
    assert caught.value.message == "the largest micro-batch, before the first step: out of memory on cpu"
    assert caught.value.remedy is not None
    assert caught.value.remedy.startswith("quantize: nf4 or a train.max_length below 128; ")
    assert not (tmp_path / "checkpoints").exists()


def test_another_fault_is_raised_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    decoder = tiny_decoder(tiny_llama)
    device = Narrow(decoder, 39, error=lambda: RuntimeError("CUDA error: unspecified launch failure"))
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        train(decoder, ROWS, SETTINGS, RunDirectory(tmp_path), base="a/model", listener=Recorder())
    assert len(device.seen) == 1


def test_rows_without_a_label_are_proved_too(tiny_llama: Path, tmp_path: Path) -> None:
    """The longest row teaches nothing: no reason to stop."""
    rows = make_rows()
    longest = max(rows.train, key=len)
    longest.labels[:] = -100
    listener = Recorder()
    run_it(tiny_llama, tmp_path, make_settings(micro_batch=1, batch_size=11), rows=rows, listener=listener)
    assert proof_of(listener).tokens == len(longest)


@dataclass
class Stops(Recorder):
    """Sends the process a signal while something is being done."""

    doing: str = "proof"
    step: int = 0

    def on_progress(self, event: ProgressEvent) -> None:
        super().on_progress(event)
        if (event.doing, event.step) == (self.doing, self.step) and event.done < event.total:
            signal.raise_signal(signal.SIGINT)
            self.doing = "nothing"


LONG_EVAL = Rows(
    make_rows().train,
    tuple(make_examples(300, seed=9, shortest=30, longest=40, first_row=11)),
    make_rows(11, 300).places,
)
"""Held-out rows enough for three groups."""


@pytest.mark.parametrize(("doing", "step"), [("proof", 0), ("evaluation", 0), ("evaluation", 3), ("evaluation", 8)])
def test_a_signal_in_between_is_obeyed_and_the_run_is_the_same(
    tiny_llama: Path, tmp_path: Path, doing: str, step: int
) -> None:
    listener = Stops(doing=doing, step=step)
    with pytest.raises(Interrupted, match=f"stopped after step {step} of 8"):
        run_it(tiny_llama, tmp_path / "run", listener=listener, rows=LONG_EVAL)
    evaluated = [line["step"] for line in events_of(tmp_path / "run" / "events.jsonl", "eval")]
    assert step not in evaluated
    again = Recorder()
    result = run_it(tiny_llama, tmp_path / "run", listener=again, rows=LONG_EVAL, resume=True)
    assert len([event for event in again.events if isinstance(event, ProofEvent)]) == (1 if step == 0 else 0)
    expected = run_it(tiny_llama, tmp_path / "whole", rows=LONG_EVAL)
    assert_same_run(tmp_path / "run", result, (tmp_path / "whole", expected))


def test_the_run_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    result = run_it(tiny_llama, tmp_path)
    found, steps = result.measured, events_of(tmp_path / "events.jsonl", "step")
    assert set(found.peaks) == {"load", "train", "evaluate"}
    assert all(0.1 < gib < 64 for gib in found.peaks.values())
    assert found.step_seconds is not None
    assert found.step_seconds == pytest.approx(fmean(s["seconds"] for s in steps[1:]))  # type: ignore[misc]
    assert found.tokens_per_second == pytest.approx(result.tokens / sum(s["seconds"] for s in steps))  # type: ignore[misc]
    assert found.proof is not None
    assert found.proof.measured_gib == events_of(tmp_path / "events.jsonl", "proof")[0]["measured_gib"]


LIMITED = """
import re, resource, sys
from pathlib import Path
from luthier.runs import RunDirectory
from luthier.train.loop import train
from tests.train.world import Recorder, Rows, make_examples, make_rows, make_settings, tiny_decoder
rows = Rows(tuple(make_examples(8, seed=1, shortest=256, longest=256)), (), make_rows(8, 0).places)
decoder = tiny_decoder(Path(sys.argv[1]))
settings = make_settings(micro_batch=8, batch_size=8, steps=1, warmup_steps=0, max_length=256)
size = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20, -1))
train(decoder, rows, settings, RunDirectory(Path(sys.argv[2])), base="a/model", listener=Recorder())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the limit is set from what Linux's /proc says")
def test_a_process_that_really_runs_out_of_memory_goes_on_with_less(tmp_path: Path) -> None:
    """RLIMIT_AS, 300 MiB above the loaded model, whose layers keep twice as much: allocators really fail, torch's or
    oneDNN's, and what they had given is free again for the next rung."""
    folder = tiny.make_model(tmp_path / "model", hidden_size=240, intermediate_size=2560, num_hidden_layers=12)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = events_of(tmp_path / "run" / "events.jsonl", "warning", "proof", "step")
    assert [line["event"] for line in lines][-2:] == ["proof", "step"]
    assert str(lines[0]["message"]).startswith("out of memory with micro_batch 8 and 0 of 12 layers recomputed (2,048 ")
    assert lines[-2]["checkpointing"] != 0
    state = json.loads((checkpoint(tmp_path / "run") / "state.json").read_text())
    for name in ("micro_batch", "checkpointing"):
        assert state["identity"]["settings"][name] == lines[-2][name]
