"""The demo, whole, as `make demo` runs it: what the README promises is held here. About a minute and a half alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.ci]


def test_style_is_learned_and_facts_are_kept(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "luthier", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (task,) = json.loads(done.stdout)["evaluation"]["tasks"]
    assert task["rows"] == 100
    assert task["base"]["style"] <= 0.02
    assert task["tuned"]["style"] >= 0.95
    assert task["retained"] >= 0.90
    assert task["tuned"]["ended"] == 1.0
    assert (tmp_path / "runs/demo/exports/ollama/Modelfile").is_file()
