"""A run of packs, with weighted prompts and the longest steps first: it is whole, and goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luthier.data.batches import Batches
from luthier.data.conversation import Example
from luthier.errors import UsageError
from luthier.train.events import StepEvent
from tests.train.test_loop import CrashError, Dies, adapter_bytes, figures, run_it
from tests.train.world import Recorder, Rows, make_rows, make_settings

SETTINGS = make_settings(
    packing=True, max_length=60, longest_first=True, prompt_loss_weight=0.25, batch_size=2, micro_batch=1, dropout=0.1
)


def weighted_rows() -> Rows:
    """Every token trained, those of the prompt at a quarter, as the data stage gives it at a weight of 0.25."""

    def weighted(row: Example) -> Example:
        return replace(row, labels=row.ids, weights=np.where(row.labels == -100, 0.25, 1.0).astype(np.float32))

    rows = make_rows(train=23)
    return replace(rows, train=tuple(map(weighted, rows.train)))


def test_the_steps_are_those_of_the_packs(tiny_llama: Path, tmp_path: Path) -> None:
    rows, listener = weighted_rows(), Recorder()
    run_it(tiny_llama, tmp_path, SETTINGS, rows=rows, listener=listener)
    batches = Batches(rows.train, 2, 1, SETTINGS.seed, capacity=60, longest_first=True)
    steps = [event for event in listener.events if isinstance(event, StepEvent)]
    assert len(steps) == SETTINGS.steps
    for event in steps:
        micro = batches.step(event.step - 1)
        assert event.tokens == sum(batch.tokens for batch in micro)
        assert all(batch.tokens <= 60 for batch in micro)
        assert event.epoch == event.step * 2 / batches.units_per_epoch
    whole = int(batches.steps_per_epoch)
    assert whole > 2
    tokens = [event.tokens for event in steps[:whole]]
    assert tokens == sorted(tokens, reverse=True)


def test_a_packed_run_that_died_and_is_resumed_is_the_same_run(tiny_llama: Path, tmp_path: Path) -> None:
    run_it(tiny_llama, tmp_path / "whole", SETTINGS, rows=weighted_rows())
    for at in (1, 4, 7):
        out = tmp_path / str(at)
        with pytest.raises(CrashError):
            run_it(tiny_llama, out, SETTINGS, rows=weighted_rows(), listener=Dies(at=at))
        run_it(tiny_llama, out, SETTINGS, rows=weighted_rows(), resume=True)
        assert adapter_bytes(out) == adapter_bytes(tmp_path / "whole")
        assert figures(out) == figures(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", [{"packing": False}, {"longest_first": False}, {"prompt_loss_weight": 0.5}, {"train_on": "all"}]
)
def test_another_run_is_told_apart_by_these_settings(
    tiny_llama: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    with pytest.raises(CrashError):
        run_it(tiny_llama, tmp_path, SETTINGS, rows=weighted_rows(), listener=Dies(at=4))
    (name,) = change
    with pytest.raises(UsageError, match=f"{name}: "):
        run_it(tiny_llama, tmp_path, replace(SETTINGS, **change), rows=weighted_rows(), resume=True)  # type: ignore[arg-type]
