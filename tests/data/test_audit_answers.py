"""How answers begin, which come again, who speaks: exact counts where they fit, elsewhere never too high."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.audit import answers
from luthier.data.audit.answers import Openings, Speakers, repeated_answers
from luthier.data.conversation import Conversation, Source, Turn


def test_openings_are_three_words() -> None:
    openings = Openings()
    for answer in ("Arr, ye be right", "Arr,  ye\nbe wrong", "So it is"):
        openings.add(answer)
    assert openings.most_common() == [("Arr, ye be", 2)]
    assert openings.answers == 3


@given(st.lists(st.integers(0, 30)))
def test_with_too_many_openings_a_count_is_never_too_high(numbers: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "_MOST_DIFFERENT", 8)
        openings = Openings()
        for number in numbers:
            openings.add(f"opening {number} is")
    true = Counter(f"opening {number} is" for number in numbers)
    assert all(count <= true[opening] for opening, count in openings.most_common())


@given(st.lists(st.integers(0, 9), min_size=1))
def test_repeated_answers(hashes: list[int]) -> None:
    different, found = repeated_answers(np.array(hashes, dtype=np.uint64))
    true = Counter(hashes)
    assert different == len(true)
    assert {hashes[one.row]: one.rows for one in found} == {value: n for value, n in true.items() if n > 1}
    assert [one.rows for one in found] == sorted((one.rows for one in found), reverse=True)
    assert all(hashes.index(hashes[one.row]) == one.row for one in found)


def test_speakers() -> None:
    speakers = Speakers()
    source = Source("a.jsonl", 1)
    ask, say, silent = Turn("user", "a"), Turn("assistant", "b", train=True), Turn("assistant", "c")
    speakers.add(Conversation((Turn("system", "s"), ask, silent, ask, say), source))
    speakers.add(Conversation((ask, silent, Turn("tool", ""), say), source))
    speakers.add(Conversation((say,), source, plain=True))
    assert (speakers.rows, speakers.turns, speakers.longest) == (3, 10, 5)
    assert (speakers.with_system, speakers.with_tool, speakers.several_answers, speakers.plain) == (1, 1, 2, 1)
    assert (speakers.answers, speakers.untrained_answers) == (5, 2)
