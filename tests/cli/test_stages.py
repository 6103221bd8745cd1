"""Stages that compute: as the run did, and measured for themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from luthier.cli import loading
from luthier.data.prepare import Dataset
from luthier.evaluate import compare
from luthier.kernels.choose import kernels_for
from luthier.model.decoder import Decoder
from luthier.recipe.schema import EvaluateRecipe
from luthier.train.memory import memory_peak
from tests.cli.command import Command

RECIPE = """\
model: sprig
data: pirate
adapter: {{rank: 4, alpha: 8}}
train: {{steps: 1, batch_size: 4, warmup_steps: 0, attention: {attention}}}
evaluate: {{limit: 2, max_new_tokens: 4}}
"""


@pytest.mark.parametrize("attention", ["math", "efficient"])
def test_a_run_is_evaluated_with_its_attention(
    luthier: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(attention=attention))
    assert luthier("train", "recipe.yaml", "--out", "run").code == 0
    seen: list[tuple[bool, object]] = []
    whole = compare.compare

    def spy(decoder: Decoder, dataset: Dataset, asked: EvaluateRecipe, **more: object) -> object:
        wanted = kernels_for(decoder.device, decoder.dtype, attention).kernels  # type: ignore[arg-type]
        seen.append((torch.backends.cuda.flash_sdp_enabled(), decoder.kernels == wanted))
        return whole(decoder, dataset, asked, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(compare, "compare", spy)
    ended = luthier("eval", "run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)
    assert seen == [(attention != "math", True)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_the_peak_of_loading_is_not_that_of_what_was_before(tiny_llama: Path) -> None:
    held = np.ones(2**27)  # 1 GiB, as reading rows may take
    before = memory_peak(torch.device("cpu")).allocated
    del held
    loading.load_base(tiny_llama, "fp32", "cpu", "none")
    assert memory_peak(torch.device("cpu")).allocated < before - 0.9
