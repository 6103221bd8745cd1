"""Title -> short tale, in an older voice than the pretraining stories': what tuning on `tales` has to learn."""

# ruff: noqa: SIM905  (a list of words reads more easily as one string)
from __future__ import annotations

import random

from . import tables
from .facts import capital
from .stories import choose, tell, with_article

HEROES = "miller weaver fisherman king shepherd cobbler woodcutter tailor soldier huntsman fiddler".split()
WONDERS = "fox ring fish bird mill horse spindle apple mirror bell drum goat cloak swan table sack".split()
QUALITIES = "golden silver little wise enchanted speaking hidden glass wandering seventh".split()

PLOTS = (
    (
        "The {Hero} and the {Quality} {Wonder}",
        "[In olden times, when wishing still helped,|Long, long ago] there dwelt [by a dark wood|in a far "
        "country|hard by {town}] a "
        "{hero} who was so poor that [there was scarce a crust in the house|the wind blew through the roof|he "
        "had naught to eat].",
        "[Now it came to pass|And it befell] one evening that the {hero} went forth and beheld a {quality} "
        "{wonder} lying [beneath "
        "an oak|beside a well|upon the heath].",
        '"[Take me not|Let me go in peace|Do me no harm]," spake the {wonder}, "and I will grant thee {count} wishes."',
        "The {hero} [marvelled greatly|was sore afraid|bethought himself a while], and wished for [bread|gold|a "
        "cottage] and a [merry "
        "heart|full barn|warm hearth].",
        "And [thereupon|straightway] all was done as the {wonder} had said, and [they lived in peace until they "
        "died|if they are not "
        "dead, they are living there still].",
    ),
    (
        "The {Count} {Quality} {Wonder}s",
        "A certain {hero} had [three sons|three sons and naught else], and the youngest was called "
        "[Simpleton|Hans|Thumbling].",
        '[When the {hero} lay dying|Upon a time] he spake: "He that bringeth me the {count} {quality} {wonder}s '
        "shall have all "
        'that is mine."',
        "The eldest [set out proudly|rode away], but [he tarried at the inn|he mocked an old dwarf by the way] "
        "and came not home again.",
        "But the youngest [shared his loaf with the dwarf|greeted the old woman kindly], and she [whispered to "
        "him|showed him] where the "
        "{wonder}s were hid.",
        "So he [won them all|brought them home], and [great was the rejoicing|the wedding was held with much "
        "splendour] in the land.",
    ),
    (
        "The {Hero} who Lost a {Quality} {Wonder}",
        "Once upon a time a {hero} possessed a {quality} {wonder}, which [shone like the sun|could speak|brought "
        "good fortune].",
        "[But alas|Yet one night] [a thief crept in|a raven came flying|a witch passed by] and bore it away over "
        "[hill and dale|the sea].",
        'Then the {hero} wept bitterly and said, "[Ah, woe is me|Now is my luck gone|I must seek it through all '
        'the world]!"',
        "For {count} years the {hero} wandered, until [at length|at the last] there stood [a glass mountain|a "
        "castle|a hut] before him.",
        'Therein sat the {wonder} and cried, "[At last thou art come|I have waited long for thee]!" And they '
        "[journeyed home "
        "together|parted nevermore].",
    ),
)


def all_titles() -> list[tuple[str, dict[str, str], int]]:
    """Every (title, slots, number of its plot), in a fixed order."""
    found: dict[str, tuple[dict[str, str], int]] = {}
    counts = "three four five six seven eight nine ten twelve".split()
    for number, plot in enumerate(PLOTS):
        for hero in HEROES:
            for wonder in WONDERS:
                for quality in QUALITIES:
                    turn = len(found) % len(counts)
                    slots = {"hero": hero, "wonder": wonder, "quality": quality, "count": counts[turn]}
                    slots |= {capital(name): capital(value) for name, value in slots.items()}
                    found.setdefault(plot[0].format(**slots), (slots, number))
    return [(title, slots, number) for title, (slots, number) in found.items()]


def tale(slots: dict[str, str], number: int, rng: random.Random) -> tuple[str, str]:
    """(title, content) of a tale."""
    filled = slots | {"town": rng.choice(tables.TOWNS.split())}
    title, content = tell(PLOTS[number], filled, rng)
    for word in (slots["quality"], slots["hero"]):  # "a enchanted" -> "an enchanted"
        noun = with_article(word)
        content = content.replace(f" a {word}", f" {noun}").replace(f"A {word}", capital(noun))
    return title.replace("a Enchanted", "an Enchanted"), content


__all__ = ["all_titles", "choose", "tale"]
