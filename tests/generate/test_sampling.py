"""Sampling against transformers' own logits processors, alone and in its order."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from luthier.errors import UsageError
from luthier.generate.sampling import SamplingSpec, make_generator, sample, shape_logits

HISTORY = (3, 17, 17, 2, 90, 40)


def reference(spec: SamplingSpec, logits: torch.Tensor, history: tuple[int, ...]) -> torch.Tensor:
    """What transformers' generate builds for these settings, in its order."""
    steps = LogitsProcessorList()
    if spec.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(spec.repetition_penalty))
    if spec.temperature not in (0.0, 1.0):
        steps.append(TemperatureLogitsWarper(spec.temperature))
    if spec.temperature and spec.top_k:
        steps.append(TopKLogitsWarper(spec.top_k))
    if spec.temperature and spec.top_p < 1.0:
        steps.append(TopPLogitsWarper(spec.top_p))
    if spec.temperature and spec.min_p:
        steps.append(MinPLogitsWarper(spec.min_p))
    return steps(torch.tensor([history]), logits[None].clone())[0]


@pytest.mark.parametrize(
    "spec",
    [
        SamplingSpec(temperature=0.0, repetition_penalty=1.3),
        SamplingSpec(temperature=0.7),
        SamplingSpec(temperature=1.0, top_k=7),
        SamplingSpec(temperature=1.0, top_p=0.83),
        SamplingSpec(temperature=1.0, top_p=0.0),
        SamplingSpec(temperature=1.0, top_k=5000),
        SamplingSpec(temperature=1.0, min_p=0.07),
        SamplingSpec(temperature=1.3, min_p=1.0),
        SamplingSpec(temperature=1.2, top_p=0.95, top_k=40, repetition_penalty=1.1, min_p=0.02),
        SamplingSpec(temperature=1.6, top_p=0.9, top_k=11, repetition_penalty=0.8),
        SamplingSpec(temperature=0.3, top_p=0.5, top_k=50, repetition_penalty=1.7),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_logits_are_those_of_transformers(spec: SamplingSpec, seed: int) -> None:
    logits = torch.randn(101, generator=torch.Generator().manual_seed(seed)) * 4
    before = logits.clone()
    # The same operations in the same order on the same fp32 values: no rounding to allow for.
    assert torch.equal(shape_logits(logits, HISTORY, spec), reference(spec, logits, HISTORY))
    assert torch.equal(logits, before)


LARGE = 128_256
"""Llama 3's vocabulary."""


def by_sorting(logits: torch.Tensor, p: float) -> torch.Tensor:
    """transformers' top-p on one row, warped by nothing else."""
    return TopPLogitsWarper(p)(torch.tensor([[0]]), logits[None].clone())[0]


@st.composite
def large_logits(draw: st.DrawFn) -> torch.Tensor:
    """Flat and peaked, with equal values, and with many that are ruled out already."""
    size = draw(st.sampled_from([1025, 5000, 20_000]))
    logits = torch.randn(size, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    logits = logits * draw(st.sampled_from([0.0, 0.01, 1.0, 3.0, 6.0, 30.0])) + draw(
        st.sampled_from([0.0, -300.0, 88.0])
    )
    step = draw(st.sampled_from([0.0, 0.5, 4.0]))
    if step:
        logits = (logits / step).round() * step  # as 16-bit logits have them, only more so
    for place in draw(st.lists(st.integers(0, size - 1), max_size=4)):
        logits[place] = draw(st.sampled_from([20.0, 40.0, 1e4]))
    if draw(st.booleans()):
        logits[torch.topk(logits, draw(st.sampled_from([1, 40, 600]))).indices[-1] :] = -math.inf
    return logits


@hypothesis.settings(deadline=None)
@given(
    logits=large_logits(), p=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1 - 1e-7]) | st.floats(0, 0.9999)
)
def test_top_p_of_a_large_vocabulary_is_that_of_the_sort(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(shape_logits(logits, (), SamplingSpec(temperature=1.0, top_p=p)), by_sorting(logits, p))


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_top_p_at_its_very_edge(p: float) -> None:
    """Shares that sum to p but for a rounding: there the sort alone knows, and it is asked."""
    shares = torch.full((LARGE,), 1e-12)
    shares[:20] = p / 20
    shares[20:40] = (1 - p) / 20
    for nudge in (0.0, 1e-9, -1e-9, 1e-7, -1e-7, 1e-5, -1e-5, 1e-3):
        logits = shares.log()
        logits[19] += nudge
        assert torch.equal(shape_logits(logits, (), SamplingSpec(temperature=1.0, top_p=p)), by_sorting(logits, p))


def test_a_peaked_vocabulary_is_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(LARGE, generator=torch.Generator().manual_seed(0)) * 6
    wanted = by_sorting(logits, 0.9)
    monkeypatch.setattr(torch, "sort", lambda *_, **__: pytest.fail("sorted"))
    assert torch.equal(shape_logits(logits, (), SamplingSpec(temperature=1.0, top_p=0.9)), wanted)


def test_ties_at_the_edge_of_top_k_stay_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.5])
    spec = SamplingSpec(temperature=1.0, top_k=2)
    assert torch.equal(shape_logits(logits, (), spec), reference(spec, logits, (0,)))


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.3])
    spec = SamplingSpec(temperature=1.3, top_k=3, seed=5)
    generator = make_generator(spec, torch.device("cpu"))
    drawn = torch.tensor([sample(logits, (), spec, generator) for _ in range(4000)])
    wanted = shape_logits(logits, (), spec).softmax(-1)
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    # Four standard deviations of a share of 4000 draws are at most 4 * sqrt(0.25 / 4000) = 0.032.
    assert (share - wanted).abs().max() < 0.032
    assert share[1] == 0
    assert share[3] == 0


