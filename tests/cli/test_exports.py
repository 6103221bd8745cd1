"""`luthier export`: each kind of a run, what is refused, and what to type next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from luthier.data.render import make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.export.merge import write_tokenizer
from luthier.model.adapter import save_adapter
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, add_lora
from luthier.recipe.load import dump_recipe, recipe_from_mapping
from luthier.runs import RunDirectory
from tests.cli.command import Command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What the exports without merging need of a run: its recipe and its adapter."""
    made, base = RunDirectory(tmp_path / "run"), locate_model("sprig")
    made.path.mkdir()
    asked = {"model": "sprig", "data": "pirate", "ollama": {"system": "Arr.", "temperature": 0.5}}
    made.recipe.write_text(dump_recipe(recipe_from_mapping(asked)))
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, LoRASpec(2, 4.0, targets=("q_proj",)), seed=0)
    save_adapter(decoder, made.adapter, base="sprig")
    write_tokenizer(base, made.adapter, make_template("alpaca", load_tokenizer(base)))
    return made.path


def test_an_adapter_for_ollama(run: Path, luthier: Command) -> None:
    ended = luthier("export", run, "--to", "ollama-adapter", "--set", "ollama.temperature=0.25", "--json")
    assert ended.code == 0, ended.message
    found = json.loads(ended.out)
    text = (run / "exports/ollama-adapter/Modelfile").read_text()
    assert 'SYSTEM """Arr."""' in text
    assert "PARAMETER temperature 0.25\n" in text
    assert found["command"].startswith("ollama create run -f ")
    assert (found["quantize"], found["installed"]) == ("q8_0", False)


def test_an_adapter_for_mlx(run: Path, luthier: Command) -> None:
    ended = luthier("export", run, "--to", "mlx-adapter", "--quantize", "4", "--json")
    assert ended.code == 0, ended.message
    found = json.loads(ended.out)
    folder = run / "exports/mlx-adapter"
    assert json.loads((folder / "base/config.json").read_text())["quantization"]["bits"] == 4
    assert json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 2.0
    assert found["base"] == str(folder / "base")
    assert f"--adapter-path {folder}" in found["command"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--to", "onnx"), "known: hf, gguf, ollama, ollama-adapter, mlx, mlx-adapter"),
        (("--to", "mlx", "--quantize", "q8_0"), "there is no --quantize q8_0 for mlx"),
        (("--to", "mlx", "--quantize", "5"), "4 or 8"),
        (("--to", "gguf", "--quantize", "4"), "there is no --quantize 4"),
        (("--to", "hf", "--quantize", "f16"), "written in 16-bit"),
        (("--to", "mlx", "--install"), "--install is for ollama"),
        (("--to", "ollama", "--set", "ollama.top_p=2"), "ollama.top_p"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], said: str, run: Path, luthier: Command) -> None:
    ended = luthier("export", run, *words)
    assert ended.code == 2
    assert said in ended.message
    assert not (run / "exports").exists()
