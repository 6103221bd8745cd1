"""A disk that fills while a model is written: an error, never a file that is not all there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.export.gguf import write_gguf
from luthier.model.locate import locate_model

WRITES = """
import resource, sys
from pathlib import Path
from luthier.errors import is_disk_full
from luthier.export.gguf import write_gguf
model, path = Path(sys.argv[1]), Path(sys.argv[2])
for limit in map(int, sys.argv[3:]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_gguf(model, path)
    except Exception as error:
        print(is_disk_full(error), sorted(file.name for file in path.parent.iterdir()))
    else:
        print("no error", path.stat().st_size)
"""


@pytest.mark.parametrize("missing", [(1, 100, 600, 5000), (100_000, 2_000_000)])
def test_a_gguf_file_without_room(tmp_path: Path, missing: tuple[int, ...]) -> None:
    """Also where only the last bytes are missing, of which numpy says nothing."""
    model = locate_model("sprig")
    size = write_gguf(model, tmp_path / "whole.gguf").size
    (tmp_path / "out").mkdir()
    limits = [str(size - less) for less in missing]
    command = [sys.executable, "-c", WRITES, str(model), str(tmp_path / "out" / "model.gguf"), *limits]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True []"] * len(missing)
