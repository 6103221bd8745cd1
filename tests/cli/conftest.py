from __future__ import annotations

from pathlib import Path

import pytest
import torch

from luthier.model.adapter import save_adapter
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests.cli.command import Command


@pytest.fixture
def luthier(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """The command, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return Command(monkeypatch, capfd)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of sprig's, not trained but strong enough that it answers otherwise than its base."""
    folder = tmp_path_factory.mktemp("tuned") / "adapter"
    decoder = load_decoder(locate_model("sprig"), dtype=torch.float32)
    add_lora(decoder, LoRASpec(4, 8), seed=5)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, leaf in lora_parameters(decoder).items():
            if name.endswith("lora_B.weight"):
                leaf.normal_(std=0.5, generator=generator)
    save_adapter(decoder, folder, base="sprig")
    return folder
