"""A model's name -> the folder with its files. No torch here.

`sprig` is the model bundled with the package; a path is a folder in Hugging Face's layout; anything else is an id on
the Hugging Face hub, of which the safetensors, JSON, tokenizer and license files are fetched into the hub's own cache
(never pickled weights, never code). The config comes first, so that a family that is not supported costs no long
download; a plan needs no more than that (`locate_config`).
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from luthier.errors import ModelError
from luthier.guard.documents import INDEX_BYTES, read_object
from luthier.guard.inside import check_folder, check_inside, inside, is_name
from luthier.model.config import read_config

__all__ = ["BUNDLED", "locate_config", "locate_model", "pinned_to", "revision_of", "weight_files"]

BUNDLED = "sprig"
"""The name of the model that comes with the package."""

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SMALL_FILES = (
    *("*.json", "*.jinja", "tokenizer.model", "merges.txt"),
    *("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*"),  # the terms go with what is made of the model
)
CONFIG_FILES = (
    *("config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "*.jinja", "chat_template.json"),
)
"""What says of a model what it is and how it reads text."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
MOST_SHARDS = 10_000
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors")
HUB_ID = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?", re.ASCII)
"""A model on the hub; after an @ a branch, a tag, or the commit that it is pinned to."""
COMMIT = re.compile(r"[0-9a-f]{40}")


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a model, shards in the order of their names.

    Raises ModelError where there are none, some are missing, or only pickled weights are there; FileError where the
    index is damaged, or a file leads out of the folder.
    """
    index = folder / INDEX
    if index.is_file():
        return _shards(index)
    if (folder / SINGLE).is_file():
        check_inside(folder, folder / SINGLE)
        return (folder / SINGLE,)
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder} has only pickled weights ({', '.join(pickled[:3])}); opening a pickle can run code",
            "Convert it once, where you trust it: transformers' AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(new_folder) writes safetensors.",
        )
    raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}", "Fetch the model again with its weights.")


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_object(index, INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no `weight_map`", "Fetch the model again.")
    if not all(isinstance(name, str) and name.endswith(".safetensors") for name in weight_map.values()):
        raise ModelError(f"{index} names files that are not .safetensors; no other kind is opened",
                         "Fetch the model again, in safetensors.")  # fmt: skip
    names = sorted(set(weight_map.values()))
    if len(names) > MOST_SHARDS:
        raise ModelError(f"{index} names {len(names):,} files; no model has as many", "Fetch the model again.")
    missing = [name for name in names if is_name(name) and not (index.parent / name).exists()]
    if missing:
        raise ModelError(
            f"{index} names {len(missing)} of {len(names)} files that are not there: {', '.join(missing[:5])}",
            "Fetch the model again: its download was not completed.",
        )
    return tuple(inside(index.parent, name, index) for name in names)


def revision_of(folder: Path) -> str | None:
    """The commit of a folder that came from the hub, as its cache names it; None of a folder from elsewhere."""
    snapshots = folder.parent
    of_the_cache = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
    return folder.name if of_the_cache and COMMIT.fullmatch(folder.name) else None


def pinned_to(name: str, commit: str | None) -> str:
    """The name of the model `name` at one commit (`owner/name@commit`); a folder's, and sprig's, stays as it is."""
    found = None if name == BUNDLED or _as_path(name).exists() else HUB_ID.fullmatch(name)
    return name if commit is None or found is None else f"{found[1]}@{commit}"


def locate_model(name: str) -> Path:
    """The folder of the model `name`: `sprig`, a folder, or a hub id (fetched where it is not yet in the cache).

    A hub id may say which version is meant: `owner/name@commit`, or a branch or tag after the @.

    Raises ModelError where it cannot be had: no such folder or id, no network, gated, pickled weights only, or of a
    family that is not supported.
    """
    folder = _on_disk(name)
    if folder is None:
        return _from_hub(name)
    check_folder(folder)
    read_config(folder)
    weight_files(folder)
    return folder


def locate_config(name: str) -> Path:
    """A folder with the config of the model `name`, and its tokenizer where it has one; weights need not be there.

    Of a hub id only these few files are fetched. Raises ModelError as `locate_model` does, weights aside.
    """
    folder = _on_disk(name)
    if folder is None:
        return _config_from_hub(name, CONFIG_FILES)
    check_folder(folder)
    read_config(folder)
    return folder


def _as_path(name: str) -> Path:
    """`name` as a path, `~` taken for a home where there is one; Path.expanduser raises where there is none."""
    return Path(os.path.expanduser(name))


def _on_disk(name: str) -> Path | None:
    """The bundled model's folder, or the one that `name` is; None where it reads as a hub id."""
    if name == BUNDLED:
        folder = Path(__file__).resolve().parent.parent / "assets" / BUNDLED
        if not folder.is_dir():
            raise ModelError("this installation of luthier lacks its bundled model", "Install the package again.")
        return folder
    folder = _as_path(name)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"the model {name} is a file", "Give the folder that holds config.json and the weights.")
    if name.startswith((".", "~")) or not HUB_ID.fullmatch(name):
        raise ModelError(f"there is no folder {name}", f"Give a folder, an id on the Hugging Face hub, or {BUNDLED}.")
    return None


