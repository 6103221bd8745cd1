"""One process at a time works on a run directory; a dead one's lock is taken over, an unknown machine's is not."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest

from luthier import lock
from luthier.errors import UsageError
from luthier.lock import LOCK_NAME, Holder, check_free, hold

HOLDS = """
import sys
from pathlib import Path
from luthier.lock import hold
with hold(Path(sys.argv[1]), "luthier train"):
    print("held", flush=True)
    sys.stdin.readline()
"""
CONTENDS = """
import sys, time
from pathlib import Path
from luthier.errors import UsageError
from luthier.lock import hold
run, inside, won = Path(sys.argv[1]), Path(sys.argv[2]), 0
end = time.monotonic() + 1.0
while time.monotonic() < end:
    try:
        with hold(run, "contends"):
            inside.touch(exist_ok=False)  # an error where another one is inside too
            won += 1
            inside.unlink()
    except UsageError:
        pass
print(won)
"""


def holder(run: Path) -> subprocess.Popen[str]:
    """A process that holds `run` until it is given a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def note(run: Path) -> Holder:
    return Holder(**json.loads((run / LOCK_NAME).read_text()))


def leave(run: Path, **changes: object) -> Holder:
    """The note of a process that died while it held `run`, with `changes`."""
    run.mkdir(exist_ok=True)
    with hold(run, "luthier train"):
        left = replace(note(run), **changes)  # type: ignore[arg-type]
    (run / LOCK_NAME).write_text(json.dumps(asdict(left)))
    return left


def test_a_second_process_is_refused_with_the_firsts_pid_host_and_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holder(run) as first:
        for refused in (lambda: hold(run, "luthier eval").__enter__(), lambda: check_free(run)):
            with pytest.raises(UsageError, match=rf"run is in use by process {first.pid} on ") as caught:
                refused()
            assert f"on {socket.gethostname()} (luthier train), since 20" in caught.value.message
            assert f"kill {first.pid}" in str(caught.value.remedy)
        assert note(run).pid == first.pid
        first.communicate("\n")
    assert first.returncode == 0
    assert not run.exists()  # made for the lock alone, and nothing was written into it
    with hold(run, "luthier eval"):
        assert note(run).pid == os.getpid()


def test_never_two_at_once(tmp_path: Path) -> None:
    """Three processes that take and give back as fast as they can, so that the file comes and goes all the time."""
    command = [sys.executable, "-c", CONTENDS, str(tmp_path / "run"), str(tmp_path / "inside")]
    several = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    ended = [process.communicate(timeout=60) for process in several]
    assert [process.returncode for process in several] == [0, 0, 0], ended
    assert sum(int(out) for out, _ in ended) > 10


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_dead_process_is_taken_over_and_told(tmp_path: Path, number: signal.Signals) -> None:
    run, said = tmp_path / "run", list[str]()
    with holder(run) as first:
        first.send_signal(number)
        first.wait()
    assert note(run).pid == first.pid
    check_free(run)
    with hold(run, "luthier train", said.append):
        assert note(run).pid == os.getpid()
    (line,) = said
    assert line.startswith(f"{run}: the lock of process {first.pid} on ")
    assert line.endswith("is taken over: that process is no more")
    with hold(run, "luthier train", said.append):
        assert len(said) == 1  # a clean end leaves nothing


def test_what_holds_it_may_call_what_would(tmp_path: Path) -> None:
    with hold(tmp_path / "run", "run"):
        with hold(tmp_path / "run", "train"):
            check_free(tmp_path / "run")
        assert (tmp_path / "run" / LOCK_NAME).exists()
    assert not (tmp_path / "run").exists()


def test_another_thread_is_another_one(tmp_path: Path) -> None:
    errors: list[UsageError] = []

    def work() -> None:
        try:
            with hold(tmp_path / "run", "train"):
                pass
        except UsageError as error:
            errors.append(error)

    with hold(tmp_path / "run", "run"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} on " in errors[0].message


def test_a_directory_with_something_in_it_stays(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    with hold(run, "train"):
        (run / "recipe.yaml").write_text("model: sprig\n")
        assert run.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in run.iterdir()] == ["recipe.yaml"]
    with pytest.raises(UsageError, match="is a file, not a run directory"), hold(run / "recipe.yaml", "train"):
        pass


def test_another_machines_lock_is_refused_until_somebody_removes_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    left = leave(run, host="node-17", boot="another")
    for _ in range(2):  # the refusal itself leaves it as it is
        with pytest.raises(UsageError, match=r"process .* on node-17") as caught, hold(run, "luthier train"):
            pass
        assert f"remove {run / LOCK_NAME}" in str(caught.value.remedy)
        assert note(run) == left
    (run / LOCK_NAME).unlink()
    with hold(run, "luthier train"):
        assert note(run).host == socket.gethostname()


@pytest.mark.parametrize("changes", [{"host": "another-container"}, {"boot": "before-the-restart"}])
def test_of_this_machine_are_its_other_containers_and_what_was_before_its_restart(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    left, said = leave(tmp_path / "run", **changes), list[str]()
    with hold(tmp_path / "run", "luthier train", said.append):
        assert said == [f"{tmp_path / 'run'}: the lock of {left} is taken over: that process is no more"]


def test_half_a_note_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """The disk was full, or the process was killed before it had written: it does not hold the lock."""
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK_NAME).write_text('{"pid": 12')
    with hold(run, "luthier train"):
        assert note(run).pid == os.getpid()


def test_without_locks_the_note_is_judged_by_the_process_and_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system without flock: a living process is respected, one whose number was given to another is not."""
    run, locks = tmp_path / "run", fcntl.flock
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        alive = leave(run, pid=other.pid, started=started)
        monkeypatch.setattr(lock.fcntl, "flock", without_locks)
        for refused in (lambda: hold(run, "luthier eval").__enter__(), lambda: check_free(run)):
            with pytest.raises(UsageError, match=f"in use by process {other.pid} on "):
                refused()
        monkeypatch.setattr(lock.fcntl, "flock", locks)
        assert alive.started == started
        leave(run, pid=other.pid, started=started - 60)
        monkeypatch.setattr(lock.fcntl, "flock", without_locks)
        with hold(run, "luthier eval"):
            assert note(run).pid == os.getpid()
        other.communicate(b"\n")


def without_locks(_file: object, _how: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_somebody_who_only_looks_is_waited_for(tmp_path: Path) -> None:
    """`check_free` has the lock for a moment: whoever begins to work in that moment is not refused."""
    (tmp_path / LOCK_NAME).touch()
    with (tmp_path / LOCK_NAME).open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        looked = threading.Timer(0.02, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        looked.start()
        with hold(tmp_path, "luthier train"):
            pass
        looked.join()


def test_a_new_directory_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note of a lock file that was just made is not looked for: there is none."""
    monkeypatch.setattr(lock, "_read", lambda _: pytest.fail("there is nothing to read"))
    with hold(tmp_path / "run", "luthier train"):
        pass
