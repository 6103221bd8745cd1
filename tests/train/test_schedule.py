"""The learning rate is transformers', step for step, and what its docstring says."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from luthier.plan.settings import Schedule as ScheduleName
from luthier.train.schedule import SCHEDULES, learning_rate


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(37, 0), (37, 5), (11, 11), (1, 0), (7, 20)])
def test_every_step_has_the_rate_of_transformers(schedule: ScheduleName, steps: int, warmup: int) -> None:
    peak = 3.7e-4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    if schedule == "constant":
        theirs = transformers.get_constant_schedule_with_warmup(optimizer, warmup)
    elif schedule == "linear":
        theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    else:
        theirs = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    for done in range(steps):
        ours = learning_rate(schedule, done=done, peak=peak, warmup_steps=warmup, steps=steps)
        # both evaluate the same formula in float64, in another order of at most six operations: 6 ulp, absolute at
        # the scale of the peak because cosine subtracts near its end
        assert ours == pytest.approx(theirs.get_last_lr()[0], rel=6 * 2**-52, abs=6 * 2**-52 * peak)
        optimizer.step()
        theirs.step()


@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    steps=st.integers(1, 10_000),
    warmup=st.integers(0, 500),
    share=st.floats(0, 1),
)
def test_the_rate_lies_between_zero_and_the_peak(schedule: ScheduleName, steps: int, warmup: int, share: float) -> None:
    rate = learning_rate(schedule, done=int(share * steps), peak=2e-4, warmup_steps=warmup, steps=steps)
    assert 0.0 <= rate <= 2e-4


def test_cosine_is_half_way_down_in_the_middle_and_zero_at_the_end() -> None:
    middle = learning_rate("cosine", done=60, peak=1.0, warmup_steps=20, steps=100)
    end = learning_rate("cosine", done=100, peak=1.0, warmup_steps=20, steps=100)
    assert math.isclose(middle, 0.5)
    assert end == 0.0
