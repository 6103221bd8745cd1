"""The operations by hand, in C and in torch, forward and backward, against float64 (exact.py) over awkward shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.kernels.batched import Batched
from luthier.kernels.by_hand import ByHand
from luthier.kernels.native import Native
from tests.kernels import exact
from tests.kernels.libraries import ALL, ops_of

EPS = 1e-5
EXAMPLES = settings(max_examples=25, deadline=None)
pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module", params=ALL)
def ops(request: pytest.FixtureRequest) -> ByHand:
    return ops_of(request.param)


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def angles(tokens: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turn_Td = random(7, tokens, size // 2).repeat(1, 2) * 3
    return turn_Td.cos().to(dtype), turn_Td.sin().to(dtype)


@EXAMPLES
@given(rows=st.integers(1, 40), size=st.integers(1, 700), spread=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rms_norm(ops: ByHand, dtype: torch.dtype, rows: int, size: int, spread: float) -> None:
    x, weight = random(1, rows, size).mul_(spread).to(dtype), random(2, size, dtype=dtype)
    grad, onto = random(3, rows, size, dtype=dtype), random(4, rows, size, dtype=dtype)
    kept = x.clone(), grad.clone(), onto.clone()
    exact.rms_norm(x, weight, EPS).holds(ops.rms_norm(x, weight, EPS))
    exact.rms_norm_backward(grad, x, weight, EPS, None).holds(ops.rms_norm_backward(grad, x, weight, EPS))
    exact.rms_norm_backward(grad, x, weight, EPS, onto).holds(ops.rms_norm_backward(grad, x, weight, EPS, onto))
    assert all(torch.equal(one, was) for one, was in zip((x, grad, onto), kept, strict=True))


@EXAMPLES
@given(tokens=st.integers(1, 90), heads=st.integers(1, 5), half=st.integers(1, 65), back=st.booleans())
def test_rope(ops: ByHand, dtype: torch.dtype, tokens: int, heads: int, half: int, back: bool) -> None:
    x, (cos, sin) = random(1, tokens, heads, 2 * half, dtype=dtype), angles(tokens, 2 * half, dtype)
    wanted = exact.rope(x, cos, sin, back)
    turned = ops.rope(x, cos, sin, back)
    assert turned is x  # in place
    wanted.holds(turned)


@EXAMPLES
@given(rows=st.integers(1, 40), size=st.integers(1, 700), spread=st.sampled_from([0.1, 1.0, 30.0, 300.0]))
def test_swiglu(ops: ByHand, dtype: torch.dtype, rows: int, size: int, spread: float) -> None:
    gate, up = random(1, rows, size).mul_(spread).to(dtype), random(2, rows, size, dtype=dtype)
    grad = random(3, rows, size, dtype=dtype)
    exact.swiglu(gate, up).holds(ops.swiglu(gate, up))
    wanted = exact.swiglu_backward(grad, gate, up)
    product = ops.swiglu_backward(grad, gate, up)  # gate and up become their gradients
    for bounded, ours in zip(wanted, (gate, up, product), strict=True):
        bounded.holds(ours)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[tuple[int, int, int], tuple[int, ...], int | None]:
    """(query heads, key heads, head size), lengths, window."""
    keys = draw(st.integers(1, 3))
    heads = keys * draw(st.integers(1, 4))
    lengths = draw(st.lists(st.one_of(st.integers(1, 70), st.integers(1, 300)), min_size=1, max_size=4))
    return (heads, keys, 2 * draw(st.integers(1, 65))), tuple(lengths), draw(st.none() | st.integers(1, 310))


@EXAMPLES
@given(case=attentions())
def test_attention(
    ops: ByHand, dtype: torch.dtype, case: tuple[tuple[int, int, int], tuple[int, ...], int | None]
) -> None:
    check_attention(ops, dtype, *case)


def check_attention(
    ops: ByHand, dtype: torch.dtype, shape: tuple[int, int, int], lengths: tuple[int, ...], window: int | None
) -> None:
    heads, keys, size = shape
    tokens = sum(lengths)
    inputs = random(1, tokens, heads, size, dtype=dtype), *(random(i, tokens, keys, size, dtype=dtype) for i in (2, 3))
    grad, kept = random(4, tokens, heads, size, dtype=dtype), [x.clone() for x in inputs]
    rounded = isinstance(ops, Batched) and dtype == torch.bfloat16
    wanted = exact.attention(inputs, grad, lengths, window, scores_rounded=rounded)
    o, lse = ops.attention(*inputs, lengths, window)
    wanted["o"].holds(o)
    if isinstance(ops, Native):  # torch's computes the probabilities again
        wanted["lse"].holds(lse)
    gradients = ops.attention_backward(grad, inputs, (o, lse), lengths, window)
    for name, ours in zip(("dq", "dk", "dv"), gradients, strict=True):
        assert ours.dtype == dtype
        wanted[name].holds(ours)
    assert all(torch.equal(x, was) for x, was in zip(inputs, kept, strict=True))


@pytest.mark.parametrize("lengths", [(1,), (1, 1, 1), (60,), (61,), (120, 1), (16, 17, 59), (255, 256)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 2, 16, 17, 60, 256])
def test_attention_at_the_edges_of_its_blocks(
    ops: ByHand, dtype: torch.dtype, lengths: tuple[int, ...], window: int | None
) -> None:
    """Blocks are 60 queries, tiles 6 or 3 rows and 16 columns, and the first key is rounded down to 16."""
    check_attention(ops, dtype, (2, 1, 34), lengths, window)


def test_torch_takes_long_documents_block_by_block(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.kernels.batched.SCORES", 2 * 20 * 50)  # 20 queries of 50 keys and 2 heads
    for window in (None, 7, 33):
        check_attention(Batched(), dtype, (2, 1, 18), (50, 3, 47), window)


@EXAMPLES
@given(
    rows=st.integers(1, 9),
    vocabulary=st.integers(1, 130).map(lambda n: 2 * n - 1) | st.sampled_from([16, 4095, 32003, 70001]),
    weighted=st.booleans(),
    spread=st.sampled_from([0.1, 3.0, 100.0]),
)
def test_cross_entropy(
    ops: Native | Batched, dtype: torch.dtype, rows: int, vocabulary: int, weighted: bool, spread: float
) -> None:
    logits = random(1, rows, vocabulary).mul_(spread).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    weights = random(3, rows).abs() if weighted else None
    loss, gradient = exact.cross_entropy(logits, labels, weights)
    only, same = ops.cross_entropy(logits.clone(), labels, weights, False)
    assert torch.equal(same, logits)  # without a gradient nothing is overwritten
    ours, error = ops.cross_entropy(logits, labels, weights, True)
    assert torch.equal(ours, only)
    assert (ours.dtype, error.dtype) == (torch.float32, dtype)
    loss.holds(ours)
    gradient.holds(error)


def test_a_row_without_any_weight_has_no_gradient(ops: Native | Batched, dtype: torch.dtype) -> None:
    loss, error = ops.cross_entropy(
        random(1, 2, 33, dtype=dtype), torch.tensor([3, 32]), torch.tensor([0.0, 1.0]), True
    )
    assert float(loss[0]) == 0.0
    assert not error[0].any()
    assert error[1].any()


def test_logits_of_minus_infinity_are_tokens_that_cannot_be(ops: Native | Batched, dtype: torch.dtype) -> None:
    """A label among them has an infinite loss, which stops a run (train/step.py)."""
    logits = torch.full((2, 37), -torch.inf, dtype=dtype)
    logits[:, 5] = 2.0
    logits[:, 36] = 2.0
    loss, error = ops.cross_entropy(logits, torch.tensor([5, 6]), None, True)
    assert float(loss[0]) == pytest.approx(0.6931472, rel=1e-6)
    assert float(loss[1]) == torch.inf
    wanted = torch.zeros(37)
    wanted[5], wanted[36] = -0.5, 0.5
    torch.testing.assert_close(error[0].float(), wanted, atol=1e-6, rtol=0)


def test_huge_logits_neither_overflow_nor_lose_the_loss(ops: Native | Batched, dtype: torch.dtype) -> None:
    for size in (1e4, 1e30):
        logits = random(1, 5, 77).mul_(size).to(dtype)
        labels = logits.argmin(1)
        loss, error = ops.cross_entropy(logits.clone(), labels, None, True)
        wanted = (logits.amax(1).double() - logits.amin(1).double()).float()
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
        assert (error.float().gather(1, labels[:, None]) == -1).all()
        assert (error.float().gather(1, logits.argmax(1, keepdim=True)) == 1).all()


def test_huge_scores_choose_one_key(ops: ByHand, dtype: torch.dtype) -> None:
    lengths, tokens = (70, 3), 73
    q, k, v = (
        random(seed, tokens, 2, 18).mul_(spread).to(dtype) for seed, spread in ((1, 300.0), (2, 300.0), (3, 1.0))
    )
    seen = exact.visible(lengths, None)
    scores = torch.einsum("thd,shd->hts", q.double(), k.double()).masked_fill(~seen, -torch.inf)
    (first, second), chosen = scores.topk(2).values.unbind(-1), scores.argmax(-1)
    clear = (first - second).T > 0.02 * first.abs().T + 1000  # in bf16 torch rounds the scores
    assert clear.float().mean() > 0.5
    o, lse = ops.attention(q, k, v, lengths, None)
    wanted = torch.stack([v[chosen[head], head] for head in range(2)], dim=1)
    # a probability, its sum and their quotient are rounded
    torch.testing.assert_close(o[clear], wanted[clear], rtol=4 * exact.unit(dtype), atol=0)
    assert lse.isfinite().all()
    gradients = ops.attention_backward(random(4, tokens, 2, 18, dtype=dtype), (q, k, v), (o, lse), lengths, None)
    assert all(gradient.isfinite().all() for gradient in gradients)


def spoilt(x: Tensor, *place: int, value: float = torch.nan) -> Tensor:
    x = x.clone()
    x[place] = value
    return x


def not_hidden(ours: Tensor, wanted: Tensor) -> None:
    """What is not finite by the formulas is not finite here, or training would go on with it."""
    assert not wanted.isfinite().all(), "a case that spoils nothing"
    assert not ours[~wanted.isfinite()].isfinite().any()


@pytest.mark.parametrize("column", [0, 1, 15, 16, 36])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_a_number_is_not_hidden(ops: ByHand, dtype: torch.dtype, value: float, column: int) -> None:
    x, weight, grad = random(1, 3, 37, dtype=dtype), random(2, 37, dtype=dtype), random(3, 3, 37, dtype=dtype)
    bad = spoilt(x, 1, column, value=value)
    not_hidden(ops.rms_norm(bad, weight, EPS), exact.rms_norm(bad, weight, EPS).value)
    for of in ((bad, x), (x, bad)):
        wanted = exact.rms_norm_backward(*of, weight, EPS, None).value
        not_hidden(ops.rms_norm_backward(*of, weight, EPS), wanted)
        assert ops.rms_norm_backward(*of, weight, EPS)[[0, 2]].isfinite().all()
        not_hidden(ops.swiglu(*of), exact.swiglu(*of).value)
        for places in ((grad, *of), (bad, x, grad)):
            wanted_all = [bounded.value for bounded in exact.swiglu_backward(*places)]
            gate, up = places[1].clone(), places[2].clone()
            product = ops.swiglu_backward(places[0].clone(), gate, up)
            for ours, one in zip((gate, up, product), wanted_all, strict=True):
                if not one.isfinite().all():
                    not_hidden(ours, one)


@pytest.mark.parametrize("token", [0, 1, 59, 60, 69])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
def test_attention_spoils_what_sees_the_spoilt_token(ops: ByHand, dtype: torch.dtype, name: str, token: int) -> None:
    """And nothing of the documents beside. Of four query heads, 0 and 1 share key head 0; head 1 is spoilt."""
    lengths, here = (3, 70, 5), slice(3, 73)
    heads = {"q": 4, "k": 2, "v": 2, "grad": 4}
    given = {one: random(seed, 78, heads[one], 18, dtype=dtype) for seed, one in enumerate(heads)}
    given[name] = spoilt(given[name], 3 + token, 1, 7)
    inputs = given["q"], given["k"], given["v"]
    o, lse = ops.attention(*inputs, lengths, None)
    dq, dk, dv = ops.attention_backward(given["grad"], inputs, (o, lse), lengths, None)
    for ours in (o, dq, dk, dv):
        assert ours[:3].isfinite().all()
        assert ours[73:].isfinite().all()
    only, after, before = slice(token, token + 1), slice(token, None), slice(0, token + 1)
    expected = {
        "q": [(o, only, [1]), (dq, only, [1]), (dk, before, [0]), (dv, before, [0])],
        "k": [(o, after, [2, 3]), (dq, after, [2, 3]), (dk, slice(None), [1]), (dv, slice(None), [1])],
        "v": [(o, after, [2, 3]), (dq, after, [2, 3]), (dk, slice(None), [1])],
        "grad": [(dq, only, [1]), (dk, before, [0]), (dv, before, [0])],
    }
    for ours, rows, spoilt_heads in expected[name]:
        assert ours[here][rows, spoilt_heads, 7].isnan().all()


@pytest.mark.parametrize("column", [0, 15, 16, 36])
def test_a_loss_of_nan_is_not_hidden(ops: Native | Batched, dtype: torch.dtype, column: int) -> None:
    for value in (torch.nan, torch.inf):
        logits = spoilt(random(1, 3, 37, dtype=dtype), 1, column, value=value)
        for label in (column, (column + 1) % 37):
            labels, weights = torch.tensor([0, label, 36]), torch.tensor([1.0, 0.5, 1.0])
            loss, error = ops.cross_entropy(logits.clone(), labels, weights, True)
            assert not loss[1].isfinite()
            assert not error[1].isfinite().all()
            assert loss[[0, 2]].isfinite().all()
            assert error[[0, 2]].isfinite().all()
