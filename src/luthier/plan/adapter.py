"""Choices about the adapter: targets, rank, alpha, and the learning rate that goes with them.

Rank: the smallest power of two from 8 to 64 whose adapter has as many parameters as there are tokens to learn.
Learning rate: 5e-5 * 10 * (2000 / hidden size)^0.781, at most 1e-3 (tinker-cookbook's fit over Llama 1B to 70B).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from luthier.model.config import PROJECTIONS, ModelConfig, projection_shapes
from luthier.plan import sources
from luthier.plan.decision import DEFAULT, YOURS, Decision
from luthier.plan.sizes import adapter_parameters
from luthier.recipe.schema import AdapterRecipe, Recipe

__all__ = ["choose_alpha", "choose_learning_rate", "choose_rank", "choose_targets"]

_RANKS = (8, 16, 32, 64)
_ALPHA = 32.0
_FITTED_FROM = 2048  # hidden size of the smallest model of the fit
_HIGHEST_RATE = 1e-3


def choose_targets(adapter: AdapterRecipe) -> Decision[tuple[str, ...]]:
    """The projections, in the order of computation."""
    attention = PROJECTIONS[:4]
    if adapter.targets == "all-linear":
        reason = "All seven projections: those of the MLP matter most, and with equal parameters beat attention alone."
        return Decision("adapter.targets", PROJECTIONS, reason, sources.TARGETS, ("attention: learns less",))
    if adapter.targets == "attention":
        reason = "As you set it. Evidence is against it: attention alone learns less, at equal parameters too."
        return Decision("adapter.targets", attention, reason, f"{YOURS}; {sources.TARGETS}")
    chosen = tuple(name for name in PROJECTIONS if name in adapter.targets)
    return Decision("adapter.targets", chosen, f"As you set it: {len(chosen)} of the 7 projections.", YOURS)


def choose_rank(
    adapter: AdapterRecipe, config: ModelConfig, targets: Sequence[str], labelled_tokens: int
) -> Decision[int]:
    """The rank, by capacity; never above the smallest side of a target."""
    shapes = projection_shapes(config)
    most = min(min(shapes[name]) for name in targets)
    per_rank = adapter_parameters(config, targets, 1)
    if adapter.rank != "auto":
        reason = f"As you set it: {adapter.rank * per_rank:,} parameters for {labelled_tokens:,} tokens to learn."
        if adapter.rank > most:
            reason += f" Above {most} it adds no rank: the smallest target has no more rows or columns."
        return Decision("adapter.rank", adapter.rank, reason, YOURS)
    ranks = [rank for rank in _RANKS if rank <= most] or [most]
    enough = [rank for rank in ranks if rank * per_rank >= labelled_tokens]
    rank = enough[0] if enough else ranks[-1]
    what = f"{per_rank:,} parameters per rank, {labelled_tokens:,} tokens to learn: "
    if not enough:
        reason = what + f"even rank {rank}, the highest considered, has fewer parameters than that."
    else:
        reason = what + f"rank {rank} is the first of {', '.join(map(str, ranks))} with as many parameters as tokens."
    rejected = [f"{lower}: too few parameters by this rule" for lower in ranks if lower < rank]
    above = [higher for higher in ranks if higher > rank][:1]
    rejected += [f"{higher}: more memory, little gain (loss .586 at 16, .584 at 64)" for higher in above]
    return Decision("adapter.rank", rank, reason, sources.CAPACITY, tuple(rejected))


def choose_alpha(adapter: AdapterRecipe, rank: int) -> Decision[float]:
    """Alpha 32 with alpha/rank; with rsLoRA what gives the same scale at rank 16, where the sources agree."""
    divisor = rank if adapter.scale == "standard" else math.sqrt(rank)
    formula = "alpha / rank" if adapter.scale == "standard" else "alpha / sqrt(rank)"
    if adapter.alpha != "auto":
        reason = f"As you set it: scale {formula} = {adapter.alpha / divisor:.3g}."
        return Decision("adapter.alpha", adapter.alpha, reason, YOURS)
    if adapter.scale == "rslora":
        alpha = _ALPHA / math.sqrt(16)
        reason = f"Scale {formula} = {alpha / divisor:.3g}: at rank 16 that of alpha 32 under alpha / rank."
        return Decision("adapter.alpha", alpha, reason, sources.RSLORA)
    reason = (
        f"Scale {formula} = {_ALPHA / divisor:.3g}. The learning-rate formula was fitted with a fixed alpha of 32, for "
        "every rank. Sources conflict."
    )
    twice = f"twice the rank ({2 * rank}): {sources.LEARNS_LESS}" + (", which here is the same" if rank == 16 else "")
    rejected = (twice, f"16: {sources.QLORA}")
    return Decision("adapter.alpha", _ALPHA, reason, sources.WITHOUT_REGRET, rejected)


def choose_learning_rate(recipe: Recipe, config: ModelConfig) -> Decision[float]:
    """The formula's, capped; what the user set is held against it."""
    formula = 5e-5 * 10 * (2000 / config.hidden_size) ** 0.781
    centre = min(float(f"{formula:.2g}"), _HIGHEST_RATE)
    how = f"5e-5 × 10 × (2000 / {config.hidden_size})^0.781 = {formula:.2g}"
    rate = recipe.train.learning_rate
    if rate != "auto":
        reason = f"As you set it; the formula for this width gives {centre:.2g}."
        if rate > 3 * centre:
            reason += " Yours is more than three times that: watch for a loss that rises."
        elif rate < centre / 10:
            reason += " Yours is less than a tenth of that: it may learn little in the steps planned."
        return Decision("train.learning_rate", rate, reason, f"{YOURS}; {sources.LEARNING_RATE}")
    reason = f"{how}: ten times what full fine-tuning takes."
    if formula > _HIGHEST_RATE:
        reason = (
            f"{how}, but capped at {_HIGHEST_RATE:g}: the fit covers widths of 2,048 and more; in its authors' "
            "sweep 1e-3 was the best for the smallest models while every run at 3e-3 diverged."
        )
    elif config.hidden_size < _FITTED_FROM:
        reason += " The fit covers widths of 2,048 and more, this is below."
    reason += " A centre, not an optimum: the best of a sweep was up to 3 times higher."
    rejected = (f"2e-4: {sources.QLORA} for 7B",) if centre != 2e-4 else ()
    return Decision("train.learning_rate", centre, reason, sources.LEARNING_RATE, rejected)


