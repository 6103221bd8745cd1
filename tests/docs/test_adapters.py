"""docs/adapters.md: its Python runs as it stands there, on adapters that runs wrote; what vLLM's source asks of one."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from luthier.data.conversation import Turn
from luthier.data.render import make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.generate.generate import complete
from luthier.model.adapter import load_adapter, write_adapter
from luthier.model.config import FAMILIES, PROJECTIONS
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, lora_shapes
from tests import tiny

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = "What colour is the sky?"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's values of --max-lora-rank."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/pirate` and `runs/tales`, trained by the command, and their base (sprig) where the page's
    name for it leads: transformers takes a folder before it asks the hub."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(locate_model("sprig"), folder / BASE)
    config = json.loads((folder / BASE / "config.json").read_text())
    # transformers computes in it: the same tokens are then due, not nearly the same.
    (folder / BASE / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    for name, template, lr in (("pirate", "model", 0.03), ("tales", "human-assistant", 0.06)):
        recipe = f"model: sprig\ndata: {name}\ntemplate: {template}\nadapter: {{rank: 8, alpha: 16}}\n"
        recipe += (
            f"train: {{steps: 6, batch_size: 4, learning_rate: {lr}, warmup_steps: 0}}\nevaluate: {{samples: 1}}\n"
        )
        (folder / f"{name}.yaml").write_text(recipe)
        words = ["train", f"{name}.yaml", "--out", f"runs/{name}"]
        done = subprocess.run(
            [sys.executable, "-m", "luthier", *words], cwd=folder, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    return folder


def ours(runs: Path, name: str, *, adapted: bool = True) -> str:
    """What we answer, in fp32 as transformers computes it on the page."""
    adapter = runs / "runs" / name / "adapter"
    decoder = load_decoder(locate_model("sprig"), dtype=torch.float32)
    if adapted:
        load_adapter(decoder, adapter)
    template = make_template("model", load_tokenizer(adapter))
    ids = template.prompt_ids([Turn("user", QUESTION)])
    return complete(decoder, template.tokenizer, ids, stop_ids=template.stop_ids, max_new_tokens=32).text


def test_the_pages_python_runs_and_says_what_we_say(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(BLOCKS) == PAGE.count("```python") == 2
    monkeypatch.chdir(runs)
    Path("page.py").write_text("\n\n".join(BLOCKS))
    names = runpy.run_path("page.py")
    wanted = {"pirate": ours(runs, "pirate"), "tales": ours(runs, "tales"), "base": ours(runs, "pirate", adapted=False)}
    assert len(set(wanted.values())) == 3
    assert names["said"] == wanted
    assert names["said_by_peft"] == wanted


def refused_by_vllm(folder: Path, modules: set[str], max_lora_rank: int) -> list[str]:
    """What vLLM would say, by the rules in the page's table, in our words."""
    config = json.loads((folder / "adapter_config.json").read_text())
    said = [f"no {key}" for key in ("r", "lora_alpha", "target_modules") if key not in config]
    said += [key for key in ("modules_to_save", "use_dora") if config.get(key)]
    said += ["bias"] * (config.get("bias", "none") != "none")
    said += ["rank"] * (config.get("r", 0) > max_lora_rank)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (it is no mapping)
            found = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)
            said += [] if found and found[1].rpartition(".")[2] in modules else [name]
    return said


def test_vllms_rules_hold_for_what_a_run_writes(runs: Path) -> None:
    for name in ("pirate", "tales"):
        assert refused_by_vllm(runs / "runs" / name / "adapter", set(PROJECTIONS), 8) == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("targets", [("all-linear",), ("attention",), ("q_proj", "down_proj")])
def test_vllms_rules_hold_for_every_family_and_target(family: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """The linear layers that vLLM knows are those that it unpacks qkv_proj and gate_up_proj into, and the other two."""
    base = tiny.make_model(tmp_path / "base", family)
    decoder = load_decoder(base, dtype=torch.float32)
    spec = LoRASpec(4, 8.0, 0.1, targets, "rslora")
    (tmp_path / "adapter").mkdir()
    masters = {name: torch.zeros(shape) for name, shape in lora_shapes(decoder, spec).items()}
    write_adapter(tmp_path / "adapter", spec, masters, "owner/name")
    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert refused_by_vllm(tmp_path / "adapter", known, 8) == []
    assert refused_by_vllm(tmp_path / "adapter", known, 1) == ["rank"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True, "bias": "all"}))
    assert refused_by_vllm(tmp_path / "adapter", known - {"q_proj"}, 8)[:2] == ["use_dora", "bias"]
    assert any("q_proj" in one for one in refused_by_vllm(tmp_path / "adapter", known - {"q_proj"}, 8))


def test_the_page_names_vllms_ranks() -> None:
    assert ", ".join(map(str, RANKS)) in " ".join(PAGE.split())
