"""What tells a base from another of its name: other weights of the same shapes do, and a copied folder does not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from luthier.errors import ModelError
from luthier.model.fingerprint import fingerprint


def test_other_weights_of_the_same_shapes_are_told(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    before = fingerprint(folder)
    assert before == fingerprint(tiny_llama)
    (file,) = folder.glob("*.safetensors")
    size = file.stat().st_size
    tuned = {name: tensor + 0.01 for name, tensor in load_file(file).items()}
    save_file(tuned, file, metadata={"format": "pt"})
    assert file.stat().st_size == size
    assert fingerprint(folder) != before


@pytest.mark.parametrize("change", ["config", "shorter", "empty"])
def test_another_configuration_or_size_is_told(tiny_llama: Path, tmp_path: Path, change: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    before = fingerprint(folder)
    (file,) = folder.glob("*.safetensors")
    if change == "config":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5}))
    else:
        file.write_bytes(b"" if change == "empty" else file.read_bytes()[:-1])
    assert fingerprint(folder) != before


def test_no_weights_have_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        fingerprint(tmp_path)
