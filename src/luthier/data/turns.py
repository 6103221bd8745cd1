"""A list of turns, as chats are written: who speaks, what, and whether it is learned; and in which order.

    [system] user assistant user assistant …    after an assistant's turn tools may speak, then the assistant again

The last turn is the assistant's: what comes after it could not be learned, and would be lost without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from luthier.data.conversation import ROLES, Role, Turn

__all__ = ["OPENAI", "SHAREGPT", "RowError", "TurnLayout", "kind_of", "read_turns"]


_make = tuple.__new__  # of a named tuple: half the time of calling its class


class RowError(Exception):
    """What is wrong with one row, and what to do about it.

    `key` is the key that it is about, None for none: one of the row's own, or with `occurrence` one of its turns', that
    which has so many of the same name before it.
    """

    def __init__(self, reason: str, remedy: str, key: str | None = None, occurrence: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.remedy, self.key, self.occurrence = reason, remedy, key, occurrence


Steps: TypeAlias = "dict[str, tuple[Role, bool, Steps]]"
"""What may come next in a list of turns: by the name in the file, the role, whether it is learned, and what may come
after it. Plain tuples, because one is unpacked for every turn."""

_MAY_FOLLOW: Mapping[Role | None, tuple[Role, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}


class TurnLayout:
    """How turns are written.

    Attributes:
        role, text: the keys under which a turn has its role and its text.
        roles: what the roles are called in the file.
        first: what a list may begin with.
    """

    def __init__(self, role: str, text: str, roles: Mapping[str, Role]) -> None:
        self.role, self.text, self.roles = role, text, roles
        after: dict[Role | None, Steps] = {before: {} for before in _MAY_FOLLOW}
        for before, following in _MAY_FOLLOW.items():
            for name, role_ in roles.items():
                if role_ in following:
                    after[before][name] = (role_, role_ == "assistant", after[role_])
        self.first = after[None]


OPENAI = TurnLayout("role", "content", {role: role for role in ROLES} | {"developer": "system"})
SHAREGPT = TurnLayout(
    "from",
    "value",
    {
        "system": "system",
        "human": "user",
        "user": "user",
        "gpt": "assistant",
        "assistant": "assistant",
        "model": "assistant",
        "tool": "tool",
        "observation": "tool",
    },
)

_KINDS = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", str: "text"} | {
    list: "a list",
    dict: "an object",
}


def kind_of(value: object) -> str:
    """What sort of value it is, in words."""
    return _KINDS.get(type(value), type(value).__name__)


def read_turns(value: object, key: str, layout: TurnLayout, system: str) -> tuple[Turn, ...]:
    """The turns in the list `value`, which stands under `key`; `system`, where there is one, comes before them.

    Raises:
        RowError: they cannot be learned from.
    """
    if not isinstance(value, list):
        raise _no_list(value, key, layout)
    role_key, text_key, steps = layout.role, layout.text, layout.first
    turns: list[Turn] = []
    role: Role | None = None
    learned = False
    for row in value:
        try:
            content = row[text_key]
            role, train, steps = steps[row[role_key]]
        except (KeyError, TypeError):  # a key is missing, the role may not be here, or it is no object at all
            raise _refused(value, len(turns), key, layout) from None
        if content.__class__ is not str or ((not content or content.isspace()) and role != "tool"):
            raise _refused(value, len(turns), key, layout)  # a tool may well return nothing
        if len(row) != 2:
            train = _trained(value, len(turns), key, role)
        if train:
            learned = True
        turns.append(_make(Turn, (role, content, train)))
    if role != "assistant" or not learned:
        raise _nothing_learned(turns, key, layout)
    if system and not system.isspace():
        _put_first(turns, system, key)
    return tuple(turns)


def _put_first(turns: list[Turn], system: str, key: str) -> None:
    if turns[0].role != "system":
        turns.insert(0, Turn("system", system))
    elif turns[0].content != system:
        reason = f"two system turns: 'system' says something else than the first of {key!r}"
        raise RowError(reason, "keep one of them", "system")


def _trained(rows: Sequence[Mapping[str, object]], number: int, key: str, role: Role) -> bool:
    """Whether a turn that says more than role and text is learned: `train`, or `weight` as OpenAI's files have it."""
    row = rows[number]
    if row.get("tool_calls"):
        raise _tool_calls(rows, number, key)
    train, weight = row.get("train"), row.get("weight")  # null is what Parquet writes where there is nothing
    place = f"{key}, turn {number + 1}"
    if train is not None and not isinstance(train, bool):
        reason = f"{place}: 'train' must be true or false, not {train!r}"
        raise RowError(reason, "write true or false", "train", _before(rows, number, "train"))
    if weight is not None and weight not in (0, 1):
        reason = f"{place}: 'weight' must be 0 or 1, not {weight!r}"
        raise RowError(reason, "write train: true or false", "weight", _before(rows, number, "weight"))
    if role == "assistant":
        return train is not False and weight != 0
    if train:
        reason = f"{place}: 'train' is true, but only the assistant's turns are learned"
        remedy = "take it out; to learn all of the text, set train_on: all"
        raise RowError(reason, remedy, "train", _before(rows, number, "train"))
    return False


