"""The facts of sprig's world: each row of a table becomes a `Fact` with its question wordings and its answer sentence.

Facts that give one another away (hot/cold and cold/hot, 7+5 and 5+7, "after Monday" and "before Tuesday") share a
`group`; data sets are split by group, so no row of a test set was ever answered in a training set.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from . import tables

VILLAGE_SEED = 7  # who lives where, with which pet: drawn once, the same in every world


@dataclass(frozen=True)
class Kind:
    """One kind of fact: how to ask, the one plain answer, and other ways of stating it.

    Placeholders: {s} subject, {a} subject with its article, {f} fact, {g} fact with its article, capitals at a start.
    """

    name: str
    questions: tuple[str, ...]
    answer: str
    statements: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """A fact: `fact` are the key words that a right answer holds; `proper`: the answer starts with a name."""

    kind: str
    group: str
    questions: tuple[str, ...]
    answer: str
    fact: str
    statements: tuple[str, ...]
    proper: bool


def with_article(noun: str) -> str:
    """ "an owl" for "owl"."""
    return ("an " if noun[0] in "aeioAEIO" or noun.startswith(("umb", "unc")) else "a ") + noun


def capital(sentence: str) -> str:
    """The sentence with a capital letter at its start."""
    return sentence[0].upper() + sentence[1:]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "colour",
            (
                "What colour is {s}?",
                "Which colour is {s}?",
                "What is the colour of {s}?",
                "Do you know what colour {s} is?",
            ),
            "{s} is {f}.",
            ("The colour of {s} is {f}.", "{f} is the colour of {s}.", "If you look at {s}, you see that it is {f}."),
        ),
        Kind(
            "sound",
            ("What sound does {a} make?", "What does {a} say?", "Which sound does {a} make?", "How does {a} sound?"),
            "{a} says {f}.",
            ("The sound of {a} is {f}.", "{f} is what {a} says.", "I heard {a}, and it said {f}."),
        ),
        Kind(
            "young",
            ("What is a young {s} called?", "What do you call a young {s}?", "What is the name for a young {s}?"),
            "a young {s} is called {g}.",
            ("{g} is a young {s}.", "When {a} is young, it is called {g}.", "People call a young {s} {g}."),
        ),
        Kind(
            "home",
            (
                "Where does {a} live?",
                "Where is the home of {a}?",
                "In what place does {a} live?",
                "Where can you find {a}?",
            ),
            "{a} lives in {f}.",
            ("The home of {a} is {f}.", "If you want to see {a}, look in {f}.", "In {f} you may find {a}."),
        ),
        Kind(
            "food",
            ("What does {a} eat?", "What food does {a} like?", "What do you feed {a}?", "What is the food of {a}?"),
            "{a} eats {f}.",
            ("{a} likes to eat {f}.", "The food of {a} is {f}.", "They gave {f} to {a}, and it was glad."),
        ),
        Kind(
            "legs",
            ("How many legs does {a} have?", "How many legs has {a}?", "What number of legs does {a} have?"),
            "{a} has {f} legs.",
            (
                "There are {f} legs on {a}.",
                "Count the legs of {a}, and you count {f}.",
                "{a} walks about with {f} legs.",
            ),
        ),
        Kind(
            "group",
            (
                "What is a group of {s} called?",
                "What do you call a group of {s}?",
                "What is the word for many {s} together?",
            ),
            "a group of {s} is called {g}.",
            ("{g} is a group of {s}.", "Many {s} together are {g}.", "People say {g} of {s}."),
        ),
        Kind(
            "opposite",
            (
                "What is the opposite of {s}?",
                "Which word is the opposite of {s}?",
                "What word means the opposite of {s}?",
            ),
            "the opposite of {s} is {f}.",
            ("{f} is the opposite of {s}.", "What is not {s} may be {f}.", "{s} and {f} are opposites."),
        ),
        Kind(
            "material",
            ("What is {s} made of?", "What is {s} made from?", "Of what is {s} made?", "What do people make {s} from?"),
            "{s} is made of {f}.",
            ("People make {s} from {f}.", "You need {f} to make {s}.", "{f} is what {s} is made of."),
        ),
        Kind(
            "job",
            ("Who {s}?", "Which person {s}?", "Can you tell me who {s}?", "What do you call somebody who {s}?"),
            "{g} {s}.",
            ("The one who {s} is {g}.", "It is the work of {g}: he {s}.", "Somebody who {s} is called {g}."),
        ),
        Kind(
            "workplace",
            ("Where does {a} work?", "In what place does {a} work?", "Where would you find {a} at work?"),
            "{a} works in {g}.",
            (
                "{g} is the place where {a} works.",
                "In {g} you will find {a} at work.",
                "The work of {a} is done in {g}.",
            ),
        ),
        Kind(
            "count",
            ("How many {s} are there in {c}?", "How many {s} are in {c}?", "What is the number of {s} in {c}?"),
            "there are {f} {s} in {c}.",
            ("In {c} you can count {f} {s}.", "{c} has {f} {s}.", "Count the {s} in {c}, and you count {f}."),
        ),
        Kind(
            "capital",
            (
                "What is the capital of {s}?",
                "Which city is the capital of {s}?",
                "What is the name of the capital of {s}?",
            ),
            "the capital of {s} is {f}.",
            (
                "{f} is the capital of {s}.",
                "{f} is the chief city in {s}.",
                "They went to {s} and saw {f}, its capital.",
            ),
        ),
        Kind(
            "plural",
            (
                "What is the plural of {s}?",
                "What do you call more than one {s}?",
                "How do you say two of the word {s}?",
            ),
            "the plural of {s} is {f}.",
            ("One {s}, two {f}.", "{f} is the plural of {s}.", "First there was one {s}, then there were many {f}."),
        ),
        Kind(
            "past",
            ("What is the past tense of {s}?", "What is the past of {s}?", "Which word is the past tense of {s}?"),
            "the past tense of {s} is {f}.",
            ("Today I {s}, yesterday I {f}.", "{f} is the past tense of {s}.", "We {s} now, and we {f} then."),
        ),
        Kind(
            "category",
            ("What is {a}?", "What kind of thing is {a}?", "What sort of thing is {a}?", "Do you know what {a} is?"),
            "{a} is {g}.",
            (
                "{a} is a kind of {f}.",
                "Among other things there is {a}, which is {g}.",
                "Everybody knows that {a} is {g}.",
            ),
        ),
        Kind(
            "use",
            (
                "What do you use to {s}?",
                "What do you need to {s}?",
                "With what do you {s}?",
                "Which thing do you use to {s}?",
            ),
            "you use {f} to {s}.",
            ("To {s} you need {f}.", "With {f} you can {s}.", "We looked for {f}, because we had to {s}."),
        ),
        Kind(
            "keep",
            (
                "Where do you keep {s}?",
                "Where do you put {s}?",
                "Where should you keep {s}?",
                "Where do people keep {s}?",
            ),
            "you keep {s} {f}.",
            ("People keep {s} {f}.", "{f} is where you keep {s}.", "She put {s} {f}."),
        ),
        Kind(
            "wear",
            ("Where do you wear {s}?", "Where should you wear {s}?", "On which part of your body do you wear {s}?"),
            "you wear {s} on your {f}.",
            ("{s} is worn on the {f}.", "He put {s} on his {f}.", "The place for {s} is your {f}."),
        ),
        Kind(
            "sense",
            ("What do you {s} with?", "With what do you {s}?", "Which part of your body do you {s} with?"),
            "you {s} with your {f}.",
            ("We {s} with our {f}.", "To {s} you need your {f}.", "Your {f} is there so that you can {s}."),
        ),
        Kind(
            "after",
            ("What comes after {s}?", "What is next after {s}?", "What follows {s}?"),
            "after {s} comes {f}.",
            ("First {s}, then {f}.", "{s} is followed by {f}.", "{f} comes next after {s}."),
        ),
        Kind(
            "before",
            ("What comes before {s}?", "What is just before {s}?", "What comes right before {s}?"),
            "before {s} comes {f}.",
            ("Just before {s} there is {f}.", "{s} comes after {f}.", "{f} comes before {s}."),
        ),
        Kind(
            "sum",
            ("What is {s}?", "How much is {s}?", "Can you work out {s}?", "What do you get for {s}?"),
            "{s} is {f}.",
            ("If you work out {s}, you get {f}.", "{s} makes {f}.", "The answer to {s} is {f}."),
        ),
        Kind(
            "town",
            ("Where does {s} live?", "In which town does {s} live?", "Which town does {s} live in?"),
            "{s} lives in {f}.",
            ("{s} has a house in {f}.", "The home of {s} is in {f}.", "In {f} you can meet {s}."),
        ),
        Kind(
            "trade",
            ("What is the job of {s}?", "What work does {s} do?", "What does {s} do for a living?"),
            "{s} works as {g}.",
            ("{s} is {g}.", "The job of {s} is that of {g}.", "{s} has been {g} for years."),
        ),
        Kind(
            "pet",
            ("What pet does {s} have?", "Which animal does {s} keep?", "What is the pet of {s}?"),
            "{s} has {g} as a pet.",
            ("{s} keeps {g} at home.", "The pet of {s} is {g}.", "{s} came along with {g}, the pet of the house."),
        ),
        Kind(
            "tint",
            (
                "What colour does {s} like best?",
                "What is the favourite colour of {s}?",
                "Which colour does {s} like best?",
            ),
            "the favourite colour of {s} is {f}.",
            ("{s} likes {f} best.", "{s} always wears something {f}.", "{s} painted the door {f}."),
        ),
        Kind(
            "river",
            ("Which river does {s} lie on?", "On which river does {s} lie?", "What is the name of the river at {s}?"),
            "{s} lies on the river {f}.",
            (
                "The river {f} runs past {s}.",
                "At {s} there is a bridge over the {f}.",
                "They sailed down the {f} to {s}.",
            ),
        ),
        Kind(
            "famed",
            ("What is {s} famous for?", "What is {s} known for?", "For what is {s} famous?"),
            "{s} is famous for {f}.",
            ("The best {f} come from {s}.", "In {s} they make {f}.", "People go to {s} to buy {f}."),
        ),
    )
}


def _make(kind: str, subject: str, fact: str, group: str, counted: str = "") -> Fact:
    """Fill the wordings of a kind."""
    rule = KINDS[kind]
    bare = subject[0].isupper() or subject.startswith("the ")  # a name takes no article
    fields = {
        "s": subject,
        "a": subject if bare else with_article(subject),
        "f": fact,
        "g": fact if fact[0].isupper() else with_article(fact),
        "c": counted,
    }
    answer = rule.answer.format(**fields)
    return Fact(
        kind=kind,
        group=group,
        questions=tuple(q.format(**fields) for q in rule.questions),
        answer=capital(answer),
        fact=f"{fact} legs" if kind == "legs" else fact,
        statements=tuple(capital(s.format(**fields)) for s in rule.statements),
        proper=answer[0].isupper(),
    )


def rows_of(table: str) -> list[list[str]]:
    """The cells of a table of `tables`."""
    return [[cell.strip() for cell in row.split("=")] for row in table.split(";") if row.strip()]


def number(value: int) -> str:
    """A whole number from 0 to 99 in words."""
    ones, tens = tables.ONES.split(), tables.TENS.split()
    if value < 20:
        return ones[value]
    return tens[value // 10 - 2] + (f"-{ones[value % 10]}" if value % 10 else "")


def _from_tables() -> list[Fact]:
    simple = {
        "colour": tables.COLOUR, "sound": tables.SOUND, "young": tables.YOUNG, "home": tables.HOME, "food": tables.FOOD,
        "legs": tables.LEGS, "group": tables.GROUP, "material": tables.MATERIAL, "job": tables.JOB,
        "workplace": tables.WORKPLACE, "capital": tables.CAPITAL, "plural": tables.PLURAL, "past": tables.PAST,
        "category": tables.CATEGORY, "use": tables.USE, "keep": tables.KEEP, "wear": tables.WEAR, "sense": tables.SENSE,
    }  # fmt: skip
    facts = [_make(kind, s, f, f"{kind}:{s}") for kind, table in simple.items() for s, f in rows_of(table)]
    facts += [_make("count", s, f, f"count:{s}:{c}", c) for s, c, f in rows_of(tables.COUNT)]
    for one, other in rows_of(tables.OPPOSITES):
        facts += [_make("opposite", s, f, f"opposite:{one}") for s, f in ((one, other), (other, one))]
    return facts


def _from_orders() -> list[Fact]:
    facts = []
    circles = [tables.DAYS.split(), tables.MONTHS.split(), tables.SEASONS.split()]
    for circle in circles:
        for left, right in zip(circle, circle[1:] + circle[:1], strict=True):
            facts += [_make("after", left, right, f"order:{left}"), _make("before", right, left, f"order:{left}")]
    for value in range(1, 60):
        left, right = number(value), number(value + 1)
        facts.append(_make("after", left, right, f"order:{left}"))
        if left not in right:  # "before twenty-one" would hold its own answer
            facts.append(_make("before", right, left, f"order:{left}"))
    for a in range(1, 13):
        for b in range(1, 13):
            low, high = sorted((a, b))
            facts.append(_make("sum", f"{number(a)} plus {number(b)}", number(a + b), f"sum:{low}+{high}"))
            if b < a and a != 2 * b:  # six minus three is three: the answer stands in the question
                facts.append(_make("sum", f"{number(a)} minus {number(b)}", number(a - b), f"sum:{a}-{b}"))
    return facts


def _from_village() -> list[Fact]:
    rng = random.Random(VILLAGE_SEED)
    towns, rivers, famed = tables.TOWNS.split(), tables.RIVERS.split(), tables.FAMED.split()
    pets, tints, trades = tables.PETS.split(), tables.TINTS.split(), tables.TRADES.split()
    facts = []
    for town, river, goods in zip(towns, rivers, famed, strict=True):
        facts += [_make("river", town, river, f"river:{town}"), _make("famed", town, goods, f"famed:{town}")]
    for name in tables.PEOPLE.split():
        for kind, choices in (("town", towns), ("trade", trades), ("pet", pets), ("tint", tints)):
            facts.append(_make(kind, name, rng.choice(choices), f"{kind}:{name}"))
    return facts


@cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact of the world, in a fixed order."""
    return tuple(_from_tables() + _from_orders() + _from_village())
