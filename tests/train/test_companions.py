"""What lies beside the adapter appears with it: all of it at once, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.runs import RunDirectory
from luthier.train.loop import Hooks, train
from tests.train.world import Recorder, make_rows, make_settings, tiny_decoder


class NoSpaceError(Exception):
    """A write that fails."""


def test_companions_appear_with_the_adapter_or_not_at_all(tiny_llama: Path, tmp_path: Path) -> None:
    run, seen = RunDirectory(tmp_path / "run"), []

    def beside(folder: Path) -> None:
        seen.append((folder.name != run.adapter.name, run.adapter.exists(), sorted(p.name for p in folder.iterdir())))
        (folder / "tokenizer.json").write_text("{}")
        if len(seen) == 1:
            raise NoSpaceError

    def once(*, resume: bool) -> None:
        decoder, rows, settings = tiny_decoder(tiny_llama), make_rows(), make_settings(steps=2, warmup_steps=1)
        hooks = Hooks(companions=beside)
        train(decoder, rows, settings, run, base="a/model", listener=Recorder(), resume=resume, hooks=hooks)

    with pytest.raises(NoSpaceError):
        once(resume=False)
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "events.jsonl"]
    once(resume=True)
    assert seen == [(True, False, ["adapter_config.json", "adapter_model.safetensors"])] * 2
    adapter = {path.name for path in run.adapter.iterdir()}
    assert adapter == {"adapter_config.json", "adapter_model.safetensors", "manifest.json", "tokenizer.json"}
