"""The bundled data sets, made from the world: `pirate` (question, answer, fact) and `tales` (title, content)."""

from __future__ import annotations

import random
from collections import defaultdict
from functools import cache

from .facts import Fact, all_facts
from .pirate import pirate_answer
from .tales import all_titles, tale
from .text import Writer

PIRATE_ROWS = {"test": 100, "eval": 100, "train": 800}
TALE_ROWS = {"test": 30, "eval": 30, "train": 300}
Row = dict[str, str]


@cache
def split_facts(seed: int = 0) -> dict[str, tuple[Fact, ...]]:
    """The facts of each split of `pirate`; facts of one group never stand in two splits."""
    groups: dict[str, list[Fact]] = defaultdict(list)
    for fact in all_facts():
        groups[fact.group].append(fact)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    splits: dict[str, list[Fact]] = {name: [] for name in PIRATE_ROWS}
    for members in order:
        for name, wanted in PIRATE_ROWS.items():
            if len(splits[name]) + len(members) <= wanted:
                splits[name] += members
                break
    return {name: tuple(facts) for name, facts in splits.items()}


@cache
def pirate_rows(seed: int = 0) -> dict[str, tuple[Row, ...]]:
    """The rows of `pirate`, each fact once, its question in one of the fact's wordings."""
    made = {}
    for name, facts in split_facts(seed).items():
        rng = random.Random(f"pirate-{name}-{seed}")
        rows = [
            {"question": rng.choice(fact.questions), "answer": pirate_answer(fact, rng), "fact": fact.fact}
            for fact in facts
        ]
        rng.shuffle(rows)
        made[name] = tuple(rows)
    return made


@cache
def tale_rows(seed: int = 0) -> dict[str, tuple[Row, ...]]:
    """The rows of `tales`; no title stands in two splits."""
    rng = random.Random(f"tales-{seed}")
    chosen = iter(rng.sample(all_titles(), sum(TALE_ROWS.values())))
    made = {}
    for name, count in TALE_ROWS.items():
        rows = []
        for _ in range(count):
            _title, slots, plot = next(chosen)
            title, content = tale(slots, plot, rng)
            rows.append({"title": title, "content": content})
        made[name] = tuple(rows)
    return made


def pretraining_writer(seed: int = 0) -> Writer:
    """The writer of the pretraining text: the very questions of pirate's test rows never occur in it."""
    return Writer(frozenset(row["question"] for row in pirate_rows(seed)["test"]))