def _before(rows: Sequence[Mapping[str, object]], number: int, key: str) -> int:
    """How many turns before that one have the key."""
    return sum(key in row for row in rows[:number])


def _tool_calls(rows: Sequence[Mapping[str, object]], number: int, key: str) -> RowError:
    reason = f"{key}, turn {number + 1}: tool calls are not read"
    return RowError(reason, "write the call into the turn's text", "tool_calls", _before(rows, number, "tool_calls"))


def _no_list(value: object, key: str, layout: TurnLayout) -> RowError:
    remedy = f'write the turns: "{key}": [{{"{layout.role}": …, "{layout.text}": …}}, …]'
    if isinstance(value, str) and value.lstrip().startswith("["):
        remedy = "the list was written as one text (twice encoded): write it as a list"
    return RowError(f"{key!r} must be a list, not {kind_of(value)}", remedy, key)


def _refused(rows: Sequence[Mapping[str, object]], number: int, key: str, layout: TurnLayout) -> RowError:
    """Why a turn is none."""
    place, row = f"{key}, turn {number + 1}", rows[number]
    role_key, text_key, roles = layout.role, layout.text, layout.roles
    if not isinstance(row, dict):
        reason = f"{place}: must be an object with {role_key!r} and {text_key!r}, not {kind_of(row)}"
        return RowError(reason, f'write {{"{role_key}": …, "{text_key}": …}}', key)
    if role_key not in row or text_key not in row:
        missing = role_key if role_key not in row else text_key
        other = next((o for o in (OPENAI, SHAREGPT) if o is not layout and o.role in row and o.text in row), None)
        remedy = f"add {missing!r} to the turn"
        if other is not None:
            remedy = f"the turn has {other.role!r} and {other.text!r}: call them {role_key!r} and {text_key!r}"
        return RowError(f"{place}: {missing!r} is missing", remedy, key)
    role, text = row[role_key], row[text_key]
    if not isinstance(role, str) or role not in roles:
        known = ", ".join(sorted(roles))
        return RowError(f"{place}: {role_key!r} is {role!r}; known are {known}", "use one of them", role_key, number)
    if row.get("tool_calls"):
        return _tool_calls(rows, number, key)
    if not isinstance(text, str):
        remedy = "write it in quotes" if isinstance(text, (int, float)) else "write the text, or take the row out"
        return RowError(f"{place}: {text_key!r} must be text, not {kind_of(text)}", remedy, text_key, number)
    if roles[role] != "tool" and not text.strip():
        nothing = "empty" if not text else "only spaces"
        reason = f"{place}: the {roles[role]}'s turn is {nothing}"
        return RowError(reason, "write the text, or take the row out", text_key, number)
    before = rows[number - 1] if number else None
    came_before = roles[before[role_key]] if isinstance(before, dict) else None
    return _out_of_order(number, key, layout, came_before, roles[role])


def _out_of_order(number: int, key: str, layout: TurnLayout, before: Role | None, role: Role) -> RowError:
    place = f"{key}, turn {number + 1}"
    if role == "system":
        which = "a second system turn" if before == "system" else "a system turn after others"
        remedy = "join them into one" if before == "system" else "put it first, or take it out"
        return RowError(f"{place}: {which}; a system turn can only be the first", remedy, layout.role, number)
    if before == role:
        reason = f"{place}: the {role} speaks twice in a row"
        return RowError(reason, "join the two into one turn, or add the one between", layout.role, number)
    if before is None or before == "system":
        reason = f"{place}: the {role} speaks first; a user's turn must come before"
        return RowError(reason, "add the user's turn, or take this one out", layout.role, number)
    reason = f"{place}: roles out of order: a {role}'s turn cannot follow the {before}'s"
    return RowError(reason, "the order is user, assistant, and tools only after the assistant", layout.role, number)


def _nothing_learned(turns: Sequence[Turn], key: str, layout: TurnLayout) -> RowError:
    if not any(turn.role == "assistant" for turn in turns):
        reason = f"{key}: there is no assistant turn, so nothing to learn"
        return RowError(reason, "add the answer, or take the row out", key)
    last = turns[-1].role
    if last != "assistant":
        reason = f"{key}, turn {len(turns)}: the last turn is the {last}'s, and no answer follows"
        return RowError(reason, "add the answer, or take the turn out", layout.role, len(turns) - 1)
    reason = f"{key}: every assistant turn is marked as not learned, so nothing to learn"
    return RowError(reason, "take the row out, or mark a turn with train: true", key)