def test_only_what_is_left_is_drawn_to_the_last_place() -> None:
    """The ends of the running sum, where nothing or all lies below."""
    logits = torch.full((9,), -math.inf)
    logits[4] = 1.0
    spec = SamplingSpec(temperature=1.0)
    assert {sample(logits, (), spec, make_generator(SamplingSpec(seed=i), torch.device("cpu"))) for i in range(50)} == {
        4
    }
    logits[5] = -70.0  # a share of 1e-31 behind one of 1, which it does not change
    assert {sample(logits, (), spec, make_generator(SamplingSpec(seed=i), torch.device("cpu"))) for i in range(50)} == {
        4
    }


def test_the_seed_decides() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1))

    def drawn(seed: int) -> list[int]:
        spec = SamplingSpec(temperature=1.0, seed=seed)
        generator = make_generator(spec, torch.device("cpu"))
        return [sample(logits, (), spec, generator) for _ in range(20)]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 1.1}, "top-p"),
        ({"top_k": -1}, "top-k"),
        ({"min_p": 1.01}, "min-p"),
        ({"min_p": float("nan")}, "min-p"),
        ({"repetition_penalty": 0.0}, "repetition penalty"),
        ({"repetition_penalty": 1e-45}, "repetition penalty"),
        ({"repetition_penalty": float("nan")}, "repetition penalty"),
        ({"seed": 99999999999999999999999}, "seed .* between -9223372036854775808 and 18446744073709551615"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
    ],
)
def test_values_that_mean_nothing_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        SamplingSpec(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [1e-45, 1e-20, 9.9e-5])
def test_next_to_no_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([30.0, 55.0, 54.999, -40.0])
    spec = SamplingSpec(temperature=temperature, top_p=0.9)
    generator = make_generator(spec, torch.device("cpu"))
    assert torch.equal(shape_logits(logits, (), spec), logits)
    assert [sample(logits, (), spec, generator) for _ in range(5)] == [1] * 5


@pytest.mark.parametrize("penalty", [1e-3, 1e3])
@pytest.mark.parametrize("temperature", [1e-4, 1e30])
def test_every_setting_that_is_taken_gives_probabilities(temperature: float, penalty: float) -> None:
    logits = torch.randn(101, generator=torch.Generator().manual_seed(4)) * 100
    spec = SamplingSpec(temperature=temperature, repetition_penalty=penalty)
    shaped = shape_logits(logits, HISTORY, spec)
    assert torch.isfinite(shaped).all()
    assert 0 <= sample(logits, HISTORY, spec, make_generator(spec, torch.device("cpu"))) < 101


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_every_seed_that_is_taken_seeds(seed: int) -> None:
    spec = SamplingSpec(temperature=1.0, seed=seed)
    logits = torch.zeros(50)
    one, two = (make_generator(spec, torch.device("cpu")) for _ in range(2))
    drawn = [sample(logits, (), spec, one) for _ in range(9)]
    assert drawn == [sample(logits, (), spec, two) for _ in range(9)]
