"""A standard error that cannot be written to does not end what is being done; real processes, pipes and devices."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.train.checkpoints import Checkpoints
from luthier.train.display import PlainDisplay
from luthier.train.unbroken import unbroken
from tests.train.test_display import Clock, run_through
from tests.train.world import events_of

RECIPE = """\
model: sprig
data: pirate
adapter: {rank: 4, alpha: 8}
train: {steps: 6, batch_size: 4, eval_every: 3, save_every: 2}
"""
LUTHIER = f"{sys.executable} -m luthier train recipe.yaml --out run"


def shell(folder: Path, line: str) -> int:
    (folder / "recipe.yaml").write_text(RECIPE)
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, check=False, timeout=120)
    return done.returncode


def assert_trained(run: Path) -> None:
    assert [line["step"] for line in events_of(run / "events.jsonl", "end")] == [6]
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("where", ["2>&1 | head -1; exit ${PIPESTATUS[0]}", "2> /dev/full"])
def test_a_run_that_nobody_hears_comes_to_its_end(tmp_path: Path, where: str) -> None:
    assert shell(tmp_path, f"{LUTHIER} {where}") == 0
    assert_trained(tmp_path / "run")


def test_a_stop_that_nobody_hears_of_saves(tmp_path: Path) -> None:
    """The clock stops it, for a sitting of a tenth of a second has no time for a step."""
    line = f"{LUTHIER} --set train.max_time=0.1 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    assert shell(tmp_path, line) == 75
    assert Checkpoints(tmp_path / "run" / "checkpoints").newest_whole().step == 0


class Breaks(io.StringIO):
    """Fails from the third line on."""

    lines = 0

    def write(self, text: str) -> int:
        self.lines += 1
        if self.lines > 2:
            raise OSError(5, "Input/output error")
        return super().write(text)


def test_a_display_stops_displaying_and_nothing_else() -> None:
    clock, stream = Clock(), Breaks()
    run_through(PlainDisplay(stream, clock), clock)
    assert len(stream.getvalue().splitlines()) == 2
    assert stream.lines == 3, "tried once, then no more"


def test_what_is_no_such_fault_is_raised() -> None:
    output = unbroken(Breaks(), BrokenPipeError)
    output.write("one\n")
    output.write("two\n")
    with pytest.raises(OSError, match="Input/output"):
        output.write("three\n")
    stream = unbroken(io.StringIO())
    stream.write("as it is")
    assert (stream.getvalue(), stream.isatty()) == ("as it is", False)  # type: ignore[attr-defined]
