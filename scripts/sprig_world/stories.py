"""The plain short stories of the pretraining text: a grammar of plots, each a list of sentences with several wordings.

A plot is written with {slots}; a slot's value is drawn once per story, so that names and things stay the same
within it. `[a|b|c]` draws one of its wordings.
"""

# ruff: noqa: SIM905  (a list of words reads more easily as one string)
from __future__ import annotations

import random
import re

from . import tables
from .facts import capital, with_article

SLOTS = {
    "beast": (
        "dog cat fox rabbit horse mouse owl duck goat hen bear frog squirrel donkey sheep crow goose hedgehog"
    ).split(),
    "thing": (
        "ball kite drum hat coat boat lamp clock basket book cup spoon key rope bell doll box ring shoe candle "
        "letter cake"
    ).split(),
    "tint": tables.TINTS.split(),
    "place": (
        "garden wood market river hill field village lake school harbour barn mill bridge meadow shore street kitchen"
    ).split(),
    "weather": "sunny rainy windy cold warm snowy grey bright quiet stormy foggy fine".split(),
    "meal": "bread soup cheese apples pears porridge pancakes honey nuts stew plums butter eggs milk".split(),
    "mood": "happy sad glad tired proud hungry cross brave shy merry afraid calm lonely".split(),
    "kind": "small old big young clever kind lazy quick quiet careful strange poor rich tall little thin".split(),
    "when": (
        "One morning;One evening;One day;Last summer;In the spring;On a Monday;Before breakfast;After school;At "
        "noon;In the winter"
    ).split(";"),
    "work": "baker teacher farmer doctor miller cobbler tailor potter weaver painter gardener cook".split(),
    "count": "two three four five six seven eight nine ten".split(),
    "relation": "mother father sister brother friend aunt uncle neighbour grandmother cousin".split(),
}
MANY = {"mouse": "mice", "goose": "geese", "sheep": "sheep", "fox": "foxes"}

