"""Which files a recipe's `data` stands for: a file itself, the files of a folder, those of a bundled set, or none."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from luthier.errors import DataError
from luthier.recipe.places import DATA_ENDINGS, TEXT_ENDINGS, ending_of
from luthier.recipe.schema import BUNDLED_DATA, DataSource

__all__ = ["expand_bundled", "files_of", "open_error"]

_SHOWN = 5


def expand_bundled(sources: Sequence[DataSource]) -> tuple[DataSource, ...]:
    """Put the files of a bundled data set in the place of its name.

    A bundled set comes with its own split. With `split: eval` (say) only that part of it is taken.
    """
    expanded: list[DataSource] = []
    for source in sources:
        if source.path not in BUNDLED_DATA:
            expanded.append(source)
            continue
        folder = Path(str(resources.files("luthier"))) / "assets" / "data" / source.path
        for split in ("train", "eval", "test"):
            if source.split in ("all", split):
                path = str(folder / f"{split}.jsonl")
                expanded.append(source.model_copy(update={"path": path, "split": split}))
    return tuple(expanded)


def files_of(path: str) -> tuple[list[str], str | None]:
    """The data files that `path` stands for, sorted, and a note on what else lies there.

    What begins with a dot is passed over, what a link to a folder leads to is not looked at, and a text file is data
    only in a folder of nothing else.

    Raises:
        DataError: it is not there, no file, or a folder without data.
    """
    if os.path.isfile(path):
        return [path], None
    if not os.path.isdir(path):
        raise open_error(path)
    files: list[str] = []
    refused: list[str] = []
    for folder, below, names in os.walk(path, onerror=lambda error: refused.append(str(error.filename))):
        below[:] = sorted(name for name in below if not name.startswith("."))
        files += [os.path.join(folder, name) for name in sorted(names) if not name.startswith(".")]
    if refused:
        raise DataError(f"the folder {refused[0]} cannot be read", "check who may read it (ls -ld)")
    data = [file for file in files if ending_of(file) in DATA_ENDINGS and os.path.isfile(file)]
    # Beside rows, a text is about them: a README, a licence.
    data = [file for file in data if ending_of(file) not in TEXT_ENDINGS] or data
    others = Counter(ending_of(file) or Path(file).name for file in sorted(set(files) - set(data)))
    listed = ", ".join(f"{count} {ending}" for ending, count in others.most_common(_SHOWN))
    if not data:
        found = f"in it are {listed}" if others else "it is empty"
        remedy = f"name a folder with files of these endings: {', '.join(DATA_ENDINGS)} (also .gz, .zst)"
        raise DataError(f"the folder {path} has no data: {found}", remedy)
    left = sum(others.values())
    files_are = "file in the folder is no data and is" if left == 1 else "files in the folder are no data and are"
    return data, f"{left} other {files_are} not read ({listed})" if left else None


def open_error(path: str, error: OSError | None = None) -> DataError:
    """Why the file at `path` cannot be read."""
    place = Path(path)
    if error is not None and place.exists():
        return DataError(f"{path} cannot be read: {error.strerror or error}", "check who may read it (ls -l)")
    if place.exists():
        return DataError(f"{path} is neither a file nor a folder (a pipe or a device)", "write its rows into a file")
    if place.is_symlink():
        return DataError(f"{path} is a link to {os.readlink(path)}, which leads nowhere", "mend the link")
    names = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
    near = difflib.get_close_matches(place.name, [*names, *BUNDLED_DATA], n=1)
    where = "" if place.parent.is_dir() else f"; its folder {place.parent} does not exist either"
    meant = f"did you mean {near[0]}?" if near else f"give a data file, or a bundled set: {', '.join(BUNDLED_DATA)}"
    return DataError(f"there is no file {path}{where}", meant)
