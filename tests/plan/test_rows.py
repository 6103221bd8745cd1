"""Choices about the rows: a length that a thin tail does not dictate, packs as the unit, what is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.batches import Batches
from luthier.data.conversation import Example
from luthier.data.epochs import Epochs
from luthier.errors import DataError, UsageError
from luthier.plan.choose import DataFacts, Epoch, Lengths, choose
from luthier.plan.decision import DEFAULT, YOURS
from tests.plan.test_choose import CPU, FAR, H100, SPRIG, recipe


def facts_of(lengths: Sequence[int], held_out: int = 5, weights: Sequence[float] | None = None) -> DataFacts:
    """As the command line makes them; what is longer than the limit is cut."""
    array = np.array(lengths, dtype=np.int32)
    counted = None if weights is None else np.array(weights, dtype=np.float64)

    def epoch(max_length: int, packing: bool) -> Epoch:
        capacity = max_length if packing else None
        cut = np.minimum(array, max_length)
        epochs = Epochs(len(array), 0, weights=counted, lengths=cut, capacity=capacity)
        return Epoch(epochs.rows, epochs.tokens, epochs.units if packing else None)

    return DataFacts(len(lengths), held_out, Lengths.of(lengths), 1000, epoch)


def packed(**train: object) -> dict[str, object]:
    return {"packing": True, **train}


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.sampled_from([1, 25, 50, 90, 99, 99.9, 100]))
def test_percentiles_are_those_of_the_rows(lengths: list[int], percent: float) -> None:
    counted = Lengths.of(lengths)
    assert counted.rows == len(lengths)
    assert counted.longest == max(lengths)
    assert counted.percentile(percent) == np.percentile(lengths, percent, method="inverted_cdf")
    assert counted.longer_than(100) == sum(length > 100 for length in lengths)


def test_no_rows_have_no_lengths() -> None:
    nothing = Lengths.of([])
    assert (nothing.rows, nothing.longest, nothing.percentile(50), nothing.longer_than(0)) == (0, 0, 0, 0)


TAIL = [100] * 1996 + [90] * 2000 + [1999, 2000]
"""99.9 % of 3,998 rows are the 3,995 shortest."""


def test_a_thin_tail_does_not_decide_the_length() -> None:
    plan = choose(recipe(), CPU, SPRIG, facts_of(TAIL))
    assert plan.settings.max_length == 128  # 100, rounded up to a multiple of 64
    decision = plan.decision("train.max_length")
    assert "99.9 % of all rows have at most 100" in decision.reason
    assert "2 rows are longer and are cut at the end" in decision.reason
    assert "train.max_length: 2000" in decision.reason
    assert "2 rows are longer and are cut at the end. What is cut" in plan.decision("long_rows").reason
    fates = {"drop": "left out", "split": "cut into several"}
    for policy, fate in fates.items():
        other = choose(recipe(long_rows=policy), CPU, SPRIG, facts_of(TAIL))
        assert other.settings.max_length == 128
        assert f"2 rows are longer and are {fate}" in other.decision("train.max_length").reason


def test_a_tail_is_kept_where_it_is_not_thin_or_must_not_be_cut() -> None:
    assert choose(recipe(long_rows="error"), CPU, SPRIG, facts_of(TAIL)).settings.max_length == 2000
    assert choose(recipe(), CPU, SPRIG, facts_of([*TAIL, 1998, 1997])).settings.max_length == 128  # four of 4,000
    assert choose(recipe(), CPU, SPRIG, facts_of([*TAIL, 1998, 1997, 1996])).settings.max_length == 2000
    four = [100] * 3999 + [400]
    assert choose(recipe(), CPU, SPRIG, facts_of(four)).settings.max_length == 400
    assert choose(recipe(), CPU, SPRIG, facts_of([*four[:-1], 401])).settings.max_length == 128
    short = choose(recipe(), CPU, SPRIG, facts_of([1] * 3999 + [9]))  # 64 would be more than the longest
    assert short.settings.max_length == 9
    assert "nothing is cut" in short.decision("train.max_length").reason


def test_what_the_model_does_not_reach_is_counted() -> None:
    plan = choose(recipe(), CPU, SPRIG, facts_of([1500, 2500, 3000]))
    assert plan.settings.max_length == 2048
    assert "2 rows are longer and are cut" in plan.decision("train.max_length").reason
    far_tail = choose(recipe(), CPU, SPRIG, facts_of([1000] * 3999 + [9000]))
    assert far_tail.settings.max_length == 1024
    beyond = choose(recipe(), CPU, SPRIG, facts_of([2040] * 3999 + [9000]))  # rounded up it would be 2,048, the reach
    assert beyond.settings.max_length == 2048


def test_your_length_says_what_it_does() -> None:
    plan = choose(recipe(train={"max_length": 95}, long_rows="drop"), CPU, SPRIG, facts_of(TAIL))
    decision = plan.decision("train.max_length")
    assert decision.source == YOURS
    assert "1,998 rows are longer and are left out" in decision.reason
    one = choose(recipe(train={"max_length": 1999}), CPU, SPRIG, facts_of(TAIL))
    assert "1 row is longer and is cut at the end" in one.decision("train.max_length").reason


def test_packs_are_off_unless_asked_for() -> None:
    lengths = [50] * 400
    auto = choose(recipe(), CPU, SPRIG, facts_of(lengths))
    yours = choose(recipe(train={"packing": False}), CPU, SPRIG, facts_of(lengths))
    assert auto.settings.packing is yours.settings.packing is False
    assert "without padding" in auto.decision("train.packing").reason
    assert yours.decision("train.packing").source == YOURS


def test_packs_are_the_unit_of_batches_steps_and_epochs() -> None:
    lengths = np.random.default_rng(0).integers(60, 200, 4000).tolist()
    facts = facts_of(lengths)
    packs = facts.epoch(2048, True).packs
    assert packs is not None
    plan = choose(recipe(train=packed()), CPU, SPRIG, facts)
    got = plan.settings
    assert (got.packing, got.max_length) == (True, 2048)
    assert got.batch_size == round(16 / (4000 / packs)) == 1  # the 16 rows that a step would have without
    assert got.steps == math.ceil(3 * packs)
    assert got.micro_batch == 1
    filled = sum(lengths) / (packs * 2048)
    assert f"{packs} packs (4,000 rows), {filled:.1%} filled" in plan.decision("train.packing").reason
    assert f"3 epochs of {packs} packs, 1 a step" in plan.decision("train.steps").reason
    assert f"{packs} packs" in plan.decision("train.batch_size").reason
    assert "full pack" in plan.decision("train.micro_batch").reason
    set_by_you = choose(recipe(train=packed(batch_size=6, steps=50)), H100, SPRIG, facts)
    assert "50 steps of 6 packs" in set_by_you.decision("train.epochs").reason
    assert "penalty at large batches" in set_by_you.decision("train.batch_size").reason  # 80 rows or so a step
    few = choose(recipe(train=packed(batch_size=9)), CPU, SPRIG, facts_of([500] * 12))
    assert "There are only 3 packs" in few.decision("train.batch_size").reason


def test_evaluations_of_packs_are_as_many_as_of_their_rows() -> None:
    lengths = [100] * 4000
    plain = choose(recipe(train={"steps": 200, "batch_size": 20}), CPU, SPRIG, facts_of(lengths, held_out=200))
    packs = choose(recipe(train=packed(steps=200, batch_size=1)), CPU, SPRIG, facts_of(lengths, held_out=200))
    assert plain.settings.eval_every == pytest.approx(packs.settings.eval_every, rel=0.2)  # as many tokens a step
    assert plain.settings.eval_every > 20


def test_the_length_of_a_pack() -> None:
    rows = [50] * 100
    assert choose(recipe(train=packed()), CPU, SPRIG, facts_of(rows)).settings.max_length == 2048
    near = choose(recipe(train=packed()), CPU, FAR, facts_of([*rows, 3000]))
    assert near.settings.max_length == 3000
    assert choose(recipe(train=packed(max_length=77)), CPU, SPRIG, facts_of(rows)).settings.max_length == 77
    tail = choose(recipe(train=packed()), CPU, FAR, facts_of([*TAIL, 5000]))
    assert tail.settings.max_length == 2048
    assert "1 row is longer" in tail.decision("train.max_length").reason


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(2, 64), min_size=1, max_size=80),
    st.integers(1, 16),
    st.sampled_from([0.25, 1, 1.5, 3]),
    st.sampled_from([None, 0.5, 2.0]),
    st.booleans(),
)
def test_a_run_ends_within_a_batch_of_the_epochs_asked_for(
    lengths: list[int], batch_size: int, epochs: float, weight: float | None, packing: bool
) -> None:
    """By the stream of packs itself, as training makes it from the plan's settings."""
    weights = [1.0 if weight is None or i % 2 else weight for i in range(len(lengths))]
    asked = recipe(train={"epochs": epochs, "batch_size": batch_size, "packing": packing, "max_length": 64})
    got = choose(asked, CPU, SPRIG, facts_of(lengths, weights=weights)).settings

    class Rows(list[Example]):
        lengths: np.ndarray
        weights: np.ndarray

    rows = Rows(Example(np.zeros(n, np.int32), np.zeros(n, np.int32), row) for row, n in enumerate(lengths))
    rows.lengths, rows.weights = np.array(lengths, np.int32), np.array(weights)
    capacity = got.max_length if got.packing else None
    stream = Batches(rows, got.batch_size, got.micro_batch, got.seed, capacity=capacity)
    assert got.steps * batch_size == sum(len(stream.units(step)) for step in range(got.steps))
    assert epochs <= stream.epoch(got.steps)
    assert got.steps == 1 or stream.epoch(got.steps - 1) < epochs


