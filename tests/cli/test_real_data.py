"""Rows that people wrote, from file to export: the held-out loss must fall and every file must be there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import Command

pytestmark = [pytest.mark.slow, pytest.mark.ci, pytest.mark.shared]

GRIMM = 'template: "Write a tale called: {title}\\n\\n{content}"\n'


@pytest.mark.parametrize(("name", "more"), [("gsm8k_train", ""), ("grimm_stories", GRIMM)])
def test_the_held_out_loss_falls(luthier: Command, shared: Path, tmp_path: Path, name: str, more: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: sprig\ndata: {shared / 'data' / name}.jsonl\nexport: [hf, gguf, ollama]\n{more}")
    quick = (
        "train.steps=20",
        "train.batch_size=8",
        "evaluate.samples=1",
        "evaluate.max_new_tokens=32",
        "train.eval_every=0",
    )
    ended = luthier("run", recipe, "--out", tmp_path / "run", "--json", *(w for one in quick for w in ("--set", one)))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert found["evaluation"]["tuned"]["loss"] < found["evaluation"]["base"]["loss"]
    assert [one["kind"] for one in found["exports"]] == ["hf", "gguf", "ollama"]
    assert all(Path(one["path"]).exists() for one in found["exports"])
    assert (tmp_path / "run" / "exports/ollama/Modelfile").is_file()
