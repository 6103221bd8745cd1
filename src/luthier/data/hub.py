"""Data sets of the Hugging Face hub, by their id, through the `datasets` library; the only file that imports it.

No code of a data set is ever run: the library reads data files only (since its version 4), and is asked for no more.
`hf://` before a folder's path reads that folder as the hub would, with its card's configurations and splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.data.rawrow import RawRow, Read
from luthier.errors import DataError
from luthier.recipe.places import HUB_SCHEME, reads_as_hub_set
from luthier.recipe.schema import DataSource

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["is_hub_id", "open_hub"]

_BATCH = 256
_WITHOUT_SCRIPTS = 4
"""The first version of datasets that runs no program of a data set."""


def is_hub_id(path: str) -> bool:
    """Whether `path` names a data set of the hub: hf://…, or owner/name where nothing of that name lies here."""
    return path.startswith(HUB_SCHEME) or (reads_as_hub_set(path) and not os.path.exists(path))


def open_hub(source: DataSource) -> tuple[str, Read, str]:
    """What it is in words, how its rows are read, and what tells this version of it from others.

    Raises:
        DataError: the library is missing; or the data set cannot be reached, found or read.
    """
    try:
        import datasets
        from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # httpx's, or httpx2's
    except ImportError as error:
        message = f"{source.path}: data sets of the hub need the library datasets"
        raise DataError(message, 'pip install "luthier[data]"') from error
    if int(datasets.__version__.partition(".")[0]) < _WITHOUT_SCRIPTS:
        message = f"{source.path}: the library datasets is of version {datasets.__version__}, which runs foreign code"
        raise DataError(message, 'pip install -U "luthier[data]"')
    name = source.path.removeprefix(HUB_SCHEME)
    if os.path.isabs(name) and not os.path.isdir(name):
        raise DataError(f"{source.path}: there is no folder {name}", "name a folder, or a data set as hf://owner/name")
    try:
        builder = datasets.load_dataset_builder(name, source.subset)
        if source.stream:
            found = builder.as_streaming_dataset(split=source.hub_split)
        else:
            if os.path.isdir(name):  # of a folder the library would give what it read before, changed or not
                modes = (datasets.DownloadMode.REUSE_CACHE_IF_EXISTS, datasets.VerificationMode.NO_CHECKS)
                builder.download_and_prepare(download_mode=modes[0], verification_mode=modes[1])
            else:
                builder.download_and_prepare()
            found = builder.as_dataset(split=source.hub_split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _unknown(source, str(error)) from error
    except HfHubHTTPError as error:
        message = f"{source.path}: the hub answered with an error: {error}"
        raise DataError(message, "try again later, or write its rows as JSONL") from error
    except (ConnectionError, HTTPError) as error:
        raise _unreachable(source) from error
    except RuntimeError as error:
        raise _script(source, str(error)) from error
    except ValueError as error:
        raise _wrong_part(source, str(error)) from error
    except (datasets.exceptions.DatasetsError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        cause = "" if error.__cause__ is None else f" ({error.__cause__})"
        where = name if os.path.isdir(name) else f"https://huggingface.co/datasets/{name}"
        remedy = f"look at its files ({where}), or write its rows as JSONL and name that file"
        raise DataError(f"{source.path}: its files cannot be read: {reason}{cause}", remedy) from error
    version = [*_state(name), builder.config_id, source.hub_split, str(builder.config.version), str(builder.hash)]
    kind = f"a data set of the hub, {builder.config.name}, split {source.hub_split}"
    return kind + (", streamed" if source.stream else ""), _reader(found), "\n".join(version)


def _state(name: str) -> list[str]:
    """Of a data set on the hub its name, for the library knows its revision; of a folder, when its files changed."""
    if not os.path.isdir(name):
        return [name]
    found: list[str] = []
    for folder, below, files in os.walk(name):
        below.sort()
        for file in sorted(files):
            at = os.path.join(folder, file)
            state = os.stat(at)
            found.append(f"{os.path.relpath(at, name)} {state.st_size} {state.st_mtime_ns}")
    return found


def _reader(found: Dataset | IterableDataset) -> Read:
    def read(path: str, start: int) -> Iterator[RawRow]:
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        number = start
        try:
            for columns in (found.skip(start) if start else found).iter(_BATCH):
                for cells in zip(*columns.values(), strict=True):
                    number += 1
                    yield number, 1, dict(zip(columns, cells, strict=True)), None
        except (OSError, ValueError, HTTPError) as error:
            message = f"{path}: after row {number} nothing more can be read: {error}"
            raise DataError(message, "try again; without `stream` its files are kept once they are there") from error

    return read


def _unreachable(source: DataSource) -> DataError:
    name = source.path.removeprefix(HUB_SCHEME)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    why = "HF_HUB_OFFLINE forbids to ask for it" if offline else "the hub cannot be reached"
    also = "" if source.path.startswith(HUB_SCHEME) else "; and here is no file or folder of that name"
    remedy = (
        f"where there is a network: hf download {name} --repo-type dataset --local-dir rows; then bring that folder "
        "here and name it: data: hf:///the/full/path/of/rows"
    )
    return DataError(f"{source.path}: the data set is not on this computer, and {why}{also}", remedy)


def _unknown(source: DataSource, reason: str) -> DataError:
    name = source.path.removeprefix(HUB_SCHEME)
    if "gated" in reason or "authenticated" in reason:
        remedy = f"ask for access at https://huggingface.co/datasets/{name}, then: hf auth login"
        return DataError(f"{source.path}: the data set may be read only by those who were given access", remedy)
    also = "" if source.path.startswith(HUB_SCHEME) else ", and here is no file or folder of that name"
    remedy = "look its name up at https://huggingface.co/datasets; for one of your own that is private: hf auth login"
    return DataError(f"{source.path}: the hub has no data set of that name that you may read{also}", remedy)


def _script(source: DataSource, reason: str) -> DataError:
    if "scripts are no longer supported" not in reason:
        return DataError(f"{source.path}: it cannot be read: {reason}", "write its rows as JSONL and name that file")
    message = f"{source.path}: its rows come out of a program of its author, and no foreign code is run"
    return DataError(message, "look for a copy of it as Parquet on the hub, or write its rows as JSONL")


def _wrong_part(source: DataSource, reason: str) -> DataError:
    """A configuration or split that there is none of; the library's message lists those that there are."""
    listed = re.search(r"\[([^\]]*)\]", reason)
    there = listed.group(1).replace("'", "").replace('"', "") if listed else ""
    known = f"it has {there}" if there else reason
    if "onfig" in reason:
        asked = "several subsets, and none is named" if source.subset is None else f"no subset {source.subset!r}"
        return DataError(f"{source.path}: the data set has {asked}", f"set `subset`; {known}")
    if "split" in reason:
        return DataError(f"{source.path}: the data set has no split {source.hub_split!r}", f"set `hub_split`; {known}")
    return DataError(f"{source.path}: it cannot be read: {reason}", "write its rows as JSONL and name that file")
