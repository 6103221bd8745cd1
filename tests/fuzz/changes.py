"""How a valid input becomes one that is nearly valid: by its structure, and now and then by its bytes."""

from __future__ import annotations

import json
import random
from typing import TypeAlias, cast

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

ODD: tuple[Json, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 2**31, 2**31 - 1, 2**32, 2**53, 2**60, 2**63, 2**64, 10**30, -(2**63)),
    *(0.0, -0.0, 1.5, 1e-300, 1e300, "", " ", "a", "..", "../../x", "/etc/passwd", "C:\\x", "a\\b", "\u0000", "\u202e"),
    *("__class__", "{{ x }}", "F32", "BF16", "F4", "é" * 50, "x" * 5000, [], {}, [[]], [0], [-1], [2**62, 2**62]),
    *([None], {"a": None}, [1, 2, 3], ["a", "b"], {"type": "Sequence"}, {"Regex": "(a+)+$"}, {"String": ""}),
)


def places(value: Json) -> list[tuple[dict[str, Json] | list[Json], str | int]]:
    """Every (holder, key) in a document."""
    found: list[tuple[dict[str, Json] | list[Json], str | int]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        keys: list[str | int] = []
        if isinstance(one, (dict, list)):
            keys = list(one) if isinstance(one, dict) else list(range(len(one)))
        for key in keys[:200]:
            found.append((cast("dict[str, Json] | list[Json]", one), key))
            todo.append(cast("Json", one[key]))  # type: ignore[call-overload, index]
    return found


def changed(document: Json, chance: random.Random, own: tuple[Json, ...] = ()) -> Json:
    """A copy of the document with one to four changes; `own` are values that this kind of document is sensitive to."""
    made: Json = json.loads(json.dumps(document))
    for _ in range(chance.randint(1, 4)):
        there = places(made)
        if not there:
            return made
        holder, key = chance.choice(there)
        kind = chance.randrange(6)
        value = json.loads(json.dumps(chance.choice(ODD + own + own)))
        if isinstance(holder, dict) and isinstance(key, str):
            _change_object(holder, key, value, kind, chance)
        elif isinstance(holder, list) and isinstance(key, int):
            _change_list(holder, key, value, kind, chance)
    return made


def _change_object(holder: dict[str, Json], key: str, value: Json, kind: int, chance: random.Random) -> None:
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder[chance.choice(["", "a", key + "x", "__metadata__", "..", "\u0000", "ä"])] = holder[key]
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] = cast("int", holder[key]) + chance.choice([-2, -1, 1, 2, 2**31, 2**63, -(2**40)])
    elif kind == 3:
        other = chance.choice(list(holder))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = value


def _change_list(holder: list[Json], key: int, value: Json, kind: int, chance: random.Random) -> None:
    if kind == 0:
        del holder[key]
    elif kind == 1:
        holder.insert(key, holder[key])
    elif kind == 2 and isinstance(holder[key], int):
        holder[key] = cast("int", holder[key]) + chance.choice([-2, -1, 1, 2, 2**31, 2**63, -(2**40)])
    elif kind == 3:
        holder[key] = [holder[key]]
    else:
        holder[key] = value


def bent(text: bytes, chance: random.Random) -> bytes:
    """`text` with a few bytes flipped, cut, doubled or put in."""
    made = bytearray(text)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(made) + 1)
        kind = chance.randrange(7)
        if kind == 0 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del made[at : at + chance.randint(1, 8)]
        elif kind == 2:
            made[at:at] = made[at : at + chance.randint(1, 64)]
        elif kind == 3:
            made[at:at] = chance.choice(
                [b"\xff", b"\x00", b'"', b"[", b"]", b"{", b"}", b",", b":", b"\\", b"\xed\xa0\x80"]
            )
        elif kind == 4:
            made[at:at] = chance.choice(
                [b"NaN", b"Infinity", b"1e999", b"-0", b"9" * 5000, b"\\ud800", b"\xef\xbb\xbf"]
            )
        elif kind == 5:
            del made[at:]
        else:
            made[at:at] = chance.choice([b"[", b"{", b'{"a":', b"- ", b"("]) * chance.choice([3, 70, 600, 30_000])
    return bytes(made)


def bent_sometimes(text: bytes, chance: random.Random, share: float = 0.25) -> bytes:
    """`text`, in a share of the cases bent by bytes too."""
    return bent(text, chance) if chance.random() < share else text


def twice(text: bytes, chance: random.Random) -> bytes:
    """The text of a JSON object with one of its entries written twice."""
    entry = chance.choice([b'"a":1,', b'"__metadata__":{},', b'"model_type":"llama",', b'"weight_map":{},'])
    return text.replace(b"{", b"{" + entry + entry.replace(b"1", b"2"), 1)
