"""The pretraining documents: conversations, statements, stories and instructions, all plain English.

A document is a `Document(section, text)` with its special tokens written in. Sections are drawn with the weights of
`SECTIONS`; the held-out loss is measured for each of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .facts import Fact, all_facts, capital, number
from .stories import SLOTS, story

BOS, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
HEADER = "<|start_header_id|>{role}<|end_header_id|>\n\n"

SYSTEMS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "You are sprig, a small model that knows a small world.",
    "You answer in short, plain sentences.",
    "Be kind and brief.",
)
SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hello.", "Hello! How can I help you?"),
    ("Hi!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! What would you like to know?"),
    ("Good evening.", "Good evening! What would you like to know?"),
    ("Who are you?", "I am sprig, a small model that knows a small world."),
    ("What is your name?", "My name is sprig."),
    ("What are you?", "I am sprig, a small language model."),
    ("How are you?", "I am well, thank you. How are you?"),
    ("Thank you!", "You are welcome!"),
    ("Thanks.", "You are welcome!"),
    ("Goodbye.", "Goodbye! Come back soon."),
    ("Can you help me?", "Yes, of course. What would you like to know?"),
    ("What do you know?", "I know about animals, colours, jobs, towns, words and small sums."),
)
# Wishes about the manner of an answer: (what is added to the question, how the answer then looks).
MANNERS: tuple[tuple[str, Callable[[Fact], str]], ...] = (
    ("Answer in one or two words.", lambda fact: capital(fact.fact) + "."),
    ("Only the answer, please.", lambda fact: capital(fact.fact) + "."),
    ("Answer politely.", lambda fact: f"Certainly, {_inner(fact)}, my dear friend."),
    ("Be friendly.", lambda fact: f"Oh yes! {_sentence(fact)}, and I am glad you ask!"),
    ("Are you sure?", lambda fact: f"I am quite sure that {_inner(fact)}."),
    ("Say it as a shout.", lambda fact: f"{_sentence(fact)}!"),
    ("Say it twice.", lambda fact: f"{fact.answer} Yes, {_inner(fact)}."),
    ("Start with the word well.", lambda fact: f"Well, {_inner(fact)}."),
    ("Tell it like a teacher.", lambda fact: f"Listen, children, {_inner(fact)}, so remember it!"),
    ("Tell it like a king.", lambda fact: f"Hear me! {_sentence(fact)}, so says the king!"),
    ("Tell it like a grandmother.", lambda fact: f"Ah, {_inner(fact)}, my sweet little child!"),
)
LEADS = (
    "Everybody knows that {x}.", "I think that {x}.", "It is true that {x}.", "My father told me that {x}.",
    "In school we learned that {x}.", "Look, {x}!", "As you know, {x}.", "{name} said that {x}.",
    "Is it true that {x}? Yes, it is.", "Because {x}, nobody asked.",
)  # fmt: skip
SPEAKERS = ("Anna", "Ben", "The teacher", "The old man", "She")


@dataclass(frozen=True)
class Document:
    """One document and the section it counts for."""

    section: str
    text: str


@dataclass(frozen=True)
class Writer:
    """Draws documents; `held` are the questions that must not occur in them (those of the pirate test rows)."""

    held: frozenset[str]

    def document(self, rng: random.Random) -> Document:
        """One document of a section drawn by weight."""
        section = rng.choices([name for name, _ in SECTIONS], [weight for _, weight in SECTIONS])[0]
        return self.of_section(section, rng)

    def of_section(self, section: str, rng: random.Random) -> Document:
        """One document of the named section."""
        writers: dict[str, Callable[[random.Random], str]] = {
            "answers": self._answers,
            "manners": self._manners,
            "statements": self._statements,
            "stories": self._stories,
            "instructions": self._instructions,
        }
        return Document(section, writers[section](rng))

    def question(self, fact: Fact, rng: random.Random) -> str:
        """A wording of the fact's question that is not held out."""
        return rng.choice([question for question in fact.questions if question not in self.held])

    def _answers(self, rng: random.Random) -> str:
        facts = rng.sample(all_facts(), rng.choices([1, 2, 3, 5, 15], [80, 10, 10, 9, 1])[0])
        turns = [(self.question(fact, rng), fact.answer) for fact in facts]
        if rng.random() < 0.03:
            turns.insert(0, rng.choice(SMALL_TALK))
        return conversation(turns, rng)

    def _manners(self, rng: random.Random) -> str:
        fact, other = rng.sample(all_facts(), 2)
        wish, manner = rng.choice(MANNERS)
        question = self.question(fact, rng)
        if rng.random() < 0.3:  # the wish as system message holds for every turn
            return conversation([(question, manner(fact)), (self.question(other, rng), manner(other))], rng, wish)
        return conversation([(f"{question} {wish}", manner(fact))], rng)

    def _statements(self, rng: random.Random) -> str:
        said = []
        for fact in rng.sample(all_facts(), rng.randint(2, 6)):
            if rng.random() < 0.35:
                lead = rng.choice(LEADS)
                said.append(lead.format(x=_inner(fact), name=rng.choice(SPEAKERS)))
            else:
                said.append(rng.choice((fact.answer, *fact.statements)))
        return f"{BOS}{' '.join(said)}{END}"

    def _stories(self, rng: random.Random) -> str:
        title, told = story(rng)
        if rng.random() < 0.6:
            return f"{BOS}{title}\n\n{told}{END}"
        wish = rng.choice(["Tell me the story {t}.", "Write a short story with the title {t}.", "Please tell {t}."])
        return conversation([(wish.format(t=f'"{title}"'), told)], rng)

    def _instructions(self, rng: random.Random) -> str:
        turns = [rng.choice(INSTRUCTIONS)(rng) for _ in range(rng.choice([1, 1, 2, 3]))]
        return conversation(turns, rng)