def test_what_is_learned_is_kept_and_explained() -> None:
    plain = choose(recipe(), CPU, SPRIG, facts_of([50] * 9))
    for name in ("train_on", "train.longest_first", "long_rows"):
        assert plain.decision(name).source == DEFAULT
    assert "2405.14394" in plain.decision("prompt_loss_weight").source
    asked = recipe(train_on="last", prompt_loss_weight=0.1, long_rows="split", train={"longest_first": True})
    plan = choose(asked, CPU, SPRIG, facts_of([50] * 9))
    settings_of = asdict(plan.settings)
    assert settings_of["train_on"] == plan.decision("train_on").value == "last"
    assert settings_of["prompt_loss_weight"] == plan.decision("prompt_loss_weight").value == 0.1
    assert settings_of["long_rows"] == plan.decision("long_rows").value == "split"
    assert settings_of["longest_first"] is plan.decision("train.longest_first").value is True
    for name in ("train_on", "prompt_loss_weight", "long_rows", "train.longest_first"):
        assert plan.decision(name).source.startswith(YOURS)
    assert "2507.07817" in plan.decision("prompt_loss_weight").source


def test_rows_that_the_limit_leaves_none_of_are_refused() -> None:
    facts = DataFacts(9, 1, Lengths.of([500] * 10), 100, lambda *_: Epoch(0, 0))
    with pytest.raises(DataError, match="no row is left") as caught:
        choose(recipe(train={"max_length": 100}, long_rows="drop"), CPU, SPRIG, facts)
    assert "train.max_length above 100" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="knows only 2,048"):
        choose(recipe(train=packed(max_length=4096)), CPU, SPRIG, facts)


def test_facts_that_do_not_pack_are_a_defect() -> None:
    facts = DataFacts(9, 1, Lengths.of([50] * 10), 100, lambda *_: Epoch(9, 450))
    with pytest.raises(ValueError, match="packs"):
        choose(recipe(train=packed()), CPU, SPRIG, facts)
