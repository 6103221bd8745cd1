"""A run directory that somebody else could write into: what they put there is not opened, not copied, not followed."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.train.manifest import seal
from tests import tiny
from tests.cli.command import Command
from tests.security.conftest import ROWS, Refused

ON = ("train", "recipe.yaml", "--out", "run", "--resume", "--set", "train.steps=4")
PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng.pkl", "adapter/adapter_model.bin", "adapter/more.pkl")
PRIVATE = "what nobody may publish"


@pytest.fixture
def run(luthier: Command, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, each with a checkpoint, that `ON` goes on with. Of the bundled model: one in a folder would
    have another name in each test, and the run be another."""
    tiny.write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(
        "model: sprig\ndata: rows.jsonl\nsplit: {train: 0.75, eval: 0.25}\nevaluate: {samples: 1}\n"
        "train: {steps: 2, batch_size: 2, precision: fp32, save_every: 1, schedule: constant}\n",
        encoding="utf-8",
    )
    kept = tmp_path_factory.getbasetemp() / "a-run-of-two-steps"
    if not kept.exists():
        ended = luthier("train", "recipe.yaml", "--out", "run")
        assert ended.code == 0, ended.err
        shutil.copytree(tmp_path / "run", kept)
    elif not (tmp_path / "run").exists():
        shutil.copytree(kept, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's that is not in the run."""
    path = tmp_path / "secret"
    path.write_text(PRIVATE, encoding="utf-8")
    return path


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def test_pickles_in_a_run_are_named_and_never_opened(luthier: Command, run: Path, payload: bytes, marker: Path) -> None:
    for name in PICKLES:
        (newest(run) / name).write_bytes(payload)
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (run / "adapter" / name).write_bytes(payload)
    ended = luthier("verify", "run", "--steps", "0")
    assert ended.code == 0, ended.err
    said = "holds what luthier did not write there, and does not open: "
    assert f"checkpoints/step-000002 {said}adapter/adapter_model.bin, adapter/more.pkl, optimizer.bin" in ended.message
    assert "and 1 more" in ended.message
    assert f"adapter {said}adapter_model.bin, optimizer.pt, training_args.bin" in ended.message
    ended = luthier(*ON)
    assert ended.code == 0, ended.err
    assert f"step-000002 {said}" in ended.message
    assert "does not open" in (run / "events.jsonl").read_text(encoding="utf-8")
    for words in (("eval", "run"), ("merge", "run"), ("generate", "run", "--prompt", "hello", "--max-tokens", "2")):
        ended = luthier(*words)
        assert ended.code == 0, ended.err
    assert not marker.exists()
    left = {path.name for folder in ("adapter", "exports") for path in (run / folder).rglob("*")}
    assert not left & {"adapter_model.bin", "more.pkl", "optimizer.pt", "training_args.bin"}


@pytest.mark.parametrize("name", ["optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_the_place_of_a_file(luthier: Command, run: Path, payload: bytes, marker: Path, name: str) -> None:
    """It is not what the manifest says: the checkpoint before it is used, and that is said."""
    (newest(run) / name).write_bytes(payload)
    ended = luthier(*ON)
    assert ended.code == 0, ended.err
    assert f"step-000002 is not whole ({name}: " in ended.message
    assert "going on from step-000001" in ended.message
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("optimizer.safetensors", "cannot be read as a safetensors file"),
        ("rng.safetensors", "cannot be read as a safetensors file"),
        ("adapter/adapter_model.safetensors", "cannot be read as a safetensors file"),
        ("adapter/adapter_config.json", "is not valid JSON"),
        ("state.json", "not a checkpoint that can be continued"),
    ],
)
def test_one_whose_manifest_was_made_anew(refused: Refused, run: Path, payload: bytes, name: str, said: str) -> None:
    """Hashes find accidents, not attackers: what they let through is still no pickle to us."""
    folder = newest(run)
    (folder / name).write_bytes(payload)
    seal(folder, "checkpoint", 2)
    refused(ON, said, code=5 if name == "state.json" else 2)


def _a_folder(run: Path, secret: Path, name: str) -> tuple[Path, Path]:
    """A folder elsewhere in which nothing may change, and the link to it in the run."""
    elsewhere = secret.parent / "elsewhere"
    (elsewhere / "step-000001").mkdir(parents=True)
    (elsewhere / "step-000001" / "precious").write_text(PRIVATE, encoding="utf-8")
    return elsewhere, run / name


def _a_file(run: Path, secret: Path, name: str) -> tuple[Path, Path]:
    return secret, run / name


LINKS: dict[str, Callable[[Path, Path, str], tuple[Path, Path]]] = {
    **dict.fromkeys((".lock", "events.jsonl"), _a_file),
    **dict.fromkeys(("checkpoints", "data", "exports", "exports/gguf"), _a_folder),
}


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_through_a_link(refused: Refused, run: Path, secret: Path, name: str) -> None:
    target, link = LINKS[name](run, secret, name)
    if link.is_dir():
        shutil.rmtree(link)
    link.unlink(missing_ok=True)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target)
    before = sorted(target.rglob("*"))
    words: tuple[tuple[str, ...], ...] = (ON, ("eval", "run"), ("merge", "run"), ("export", "run", "--to", "gguf"))
    for command in words:
        refused(command, f"run/{name} is a link, and is not written through", "Remove it")
    assert sorted(target.rglob("*")) == before
    assert secret.read_text(encoding="utf-8") == PRIVATE
    assert link.is_symlink()


def test_links_that_wait_where_a_file_is_begun(luthier: Command, run: Path, secret: Path) -> None:
    """The names of half-written files can be guessed: their number is a process's."""
    written = [run / name for name in ("plan.json", "recipe.yaml", "data/data.json", "checkpoints/LATEST")]
    for path in written:
        path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to(secret)
    for path in written[2:]:
        path.unlink()
        path.symlink_to(secret)
    ended = luthier(*ON)
    assert ended.code == 0, ended.err
    assert secret.read_text(encoding="utf-8") == PRIVATE
    assert not any(path.is_symlink() for path in written)


def test_a_link_beside_the_adapter_is_not_published(luthier: Command, run: Path, secret: Path) -> None:
    for folder in (run / "checkpoints").glob("step-*/adapter"):
        (folder / "notes").symlink_to(secret)
    shutil.rmtree(run / "adapter")
    ended = luthier("train", "recipe.yaml", "--out", "run", "--resume")
    assert ended.code == 0, ended.err
    published = [path for path in (run / "adapter").rglob("*") if path.is_file()]
    assert len(published) > 3
    assert all(PRIVATE.encode() not in path.read_bytes() for path in published)


def test_a_run_and_the_cache_are_their_users_alone(
    luthier: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    before = os.umask(0o022)
    try:
        assert luthier("train", "recipe.yaml", "--out", "runs/mine").code == 0
        assert luthier("merge", "runs/mine").code == 0
    finally:
        os.umask(before)
    mine = tmp_path / "runs" / "mine"
    assert stat.S_IMODE(mine.stat().st_mode) == 0o700
    for folder in (tmp_path / "cache").iterdir():
        if folder.name in ("tokens", "digests", "tokenizers"):
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    for name in ("recipe.yaml", "plan.json", "data/data.json", "events.jsonl", "adapter/adapter_model.safetensors"):
        assert stat.S_IMODE((mine / name).stat().st_mode) == 0o600, name
