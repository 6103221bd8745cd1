"""No name in a file, and no link in a folder, leads out of that folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.errors import FileError
from luthier.guard.inside import check_folder, inside
from luthier.model.load import load_decoder
from luthier.model.locate import revision_of, weight_files
from tests.security.conftest import Refused

TRAIN = ("train", "recipe.yaml")
NAMES = (
    *("../secret.safetensors", "../../secret.safetensors", "sub/../../secret.safetensors", "./../secret.safetensors"),
    *("/etc/secret.safetensors", "..\\..\\secret.safetensors", "C:\\secret.safetensors", "C:secret.safetensors"),
    *("//host/share/secret.safetensors", "sub//secret.safetensors", "a\u0000.safetensors", "a\n.safetensors"),
    *("..\u202e.safetensors", "x" * 300 + ".safetensors", "~/../secret.safetensors"),
)
"""As an archive with paths to slip out of its folder would have them."""


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_names_a_file_elsewhere(refused: Refused, model: Path, name: str) -> None:
    shutil.copyfile(model / "model.safetensors", model.parent / "secret.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(TRAIN, "names the file", "which leads out of its folder or is no name", "model.safetensors.index.json")


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "README.md"]
)
def test_a_link_out_of_the_folder(refused: Refused, model: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    if (model / name).is_file():
        (model / name).rename(secret)
    else:
        secret.write_text("what nobody may publish", encoding="utf-8")
    (model / name).symlink_to(secret)
    refused(TRAIN, f"{name} is a link that leads out of its folder, and is not followed")


def test_a_link_through_a_folder_beside(refused: Refused, model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("x", encoding="utf-8")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    refused(TRAIN, "additional_chat_templates is a link that leads out of its folder")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors", "merges.txt"])
def test_a_pipe_is_not_waited_for(refused: Refused, model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    refused(TRAIN, f"{name} is not a plain file")


def test_links_in_a_circle(refused: Refused, model: Path) -> None:
    (model / "merges.txt").symlink_to("merges.txt")
    refused(TRAIN, "merges.txt is not there")


def test_a_link_inside_the_folder_is_followed(model: Path) -> None:
    (model / "model.safetensors").rename(model / "weights.safetensors")
    (model / "model.safetensors").symlink_to("weights.safetensors")
    check_folder(model)
    assert weight_files(model) == (model / "model.safetensors",)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def in_the_cache(model: Path, tmp_path: Path) -> Path:
    """The model as huggingface_hub keeps it: a snapshot of links to blobs."""
    repository = tmp_path / "hub" / "models--maker--good"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copyfile(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


def test_the_hubs_own_links_are_followed(in_the_cache: Path) -> None:
    import torch

    check_folder(in_the_cache)
    load_decoder(in_the_cache, dtype=torch.float32)
    assert revision_of(in_the_cache) == COMMIT


def _to_another_repository(snapshot: Path) -> Path:
    other = snapshot.parents[2] / "models--maker--private" / "blobs"
    other.mkdir(parents=True)
    (other / "a").write_bytes(b"{}")
    return other / "a"


def _to_the_refs(snapshot: Path) -> Path:
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_bytes(b"{}")
    return snapshot.parents[1] / "refs" / "main"


def _to_the_system(_: Path) -> Path:
    return Path("/etc/hostname")


@pytest.mark.parametrize("target", [_to_another_repository, _to_the_refs, _to_the_system])
def test_but_no_links_that_the_hub_would_not_make(in_the_cache: Path, target: Callable[[Path], Path]) -> None:
    (in_the_cache / "added_tokens.json").symlink_to(target(in_the_cache))
    with pytest.raises(FileError, match=r"added_tokens\.json is a link that leads out"):
        check_folder(in_the_cache)


def test_a_name_that_stays_inside(model: Path) -> None:
    (model / "a b.safetensors").write_bytes(b"x")
    assert inside(model, "a b.safetensors", model) == model / "a b.safetensors"


def test_an_index_names_files_beside_it(refused: Refused, model: Path) -> None:
    """Two of one name in two folders below would become one when they are merged."""
    for number in (1, 2):
        (model / f"part{number}").mkdir()
        shutil.copyfile(model / "model.safetensors", model / f"part{number}" / "x.safetensors")
    index = {"weight_map": {"model.norm.weight": "part1/x.safetensors", "lm_head.weight": "part2/x.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(TRAIN, "names the file 'part1/x.safetensors', which lies in a folder below", "Move it up")


TOO_LARGE = ("config.json", "tokenizer.json", "vocab.json", "chat_template.jinja", "merges.txt", "LICENSE", "README.md")


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_file_that_is_read_whole_has_a_size(model: Path, name: str) -> None:
    with (model / name).open("ab") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(FileError, match=f"{name} has 67,108,865 bytes"):
        check_folder(model)


@pytest.mark.parametrize("name", ["trainer_state.json", "log.txt", "notes.md"])
def test_files_that_nobody_reads_have_any_size_but_are_no_links_out(model: Path, tmp_path: Path, name: str) -> None:
    with (model / name).open("wb") as file:
        file.truncate(80_000_000)
    check_folder(model)
    (model / name).rename(tmp_path / name)
    (model / name).symlink_to(tmp_path / name)
    with pytest.raises(FileError, match=f"{name} is a link that leads out"):
        check_folder(model)