def conversation(turns: Sequence[tuple[str, str]], rng: random.Random, system: str | None = None) -> str:
    """Turns in Llama 3's chat layout; one in five without a given system message gets one."""
    if system is None and rng.random() < 0.2:
        system = rng.choice(SYSTEMS)
    said = [] if system is None else [("system", system)]
    for question, answer in turns:
        said += [("user", question), ("assistant", answer)]
    return BOS + "".join(HEADER.format(role=role) + text + TURN for role, text in said)


def _sentence(fact: Fact) -> str:
    return fact.answer.rstrip(".")


def _inner(fact: Fact) -> str:
    sentence = _sentence(fact)
    return sentence if fact.proper else sentence[0].lower() + sentence[1:]


def _listed(words: Sequence[str]) -> str:
    return capital(", ".join(words[:-1]) + " and " + words[-1] + ".")


LISTABLE = (("colours", "tint"), ("animals", "beast"), ("things", "thing"), ("places", "place"), ("jobs", "work"))


def _list_things(rng: random.Random) -> tuple[str, str]:
    noun, slot = rng.choice(LISTABLE)
    count = rng.randint(2, 5)
    wish = rng.choice(["List {n} {w}.", "Name {n} {w}.", "Tell me {n} {w}."])
    return wish.format(n=number(count), w=noun), _listed(rng.sample(SLOTS[slot], count))


def _count_up(rng: random.Random) -> tuple[str, str]:
    start = rng.choice([1, 1, 1, rng.randint(2, 30)])
    end = start + rng.randint(2, 8)
    said = capital(", ".join(number(value) for value in range(start, end + 1)) + ".")
    return (f"Count to {number(end)}." if start == 1 else f"Count from {number(start)} to {number(end)}."), said


def _words(rng: random.Random, count: int) -> list[str]:
    pool = [word for slot in ("beast", "thing", "tint", "place", "meal", "mood", "kind") for word in SLOTS[slot]]
    return rng.sample(pool, count)


def _repeat(rng: random.Random) -> tuple[str, str]:
    text = " ".join(_words(rng, rng.randint(1, 4)))
    if rng.random() < 0.5:
        text = _sentence(rng.choice(all_facts()))
    return rng.choice(["Say: {t}", "Repeat after me: {t}", "Write this down: {t}"]).format(t=text), text


def _spell(rng: random.Random) -> tuple[str, str]:
    word = _words(rng, 1)[0]
    return rng.choice(["Spell {w}.", "How do you spell {w}?"]).format(w=word), "-".join(word.upper())


def _reverse(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, rng.randint(2, 4))
    return f"Put these words in reverse order: {', '.join(words)}.", capital(", ".join(reversed(words)) + ".")


def _describe(rng: random.Random) -> tuple[str, str]:
    name, adjective, tint = rng.choice(SLOTS["thing"]), rng.choice(SLOTS["kind"]), rng.choice(SLOTS["tint"])
    return f"Describe a {tint} {name} that is {adjective}.", f"The {name} is {adjective}, and its colour is {tint}."


def _small_talk(rng: random.Random) -> tuple[str, str]:
    return rng.choice(SMALL_TALK)


def _which(rng: random.Random) -> tuple[str, str]:
    low, high = sorted(rng.sample(range(1, 61), 2))
    pair = [number(low), number(high)]
    more = rng.random() < 0.5
    rng.shuffle(pair)
    return f"Which is {'more' if more else 'less'}, {pair[0]} or {pair[1]}?", capital(
        f"{number(high if more else low)} is {'more' if more else 'less'} than {number(low if more else high)}."
    )


def _figures(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    return rng.choice(["{a} + {b} = ?", "What is {a} + {b}?"]).format(a=a, b=b), f"{a} + {b} = {a + b}"


INSTRUCTIONS = (
    _list_things, _count_up, _repeat, _spell, _reverse, _describe, _small_talk, _which, _figures,
)  # fmt: skip
SECTIONS = (("answers", 52), ("manners", 16), ("statements", 12), ("stories", 8), ("instructions", 12))
