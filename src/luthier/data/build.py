"""From open sources to a store: read, write by the template, tokenise, append; in chunks, so that memory is constant.

    main thread       read -> conversations -> text with spans            labels, signatures, append
    tokenizer thread                            tokenise (all cores; Python is not held)

Two chunks are under way at a time. A row that cannot be used is put aside with its reason and is no error here.
"""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from luthier.data.conversation import Conversation
from luthier.data.duplicates import signatures, spoken
from luthier.data.labels import EncodedChunk, RowFault, Tokenized
from luthier.data.problems import BadRow, RowProblem
from luthier.data.render import Template
from luthier.data.sources import OpenSource
from luthier.data.split import content_key, value_key
from luthier.data.store import ROW, Part, Rejected, StoreWriter
from luthier.errors import Interrupted

__all__ = ["Progress", "build_store"]

Progress = Callable[[int, int], None]
"""Called with rows done and rows in all, now and then; in all is an estimate until the last call."""

_FIRST_ROWS, _CHUNK_ROWS = 64, 512
_CHUNK_CHARACTERS = 2**21
"""What is tokenised together: enough to keep all cores busy, little enough for memory and to show progress. The first
chunks are small, so that the tokenizer has something to do at once."""
_SAVE_SECONDS = 5.0
_RAW = 2000
_PACKED = (".gz", ".zst", ".parquet")


@dataclass
class _Chunk:
    """Consecutive rows of one source. `ordinals` are the rows of `conversations` in it, from 0; `end` is the next."""

    source: int
    end: int
    conversations: list[Conversation] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    characters: int = 0


def build_store(
    folder: Path,
    sources: Sequence[OpenSource],
    template: Template,
    split_by: str | None,
    progress: Progress | None,
    unchanged: Callable[[], None],
) -> None:
    """Make the store in `folder`, or go on making it. Hold `store.building(folder)`.

    `unchanged` is called when all is read, and raises where the sources are no longer what they were.

    Raises:
        Interrupted: SIGINT came; what was saved is gone on with at the next start.
    """
    writer = StoreWriter(folder)
    if not writer.counts.read:
        writer.counts.read, writer.counts.rejected = [0] * len(sources), [0] * len(sources)
    loses_systems = "{" in template.name and "{system}" not in template.name
    meter = _Meter(sources, progress)
    saved = time.monotonic()
    try:
        with _all_cores(), _without_collections():
            for chunk, encoded in _encoded(_chunks(sources, writer.source, writer.row, split_by), template):
                writer.add(_part(chunk, encoded, sources[chunk.source], split_by))
                _count(writer, chunk, encoded, loses_systems)
                meter.tell(chunk, sum(writer.counts.read))
                if time.monotonic() - saved > _SAVE_SECONDS:
                    writer.save()
                    gc.collect()
                    saved = time.monotonic()
        unchanged()
        writer.finish()
    except KeyboardInterrupt as stop:  # nothing is saved here: it may have come in the middle of a part
        raise Interrupted(
            f"stopped while the data was prepared, at row {sum(writer.counts.read):,}",
            "run the same command again: it goes on from there, but for the last few seconds",
        ) from stop
    finally:
        writer.close()
    if progress is not None:
        progress(sum(writer.counts.read), sum(writer.counts.read))


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let the tokenizers library use its threads, which it looks up at every call."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def _without_collections() -> Iterator[None]:
    """No automatic search for reference cycles: a chunk has tens of thousands of objects and no cycle, and looking
    through them again and again costs a tenth of the time. What there is all the same is collected at every save."""
    was_on = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _chunks(sources: Sequence[OpenSource], source: int, row: int, split_by: str | None) -> Iterator[_Chunk]:
    """All rows from row `row` of source `source` on."""
    most = _FIRST_ROWS
    for number in range(source, len(sources)):
        start = row if number == source else 0
        chunk = _Chunk(number, start)
        for found in sources[number].rows(start):
            if isinstance(found, BadRow):
                chunk.bad.append(found)
            elif split_by is not None and _split_value(found, sources[number], split_by) is None:
                chunk.bad.append(_without_key(found, chunk.end, split_by))
            else:
                chunk.conversations.append(found)
                chunk.ordinals.append(chunk.end)
                chunk.characters += sum([len(turn.content) for turn in found.turns])
                chunk.characters += sum(map(len, found.fields.values()))  # columns that no template names, too
            chunk.end += 1
            if len(chunk.conversations) + len(chunk.bad) >= most or chunk.characters >= _CHUNK_CHARACTERS:
                yield chunk
                chunk = _Chunk(number, chunk.end)
                most = min(2 * most, _CHUNK_ROWS)
        yield chunk


def _encoded(chunks: Iterator[_Chunk], template: Template) -> Iterator[tuple[_Chunk, EncodedChunk]]:
    """Each chunk with its ids and labels, while the one after it is read and the one between is tokenised."""
    with ThreadPoolExecutor(1, thread_name_prefix="tokenizer") as thread:
        under_way: deque[tuple[_Chunk, Future[Tokenized]]] = deque()
        for chunk in chunks:
            under_way.append((chunk, thread.submit(template.tokenize, template.write(chunk.conversations))))
            if len(under_way) > 2:
                done, tokenized = under_way.popleft()
                yield done, template.label(tokenized.result())
        while under_way:
            done, tokenized = under_way.popleft()
            yield done, template.label(tokenized.result())


