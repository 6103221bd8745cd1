"""Writes of folders that a kill cut short: what was whole comes back, what was not goes, nobody else's is touched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.runs import atomic_folder, make_private, recover_folder, remove_litter, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from luthier.runs import atomic_folder
path, where = Path(sys.argv[1]), sys.argv[2]
rename = Path.rename
def renamed(self, target):
    done = rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)
    return done
if where == "between":
    Path.rename = renamed
with atomic_folder(path) as beside:
    (beside / "what").write_text("new")
    if where == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


def folder(path: Path, what: str) -> Path:
    path.mkdir()
    (path / "what").write_text(what)
    return path


def dead_pid() -> int:
    """Of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


@pytest.mark.parametrize("where", ["writing", "between"])
def test_a_real_kill_leaves_the_older_and_no_litter(tmp_path: Path, where: str) -> None:
    path = folder(tmp_path / "last", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path), where], check=False)
    assert killed.returncode == -9
    assert path.exists() == (where == "writing")
    assert len(names(tmp_path)) == 2, "the kill left something behind"
    assert recover_folder(path)
    assert names(tmp_path) == ["last"]
    assert (path / "what").read_text() == "old"


def test_the_newest_comes_back_whatever_its_number(tmp_path: Path) -> None:
    for pid, what, seconds in ((99_999_999, "older", 100), (100_000_000, "newest", 300), (88_888_888, "oldest", 50)):
        older = folder(tmp_path / f".last.{pid}.old", what)
        os.utime(older, (seconds, seconds))
    assert recover_folder(tmp_path / "last")
    assert (tmp_path / "last" / "what").read_text() == "newest"
    assert names(tmp_path) == ["last"]


def test_writing_removes_what_dead_processes_left(tmp_path: Path) -> None:
    dead, mine, other = dead_pid(), os.getpid(), os.getppid()
    path = folder(tmp_path / "a[b]", "old")
    for pid in (dead, mine, other):
        folder(tmp_path / f".a[b].{pid}.tmp", "half")
        folder(tmp_path / f".a[b].{pid}.old", "older")
    (tmp_path / f".a[b].{dead + 1}0000.tmp").write_text("a file of this name")
    kept = [".a[b].x.old", f".ab.{dead}.tmp", f".last.{dead}.old", f"a[b].{dead}.tmp"]
    for name in kept:
        folder(tmp_path / name, "another's")
    with atomic_folder(path) as beside:
        assert names(beside) == []
        (beside / "what").write_text("new")
    assert names(tmp_path) == sorted([*kept, f".a[b].{other}.tmp", f".a[b].{other}.old", "a[b]"])
    assert (path / "what").read_text() == "new"


def test_a_block_that_fails_leaves_the_older(tmp_path: Path) -> None:
    path = tmp_path / "last"
    older = folder(tmp_path / f".last.{dead_pid()}.old", "old")
    with pytest.raises(FileNotFoundError), atomic_folder(path) as beside:
        (beside / "no such folder" / "what").write_text("new")
    assert not older.exists()
    assert names(tmp_path) == ["last"]
    assert (path / "what").read_text() == "old"


def test_nothing_to_recover(tmp_path: Path) -> None:
    assert not recover_folder(tmp_path / "last")
    assert not recover_folder(tmp_path / "nowhere" / "last")
    folder(tmp_path / f".last.{dead_pid()}.tmp", "half")
    assert not recover_folder(tmp_path / "last")
    assert names(tmp_path) == []


def test_what_a_kill_left_half_written_in_a_run_goes_and_nothing_else(tmp_path: Path) -> None:
    kept = ("recipe.yaml", ".lock", ".adapter.7.old", "notes.tmp", "data/.hidden", "exports/hf", "checkpoints/.x.7.tmp")
    left = (".recipe.yaml.7.tmp", ".adapter.7.tmp/half", "data/.data.json.99.tmp", "exports/.hf.12.tmp/model")
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    remove_litter(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_a_folder_stopped_between_its_two_renames_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C may come there: whoever reads the folder without writing it finds the old one."""
    place, rename = tmp_path / "export", Path.rename
    with atomic_folder(place) as folder:
        (folder / "a").write_text("old")

    def stopped(self: Path, target: Path) -> Path:
        if target == place and self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), atomic_folder(place) as folder:
        (folder / "a").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (place / "a").read_text() == "old"


@pytest.mark.parametrize(("mode", "file", "inner"), [(0o700, 0o600, 0o700), (0o755, 0o644, 0o755)])
def test_what_is_written_is_as_private_as_its_folder(tmp_path: Path, mode: int, file: int, inner: int) -> None:
    """Under the usual umask; whoever runs this may have a stricter one."""
    before = os.umask(0o022)
    try:
        run = tmp_path / "runs" / "mine"
        make_private(run)
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        assert stat.S_IMODE(run.parent.stat().st_mode) == 0o755, "only the run is its user's alone"
        run.chmod(mode)
        make_private(run)
        write_text(run / "data" / "data.json", "{}")
        with atomic_folder(run / "adapter") as beside:
            write_text(beside / "what", "new")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in run.rglob("*")}
    assert modes == {"data": inner, "data.json": file, "adapter": inner, "what": file}
