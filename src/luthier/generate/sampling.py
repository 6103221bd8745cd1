"""From the logits of one position to one token.

The steps and their order are those of transformers' `generate`: repetition penalty, then, unless the choice is greedy,
temperature, top-k, top-p, min-p, softmax, one draw.

    penalty   l_v <- l_v / p where l_v > 0, l_v * p where l_v < 0, for every token v seen so far (prompt included)
              (Keskar et al. 2019, CTRL, section 4.1, in the sign-aware form that transformers uses)
    top-k     only the k largest logits stay (Fan et al. 2018)
    top-p     only the smallest set of likeliest tokens whose probabilities sum to p stays (Holtzman et al. 2020)
    min-p     only tokens at least p times as probable as the likeliest stay (Nguyen et al. 2024)

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.errors import ModelError, UsageError

__all__ = ["GREEDY", "SamplingSpec", "make_generator", "sample", "shape_logits"]


COLDEST = 1e-4
"""A temperature below this is greedy: the likeliest token has all but certainty, and logits over it leave fp32."""

SEEDS = (-(2**63), 2**64 - 1)
"""The seeds that torch's generators take, both ends included."""

PENALTIES = (1e-3, 1e3)
"""Repetition penalties whose logits stay within fp32 at every temperature."""


LIKELIEST = 512
"""Tokens among which top-p looks for its edge before it sorts a large vocabulary."""


@dataclass(frozen=True)
class SamplingSpec:
    """How tokens are drawn. Raises UsageError for values that mean nothing.

    `temperature` 0 (any below 1e-4) takes the likeliest token always; then `top_p`, `top_k` and `min_p` have no effect,
    and the seed none either. `top_k` 0, `top_p` 1 and `min_p` 0 let every token stay. `repetition_penalty` 1 changes
    nothing, above 1 makes tokens seen already less likely.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        wrong: list[str] = []
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            wrong.append(f"temperature is {self.temperature}, it must be 0 or more")
        if not 0 <= self.top_p <= 1:
            wrong.append(f"top-p is {self.top_p}, it must lie between 0 and 1")
        if not 0 <= self.min_p <= 1:
            wrong.append(f"min-p is {self.min_p}, it must lie between 0 and 1")
        if self.top_k < 0:
            wrong.append(f"top-k is {self.top_k}, it must be 0 (all) or more")
        if not PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1]:
            least, most = PENALTIES
            wrong.append(
                f"repetition penalty is {self.repetition_penalty}, it must lie between {least:g} and {most:g} (1: none)"
            )
        if not SEEDS[0] <= self.seed <= SEEDS[1]:
            wrong.append(f"seed is {self.seed}, it must lie between {SEEDS[0]} and {SEEDS[1]}")
        if wrong:
            raise UsageError("; ".join(wrong), "Usual: temperature 0.7, top-p 0.9, top-k 0, penalty 1.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, and nothing left to chance."""
        return self.temperature < COLDEST


GREEDY = SamplingSpec()
"""Always the likeliest token."""


def make_generator(spec: SamplingSpec, device: torch.device) -> torch.Generator:
    """The source of chance for one answer, on the device of the logits."""
    generator = torch.Generator(device=device)
    generator.manual_seed(spec.seed)
    return generator


def _penalised(logits_V: Tensor, history: Sequence[int], penalty: float) -> Tensor:
    seen = torch.tensor(sorted(set(history)), dtype=torch.long, device=logits_V.device)
    chosen = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def _top_k(logits_V: Tensor, k: int) -> Tensor:
    least = torch.topk(logits_V, min(k, logits_V.numel())).values[-1]
    return logits_V.masked_fill(logits_V < least, -math.inf)


def _top_p(logits_V: Tensor, p: float) -> Tensor:
    if logits_V.numel() > 2 * LIKELIEST and logits_V.device.type == "cpu":
        least = _least_of_top_p(logits_V, p)
        if least is not None:
            return torch.where(logits_V < least, -math.inf, logits_V)
    # From the least likely upwards: what lies in the lower 1-p of the mass goes, so the token that crosses p stays.
    rising, order = torch.sort(logits_V)
    below = rising.softmax(-1).cumsum(-1) <= 1 - p
    below[-1] = False  # the likeliest token stays whatever p is
    return logits_V.masked_fill(torch.zeros_like(below).scatter(0, order, below), -math.inf)