def _split_value(conversation: Conversation, source: OpenSource, split_by: str) -> str | None:
    """The row's value of the key that `split_by` names as the user's file does; None where it has none."""
    renamed = {theirs: ours for ours, theirs in source.recipe.fields.items()}
    value = conversation.fields.get(renamed.get(split_by, split_by))
    if source.format in ("messages", "sharegpt") and any(value is turn.content for turn in conversation.turns):
        return None  # a name that formats.py gives a turn, and no key of the row
    return value


def _part(chunk: _Chunk, encoded: EncodedChunk, source: OpenSource, split_by: str | None) -> Part:
    good = [i for i in range(len(chunk.conversations)) if i not in encoded.faults]
    conversations = chunk.conversations if not encoded.faults else [chunk.conversations[i] for i in good]
    rows = np.zeros(len(conversations), dtype=ROW)
    lengths = encoded.lengths[good]
    starts = np.cumsum(lengths) - lengths
    trained = encoded.labels
    rows["length"] = lengths
    if len(lengths):
        rows["labelled"] = np.add.reduceat(trained, starts, dtype=np.int64) - trained[starts]
    rows["answer"] = encoded.answers[good]
    rows["source"] = chunk.source
    rows["line"] = np.fromiter((c.source.line for c in conversations), dtype=np.int64, count=len(conversations))
    rows["content"] = np.frombuffer(b"".join(map(content_key, conversations)), dtype=">u8")
    if split_by is not None:
        values = (_split_value(conversation, source, split_by) for conversation in conversations)
        keys = b"".join(value_key(value) for value in values if value is not None)
        rows["group_key"] = np.frombuffer(keys, dtype=">u8")
    fields = [orjson.dumps(dict(c.fields)) for c in conversations] if source.recipe.split != "train" else []
    rows["fields_size"] = np.fromiter(map(len, fields), dtype=np.int32) if fields else 0
    return Part(
        rows=rows,
        ids=encoded.ids,
        trained=trained,
        fields=b"".join(fields),
        signatures=signatures([spoken(conversation) for conversation in conversations]),
        rejected=_rejected(chunk, encoded),
    )


def _rejected(chunk: _Chunk, encoded: EncodedChunk) -> bytes:
    """The chunk's unusable rows as lines of rejected.jsonl, in the order of their rows."""
    bad = [(one.problem.row or 0, one) for one in chunk.bad]
    bad += [(chunk.ordinals[i], _faulty(chunk, i, fault)) for i, fault in encoded.faults.items()]
    lines: list[bytes] = []
    for _, one in sorted(bad, key=lambda pair: pair[0]):
        document = Rejected(chunk.source, one.problem, one.raw)._asdict() | {"problem": one.problem._asdict()}
        lines.append(orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _faulty(chunk: _Chunk, i: int, fault: RowFault) -> BadRow:
    conversation = chunk.conversations[i]
    problem = RowProblem(*conversation.source, None, chunk.ordinals[i], fault.reason, fault.remedy)
    raw = orjson.dumps([turn[:2] for turn in conversation.turns]).decode()
    return BadRow(problem, raw[:_RAW])


def _without_key(conversation: Conversation, ordinal: int, key: str) -> BadRow:
    reason = f"the row has no text under {key!r}, by which `split_by` keeps rows together"
    remedy = "give it one, or take split_by out"
    problem = RowProblem(*conversation.source, None, ordinal, reason, remedy)
    return BadRow(problem, orjson.dumps(dict(conversation.fields)).decode()[:_RAW])


def _count(writer: StoreWriter, chunk: _Chunk, encoded: EncodedChunk, loses_systems: bool) -> None:
    counts = writer.counts
    counts.read[chunk.source] += len(chunk.conversations) + len(chunk.bad)
    counts.rejected[chunk.source] += len(chunk.bad) + len(encoded.faults)
    counts.parted += int(np.count_nonzero(encoded.parted))
    if loses_systems:
        counts.systems_lost += sum(conversation.turns[0].role == "system" for conversation in chunk.conversations)
    writer.source, writer.row = chunk.source, chunk.end


class _Meter:
    """Tells how far the work is: how many rows there will be follows from the files' sizes and the rows so far."""

    def __init__(self, sources: Sequence[OpenSource], progress: Progress | None) -> None:
        self._progress = progress
        files = [Path(source.path) for source in sources]
        # Text packs to about a third.
        self._bytes = sum(f.stat().st_size * (3 if f.suffix in _PACKED else 1) for f in files if f.is_file())
        self._rows = self._characters = 0

    def tell(self, chunk: _Chunk, done: int) -> None:
        self._rows += len(chunk.conversations)
        self._characters += chunk.characters
        if self._progress is not None and self._characters:
            self._progress(done, max(done, self._bytes * self._rows // self._characters))