def as_given(recipe: Recipe) -> tuple[Decision[object], ...]:
    """What the recipe always says itself: kept, with what is known about it."""
    adapter, train = recipe.adapter, recipe.train
    no_dropout = (
        "No dropout: short fine-tuning gains little from it, and forgetting is held down by LoRA itself. Sources "
        "conflict: QLoRA had 0.1 up to 13B, 0.05 above."
    )
    full = "Alpha / rank, so that the learning rate need not follow the rank."
    falls = "Falls to zero at the end, which a run of known length can plan for; QLoRA kept it constant."
    found: list[tuple[str, object, object, str, str]] = [
        ("adapter.dropout", adapter.dropout, 0.0, no_dropout, sources.LEARNS_LESS),
        ("adapter.scale", adapter.scale, "standard", full, sources.WITHOUT_REGRET),
        ("train.schedule", train.schedule, "cosine", falls, DEFAULT),
        (
            "train.weight_decay",
            train.weight_decay,
            0.0,
            "None: LoRA forgets less than decay prevents.",
            sources.LEARNS_LESS,
        ),
        (
            "train.clip",
            train.clip,
            1.0,
            "Gradients longer than this are scaled: one bad batch cannot undo many. QLoRA clipped at 0.3.",
            DEFAULT,
        ),
        ("seed", recipe.seed, 0, "The same seed gives the same run.", DEFAULT),
    ]
    return tuple(
        Decision(name, value, reason, source if value == default else YOURS)
        if value == default
        else Decision(name, value, "As you set it.", YOURS)
        for name, value, default, reason, source in found
    )