def _least_of_top_p(logits_V: Tensor, p: float) -> float | None:
    """The least logit that top-p keeps, from the likeliest tokens alone; None where it takes the sort to be sure.

    A token goes where the mass of those up to it from below, its own included, is at most 1 - p. The sort's numbers are
    fp32, summed from the least likely upwards (on a CPU the running sum in fp64); those here are fp64. Where the two
    nearest masses, the last kept and the first gone, are farther from 1 - p than the two ways of rounding can differ,
    both ways decide alike. Relative to a mass M they differ by no more than

        LIKELIEST u + V u (mass of the others) + 2 E + the last roundings      u = 2^-24

    the first two of softmax's own sum (a sum of n positive terms errs by at most u times the sum of its partial sums),
    E of torch's exp, which may be off by 20 units in the last place (2^-23) within softmax.
    """
    best = torch.topk(logits_V, LIKELIEST).values
    likely = (best - best[0]).exp().double()
    whole = float((logits_V - best[0]).exp().sum(dtype=torch.float64))
    others = max(0.0, whole - float(likely.sum()))
    # mass[i]: of token i and all that are less likely.
    mass = (likely.flip(0).cumsum(0).flip(0) + others) / whole
    kept = int((mass > 1 - p).sum())
    if not 0 < kept < LIKELIEST:
        return None
    unit = 2.0**-24
    apart = 2 * (LIKELIEST * unit + logits_V.numel() * unit * others / whole + 2 * 40 * unit + 8 * unit)
    sure = float(mass[kept - 1]) * (1 - apart) > 1 - p > float(mass[kept]) * (1 + apart)
    # Of equals the sort puts any first: which of them go, it alone says.
    return float(best[kept - 1]) if sure and bool(best[kept - 1] > best[kept]) else None


def _min_p(logits_V: Tensor, p: float) -> Tensor:
    probabilities_V = logits_V.softmax(-1)
    below_V = probabilities_V < p * probabilities_V.max()  # the likeliest is not below: p is 1 at most
    return logits_V.masked_fill(below_V, -math.inf)


def shape_logits(logits_V: Tensor, history: Sequence[int], spec: SamplingSpec) -> Tensor:
    """The fp32 logits [V] from which the token is drawn: -inf where a token is ruled out. `logits_V` is not changed."""
    shaped_V = logits_V.float()
    if spec.repetition_penalty != 1.0 and history:
        shaped_V = _penalised(shaped_V, history, spec.repetition_penalty)
    if spec.greedy:
        return shaped_V
    if spec.temperature != 1.0:
        shaped_V = shaped_V / spec.temperature
    if spec.top_k:
        shaped_V = _top_k(shaped_V, spec.top_k)
    if spec.top_p < 1.0:
        shaped_V = _top_p(shaped_V, spec.top_p)
    if spec.min_p > 0.0:
        shaped_V = _min_p(shaped_V, spec.min_p)
    return shaped_V


def sample(logits_V: Tensor, history: Sequence[int], spec: SamplingSpec, generator: torch.Generator) -> int:
    """One token id drawn from `logits_V` [V]; `history` is every id before it, prompt included.

    Raises ModelError where the probabilities are not finite, for nothing can be drawn from them.
    """
    shaped_V = shape_logits(logits_V, history, spec)
    if spec.greedy:
        return int(shaped_V.argmax())
    probabilities_V = shaped_V.softmax(-1)
    if probabilities_V.device.type != "cpu":
        return int(torch.multinomial(probabilities_V, 1, generator=generator))
    # One number in place of multinomial's V: the token in whose share of the running sum it falls. Shares of 0 are
    # never hit, for it lies below the sum of all, and "right" passes over tokens that add nothing.
    upto_V = probabilities_V.cumsum(-1, dtype=torch.float64)
    total = float(upto_V[-1])
    if not math.isfinite(total):
        raise ModelError(
            "the model's logits are not finite", "its weights or its adapter are damaged, or have diverged"
        )
    at = min(float(torch.rand((), dtype=torch.float64, generator=generator)) * total, math.nextafter(total, 0.0))
    return int(torch.searchsorted(upto_V, at, right=True))
