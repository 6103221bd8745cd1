"""Go's own text/template: the program of export/render.go, built once and asked as often as you like."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from luthier.export.modelfile_check import build_renderer
from luthier.export.modelfile_check import render_by_go as render

__all__ = ["build", "render"]

WHY = "Go is not installed (Debian: golang-go): templates are not rendered by Go itself"


def build(folder: Path) -> Path:
    """The program, built in `folder`. Skips the test where Go is missing, which in CI it must not be."""
    if shutil.which("go") is None:
        if os.environ.get("CI", "").lower() == "true":
            raise RuntimeError(f"{WHY}, and in CI they must be")
        pytest.skip(WHY)
    return build_renderer(folder)
