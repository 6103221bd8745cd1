"""The store: what is written is what is read, at every kill the old state or none, and one builder at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.store import ROW, Part, StoreWriter, building, open_store

FILES = ("rows.bin", "ids.bin", "trained.bin", "fields.bin", "group.bin", "rejected.jsonl")


def part(lengths: list[int], first: int = 0) -> Part:
    """Rows of these lengths; what a row holds follows from its number, so that it can be checked."""
    rows = np.zeros(len(lengths), dtype=ROW)
    rows["length"], rows["line"] = lengths, np.arange(first, first + len(lengths))
    rows["content"] = np.arange(first, first + len(lengths)) + 1
    fields = [json.dumps({"n": str(first + i)}).encode() for i in range(len(lengths))]
    rows["fields_size"] = [len(one) for one in fields]
    ids = np.concatenate([np.arange(n) + 1000 * (first + i) for i, n in enumerate(lengths)] or [np.zeros(0)])
    signature = np.random.default_rng(first).integers(0, 2**16, (len(lengths), 64), dtype=np.uint16)
    return Part(rows, ids.astype(np.int32), ids % 2 == 1, b"".join(fields), signature, b"")


def write(folder: Path, parts: list[list[int]], saves: list[bool]) -> None:
    writer, first = StoreWriter(folder), 0
    for lengths, save in zip(parts, saves, strict=True):
        writer.add(part(lengths, first))
        first += len(lengths)
        writer.row = first
        if save:
            writer.save()
    writer.finish()


LENGTHS = st.lists(st.lists(st.integers(1, 9), max_size=5), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(LENGTHS)
def test_what_was_written_is_read(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("store") / "key"
    write(folder, parts, [False] * len(parts))
    store = open_store(folder)
    assert store is not None
    lengths = [n for one in parts for n in one]
    assert store.rows["length"].tolist() == lengths
    for row, length in enumerate(lengths):
        offset = int(store.rows["offset"][row])
        assert store.ids[offset : offset + length].tolist() == [1000 * row + i for i in range(length)]
        assert store.trained[offset : offset + length].tolist() == [(1000 * row + i) % 2 for i in range(length)]
        assert store.fields(row) == {"n": str(row)}


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.data())
def test_a_builder_that_was_stopped_goes_on_from_what_it_saved(tmp_path_factory, parts, data):
    """Stopped at any part, with any junk after what was saved: the end is the same, byte for byte."""
    folder = tmp_path_factory.mktemp("store")
    write(folder / "whole", parts, [False] * len(parts))
    stop = data.draw(st.integers(0, len(parts)))
    saved = data.draw(st.integers(0, stop))
    writer, first, kept = StoreWriter(folder / "key"), 0, 0
    for number, lengths in enumerate(parts[:stop], 1):
        writer.add(part(lengths, first))
        first += len(lengths)
        writer.row = first
        if number == saved:
            writer.save()
            kept = number
    writer.close()
    for name in data.draw(st.lists(st.sampled_from(FILES[:4]))):  # a part of what was not saved came to the disk
        with (folder / "key.building" / name).open("ab") as file:
            file.write(b"junk")
    again = StoreWriter(folder / "key")
    assert again.row == sum(map(len, parts[:kept]))
    for lengths in parts[kept:]:
        again.add(part(lengths, again.row))
        again.row += len(lengths)
    again.finish()
    for name in FILES:
        assert (folder / "key" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("name", FILES)
def test_a_store_with_a_file_cut_short_or_gone_is_none(tmp_path, name):
    write(tmp_path / "key", [[3, 4, 5]], [False])
    file = tmp_path / "key" / name
    if file.stat().st_size:
        os.truncate(file, file.stat().st_size - 1)
        assert open_store(tmp_path / "key") is None
    file.unlink()
    assert open_store(tmp_path / "key") is None


def test_a_damaged_store_is_built_again(tmp_path):
    write(tmp_path / "key", [[3, 4, 5]], [False])
    (tmp_path / "key" / "ids.bin").unlink()
    write(tmp_path / "key", [[3, 4, 5]], [False])
    assert open_store(tmp_path / "key") is not None


def test_progress_that_vouches_for_more_than_is_there_is_not_believed(tmp_path):
    writer = StoreWriter(tmp_path / "key")
    writer.add(part([3, 4]))
    writer.row = 2
    writer.save()
    writer.close()
    os.truncate(tmp_path / "key.building" / "ids.bin", 4)
    again = StoreWriter(tmp_path / "key")
    assert (again.row, again.written) == (0, 0)


def _hold(folder: Path, ready: multiprocessing.synchronize.Event, go: multiprocessing.synchronize.Event) -> None:
    with building(folder, lambda: None):
        ready.set()
        go.wait(60)


def test_one_process_builds_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "key", ready, go))
    other.start()
    assert ready.wait(60)
    waited: list[bool] = []

    def waiting() -> None:
        waited.append(other.is_alive())
        go.set()

    with building(tmp_path / "key", waiting):
        other.join(60)
    assert waited == [True]
    with building(tmp_path / "key", lambda: pytest.fail("nobody holds it")):
        pass


PREPARE = """
import sys
from pathlib import Path
import luthier.data.build as build
from luthier.data.prepare import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.recipe.schema import Recipe
build._FIRST_ROWS, build._CHUNK_ROWS, build._SAVE_SECONDS = 16, 16, 0.0  # many moments to be killed at
recipe = Recipe(model="unused", data=[sys.argv[1]])
tokenizer = load_tokenizer(Path(sys.argv[2]))
print("ready", flush=True)
print(prepare(recipe, tokenizer).digest, flush=True)
"""


def _prepare(rows: Path, tokenizer: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(rows), str(tokenizer)],
        env={**os.environ, "LUTHIER_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.ci
def test_after_a_kill_at_any_moment_the_next_start_ends_with_the_same_store(tmp_path):
    from tests import tiny
    from tests.data.chats import make_chat_tokenizer

    make_chat_tokenizer(tmp_path / "tokenizer")
    questions = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}." * (n % 7 + 1)} for n in range(4000)]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", questions)
    undisturbed = _prepare(rows, tmp_path / "tokenizer", tmp_path / "undisturbed")
    assert undisturbed.stdout is not None
    undisturbed.stdout.readline()
    began = time.monotonic()
    digest = undisturbed.stdout.readline()
    takes = time.monotonic() - began
    assert undisturbed.wait() == 0
    cache, moments = tmp_path / "killed", random.Random(0)
    for _ in range(8):
        process = _prepare(rows, tmp_path / "tokenizer", cache)
        assert process.stdout is not None
        process.stdout.readline()
        with suppress(subprocess.TimeoutExpired):
            process.wait(moments.random() * takes * 0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = _prepare(rows, tmp_path / "tokenizer", cache)
    assert process.communicate()[0].splitlines() == ["ready", digest.strip()]
    (one,) = (folder for folder in (tmp_path / "undisturbed" / "tokens").iterdir() if folder.is_dir())
    (other,) = (folder for folder in (cache / "tokens").iterdir() if folder.is_dir())
    for name in (*FILES, "store.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
