"""What `data:` may name: by the text alone, without looking whether it is there."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["DATA_ENDINGS", "HUB_SCHEME", "PACKED_ENDINGS", "TEXT_ENDINGS", "ending_of", "reads_as_hub_set"]

TEXT_ENDINGS = (".txt", ".md")
DATA_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", *TEXT_ENDINGS)
PACKED_ENDINGS = (".gz", ".zst")
HUB_SCHEME = "hf://"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def ending_of(path: str) -> str:
    """The ending that says what is in the file: `.jsonl` of `rows.jsonl.gz`."""
    name = Path(path)
    return Path(name.stem if name.suffix.lower() in PACKED_ENDINGS else name.name).suffix.lower()


def reads_as_hub_set(path: str) -> bool:
    """Whether the text is hf://…, or owner/name without the ending of a data file: a data set of the hub, unless a file
    or folder of that name is here."""
    return path.startswith(HUB_SCHEME) or (_HUB_ID.fullmatch(path) is not None and ending_of(path) not in DATA_ENDINGS)
