"""What a run writes, foreseen: against the bytes of a real run, and refused before it begins where it has no room."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from luthier.errors import FitError
from luthier.hardware.device import GIB
from luthier.plan.choose import choose
from luthier.plan.disk import Written, checkpoint_bytes, predict_disk
from luthier.plan.sizes import adapter_parameters
from tests.plan.test_choose import FACTS, H100, LLAMA_8B, PROJECTIONS, SPRIG, recipe

RECIPE = """\
model: sprig
data: pirate
adapter: {rank: 24, alpha: 8}
train: {steps: 5, batch_size: 2, micro_batch: 2, warmup_steps: 0, eval_every: 2, save_every: 1, keep: 2}
evaluate: {limit: 2, samples: 1, max_new_tokens: 2}
export: [hf, gguf, ollama]
"""


def size_of(path: Path) -> int:
    """What it takes on disk, in whole blocks."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_blocks * 512 for file in files)


def test_the_bytes_of_a_real_run(tmp_path: Path) -> None:
    """Never less than is written, and no more than what comes and goes on the way explains."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "luthier", "run", "recipe.yaml", "--out", "run", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    run, plan = tmp_path / "run", orjson.loads(done.stdout)["plan"]
    parts = {part["name"]: part["bytes"] for part in plan["memory"]["disk"]["parts"]}
    kept = [path for path in (run / "checkpoints").iterdir() if path.is_dir()]
    assert 2 <= len(kept) <= 3  # the newest two, and the best where it is neither
    one = checkpoint_bytes(plan["trainable_parameters"], "adamw")
    assert all(size_of(path) <= one <= 1.1 * size_of(path) for path in kept)
    assert parts["checkpoints"] == 4 * one
    assert size_of(run / "adapter") <= parts["adapter"] / 2
    for kind, name in (("hf", "merged model"), ("gguf", "gguf"), ("ollama", "ollama")):
        assert size_of(run / "exports" / kind) <= parts[name] <= 1.35 * size_of(run / "exports" / kind), kind
    assert size_of(run / "events.jsonl") <= parts["events"]
    assert size_of(run) <= plan["memory"]["disk"]["bytes"]


def test_each_checkpoint_kept_counts() -> None:
    few, many = (predict_disk(SPRIG, 1000, "adamw", Written(("hf",), keep=keep, steps=10)).bytes for keep in (1, 5))
    assert many - few == 4 * checkpoint_bytes(1000, "adamw")


def test_a_model_in_several_files_counts_in_full() -> None:
    """A merged file ends at 5 GB, the model does not."""
    disk = predict_disk(LLAMA_8B, 1000, "adamw", Written(("hf",)))
    merged = next(part.bytes for part in disk.parts if part.name == "merged model")
    assert merged > 2 * 8.03e9


def test_where_it_does_not_fit_keeping_fewer_is_offered_and_does() -> None:
    asked = {"adapter": {"rank": 256}, "export": [], "train": {"keep": 20, "optimizer": "adamw"}}
    need = choose(recipe(**asked), H100, LLAMA_8B, FACTS).memory.disk
    one = checkpoint_bytes(adapter_parameters(LLAMA_8B, PROJECTIONS, 256), "adamw")
    device = replace(H100, disk_gib=(need.bytes - 10 * one) / GIB)
    with pytest.raises(FitError, match="the disk is too small: checkpoints ") as caught:
        choose(recipe(**asked), device, LLAMA_8B, FACTS)
    assert caught.value.exit_code == 4
    assert "train.keep: 1 (with one checkpoint beside the best " in str(caught.value.remedy)
    assert "export: []" not in str(caught.value.remedy)  # nothing is exported as it is
    fewer = choose(recipe(**{**asked, "train": {"keep": 1, "optimizer": "adamw"}}), device, LLAMA_8B, FACTS)
    assert fewer.memory.disk.bytes == need.bytes - 19 * one
    assert fewer.settings.keep == 1
    assert fewer.decision("train.keep").source == "your recipe"


def test_the_plan_says_how_soon_a_stop_is_done() -> None:
    plan = choose(recipe(train={"max_time": "2h30m", "on_nonfinite": "skip 3"}), H100, LLAMA_8B, FACTS)
    assert plan.settings.max_time == 9000.0
    assert plan.settings.on_nonfinite == 3
    limit = plan.decision("train.max_time")
    assert limit.value == "2h30m"
    assert "with room for one step (" in limit.reason
    assert "and two saves (" in limit.reason
    free = choose(recipe(), H100, LLAMA_8B, FACTS).decision("train.max_time")
    assert free.value is None
    assert "Ctrl-C, SIGTERM or SIGHUP stops it with a checkpoint within one step (" in free.reason