def _config_from_hub(name: str, patterns: tuple[str, ...]) -> Path:
    folder = _fetch(name, patterns)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} on the hub has no config.json", "Choose a model in transformers' layout.")
    check_folder(folder)
    read_config(folder)
    return folder


def _from_hub(name: str) -> Path:
    commit = revision_of(_config_from_hub(name, SMALL_FILES))
    folder = _fetch(pinned_to(name, commit), SMALL_FILES + WEIGHT_FILES)  # of that commit, if a new one came meanwhile
    check_folder(folder)
    if not (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        if why := _out_of_reach(name):
            raise _partly_here(name, why)
        raise ModelError(
            f"{name} on the hub has no safetensors weights; pickled ones (.bin, .pt) are not read, "
            "since opening a pickle can run code",
            "Choose a copy of it in safetensors, or convert it once, where you trust it: transformers' "
            f"AutoModelForCausalLM.from_pretrained({name!r}).save_pretrained(folder) writes safetensors.",
        )
    weight_files(folder)
    return folder


def _asked(name: str) -> tuple[str, str | None]:
    """(repository, revision) of a hub id."""
    found = HUB_ID.fullmatch(name)
    return (name, None) if found is None else (found[1], found[2])


def _fetch(name: str, patterns: tuple[str, ...]) -> Path:
    """Files of a hub repository, from the cache where they are there. The one boundary to huggingface_hub's errors."""
    from huggingface_hub import (
        constants,
        get_token,
        snapshot_download,
        try_to_load_from_cache,
    )  # half a second: only for hub ids
    from huggingface_hub import errors as hub

    repository, revision = _asked(name)
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except hub.RevisionNotFoundError as error:
        raise ModelError(f"the model {repository} on the hub has no version {revision}",
                         f"Look at {page}/commits/main, and write one of them after the @.") from error  # fmt: skip
    except hub.GatedRepoError as error:
        how = "log in with `hf auth login`" if get_token() is None else "use a token of an account that has access"
        raise ModelError(f"the model {name} is gated: its makers ask you to accept their terms first",
                         f"Accept them on {page}, then {how}, and run this again.") from error  # fmt: skip
    except (hub.RepositoryNotFoundError, hub.HFValidationError) as error:
        raise ModelError(
            f"there is no folder {name}, and no model of this name on the Hugging Face hub (or it is private)",
            f"Check the name at {page}; for a private model log in with `hf auth login`.",
        ) from error
    except hub.LocalEntryNotFoundError as error:
        why = _why(error.__cause__ or error)
        if isinstance(try_to_load_from_cache(repository, "config.json", revision=revision), str):
            raise _partly_here(name, why) from error
        raise ModelError(
            f"the model {name} is neither a folder nor in the hub's cache on this machine, and {why}{_meant(name)}",
            f"Connect once and run this again, copy the model's folder here, or use the bundled `model: {BUNDLED}`.",
        ) from error
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's own root error
        raise ModelError(f"fetching the model {name} failed: {_first_line(error)}",
                         "Run this again: what was fetched is kept.") from error  # fmt: skip


def _out_of_reach(name: str) -> str | None:
    """Why the hub cannot be asked of the model `name`, so that fetching fell back to its cache; None where it can."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        repository, revision = _asked(name)
        HfApi().model_info(repository, revision=revision)
    except (hub.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's own root error
        return _why(error)
    return None


def _partly_here(name: str, why: str) -> ModelError:
    return ModelError(
        f"the hub's cache on this machine has only a part of the model {name} (a plan fetches no weights), and {why}",
        "Connect once and run this again: what is missing is then fetched and kept.",
    )


def _why(error: BaseException) -> str:
    """Why the hub was not asked."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if isinstance(error, hub.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"the hub cannot be reached ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _meant(name: str) -> str:
    """A question, where `name` looks like the bundled model's."""
    return f"; did you mean {BUNDLED}?" if difflib.get_close_matches(name, [BUNDLED]) else ""
