"""Training commands start with an allocator that reuses what a step gives back; others, and your choice, are left."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.allocator import TUNABLES, settled_environment


@pytest.mark.parametrize("words", [["train", "r.yaml"], ["run", "r.yaml"], ["demo"], ["eval", "runs/a"]])
def test_training_commands_start_again_with_it(words: list[str]) -> None:
    assert settled_environment(words, {"A": "b"}) == {"A": "b", "GLIBC_TUNABLES": TUNABLES}


@pytest.mark.parametrize("words", [[], ["plan", "train"], ["data", "check"], ["--help"]])
def test_others_do_not(words: list[str]) -> None:
    assert settled_environment(words, {}) is None


def test_a_process_does_so_once_and_yours_stays() -> None:
    once = settled_environment(["train"], {})
    assert once is not None
    assert settled_environment(["train"], once) is None
    assert settled_environment(["train"], {"GLIBC_TUNABLES": "glibc.malloc.arena_max=1"}) is None
    other = settled_environment(["train"], {"GLIBC_TUNABLES": "glibc.cpu.x86_ibt=off"})
    assert other is not None
    assert other["GLIBC_TUNABLES"] == f"glibc.cpu.x86_ibt=off:{TUNABLES}"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these tunables")
def test_the_command_runs_as_typed_after_it(tmp_path: Path) -> None:
    """A real process, without the variable: the same words arrive, with the same exit code."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    words = [sys.executable, "-m", "luthier", "train", "no such recipe.yaml"]
    ended = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "no such recipe.yaml" in ended.stderr