PLOTS = (
    (
        "The Lost {Thing}",
        "{name} had {a_tint} {thing}. [It was a present from|It came from|It had belonged to] {its} {relation}.",
        "{when} {name} [took it to|went with it to|carried it down to] the {place}, and there it [was lost|got "
        "lost|fell down].",
        "{name} [looked|searched] [everywhere|high and low|behind every tree], but [it was gone|could not find "
        "it|found nothing].",
        "Then {a_kind} {beast} [came along|came out of the grass|stopped beside the road].",
        '"[What is the matter|Why are you crying|What are you looking for]?" asked the {beast}.',
        '"I have lost my {thing}," said {name}.',
        "[Together they looked again|They looked together for {count} hours|The {beast} knew where to look], and "
        "[at last|in the end] "
        "they found the {tint} {thing} under [a stone|a bush|the bridge|a heap of leaves].",
        "{name} was {mood} [no longer|at first, but then laughed] and gave the {beast} some {meal}.",
    ),
    (
        "{name} and the {Beast}",
        "It was {a_weather} day. {name} and {friend} went to the {place}.",
        "[On the way|By the road|Near the gate] they saw {a_kind} {beast} with {a_tint} {thing}.",
        '"[Whose {thing} is that|Where did you get that|May we see it]?" asked {friend}.',
        'The {beast} said, "[It belongs to a {work}|I found it by the {place}|I made it myself]."',
        "{name} [laughed|thought about it|did not believe it], but {friend} [was {mood}|said nothing|asked again].",
        "So they all [walked back|ran|went home] to the {work}, who [thanked them|was very glad|gave them {meal} "
        "to eat].",
        "[After that|From then on|Since that day] the {beast} [visits them|came every week|is their friend].",
    ),
    (
        "A Day at the {Place}",
        "{when} {name} got up early. The weather was {weather}.",
        "{its} {relation} had [made|cooked|bought] some {meal}, and they ate it [at the table|slowly|by the window].",
        "Then they [walked|rode|drove] to the {place}. [It was not far|It took {count} minutes|The road was long].",
        "There they [counted {count} birds|met {a_kind} {work}|played with {a_tint} {thing}|sat in the grass].",
        "[Later|After lunch|When it grew dark] they [went home|came back], {mood} and [tired|full of stories|a "
        "little wet].",
        '"[That was a good day|Let us go again soon|I will never forget this]," said {name}.',
    ),
    (
        "The {Kind} {Work}",
        "There was {a_kind} {work} [in {town}|in our village|near the {place}] who worked [all day|from morning "
        "till night].",
        "[Everybody liked|Nobody knew|People often spoke of] the {work}, because [there was always {meal} for a "
        "guest|the "
        "work was so good|the house was so {weather}].",
        "{when} {name} came to the door and [asked for help|wanted to learn|brought {a_tint} {thing}].",
        '"[Can you mend this|Will you teach me|What must I do]?" asked {name}.',
        '"[Yes|Of course|If you are patient]," said the {work}, "but first [sweep the floor|eat something|look '
        'how I do it]."',
        "{name} [stayed {count} days|worked hard|watched closely] and [learned a lot|became {mood}|went home "
        "with {count} coins].",
        "[In the end|Years later] {name} became {a_work2} too.",
    ),
    (
        "{Count} {Beasts}",
        "[Once|Long ago|Some years ago] {count} {beasts} lived [near the {place}|behind a house in {town}|under "
        "one roof].",
        "The first was {kind}, the second was {mood}, and [the others were asleep|the rest did what they liked].",
        "{when} [there was nothing to eat|the rain would not stop|a {tint} {thing} lay in front of their door].",
        '"[We must leave|What shall we do|Let us share]," said the {kind} one.',
        "So they [went to {name}|asked {a_work2}|looked in the {place}], and [found|got|were given] {meal} for "
        "all of them.",
        "[That night|In the evening] they [slept well|sang a song|were {mood} together], and the {weather} "
        "[wind|night] went by.",
    ),
    (
        "A Letter from {name}",
        "Dear {friend}, I am [writing to you|sitting] in {town}. The weather is {weather}.",
        "[Yesterday|On Sunday|This morning] we went to the {place} and saw {count} {beasts}.",
        "My {relation} bought me {a_tint} {thing}, and I am very {mood}.",
        "We eat {meal} [every day|in the evening|with our fingers]. [How are you|Is your {relation} well|What is "
        "new at home]?",
        "[Please write soon|Come and see us|I will be home in {count} days]. Your friend, {name}.",
    ),
)


def choose(text: str, rng: random.Random) -> str:
    """Draw one wording for every `[a|b]` of the text."""
    return re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match.group(1).split("|")), text)


def draw_slots(rng: random.Random) -> dict[str, str]:
    """One value for every slot; {Thing} is the capitalised form, {a_thing} the one with its article."""
    slots = {name: rng.choice(values) for name, values in SLOTS.items()}
    slots["name"], slots["friend"] = rng.sample(tables.PEOPLE.split(), 2)
    slots["town"] = rng.choice(tables.TOWNS.split())
    slots["its"] = rng.choice(["her", "his"])
    slots["beasts"] = MANY.get(slots["beast"], slots["beast"] + "s")
    articles = {f"a_{name}": with_article(value) for name, value in slots.items()}
    articles["a_work2"] = with_article(slots["work"])
    return slots | articles | {capital(name): capital(value) for name, value in slots.items()}


def tell(plot: tuple[str, ...], slots: dict[str, str], rng: random.Random) -> tuple[str, str]:
    """Title and text of one telling of a plot."""
    sentences = [capital(choose(sentence, rng).format(**slots)) for sentence in plot[1:]]
    return plot[0].format(**slots), " ".join(sentences)


def story(rng: random.Random) -> tuple[str, str]:
    """(title, text) of a plain story."""
    return tell(rng.choice(PLOTS), draw_slots(rng), rng)
