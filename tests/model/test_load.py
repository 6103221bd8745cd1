"""Loading: shards, memory, and the report of weights that do not fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import ModelError
from luthier.model.load import load_decoder
from tests import tiny


def test_shards_are_the_single_file(tmp_path: Path) -> None:
    one = load_decoder(tiny.make_model(tmp_path / "one"), dtype=torch.float32)
    folder = tiny.make_model(tmp_path / "many", max_shard_size="70KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    many = dict(load_decoder(folder, dtype=torch.float32).named_parameters())
    assert all(torch.equal(weight, many[name]) for name, weight in one.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_one_asked_for(tiny_llama: Path, dtype: torch.dtype) -> None:
    decoder = load_decoder(tiny_llama, dtype=dtype)
    stored = load_file(tiny_llama / "model.safetensors")
    assert all(torch.equal(weight, stored[name].to(dtype)) for name, weight in decoder.named_parameters())
    assert decoder.dtype == dtype


def test_every_tensor_that_does_not_fit_is_reported_at_once(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.zeros(47)
    tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 48, dtype=torch.uint8)
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.zeros(80, 48)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_decoder(folder, dtype=torch.float32)
    message = caught.value.message
    assert "4 problem(s)" in message
    assert "model.layers.1.mlp.up_proj.weight: (80, 48) is missing" in message
    assert "model.norm.weight: (47,) in model.safetensors, the config asks for (48,)" in message
    assert "model.layers.0.self_attn.k_proj.weight: U8" in message
    assert "model.layers.3.mlp.up_proj.weight: (80, 48) in model.safetensors is not part of this model" in message


def test_a_cut_file_is_said_to_be_unreadable(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        load_decoder(folder, dtype=torch.float32)


MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from luthier.model.load import load_decoder
def resident(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
dtype = getattr(torch, sys.argv[3])
load_decoder(Path(sys.argv[2]), dtype=dtype)  # imports and lazy set-up
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
decoder = load_decoder(Path(sys.argv[1]), dtype=dtype)
weights = sum(w.numel() * w.element_size() for w in decoder.parameters())
print(json.dumps({"peak": resident("VmHWM") - before, "weights": weights}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_the_weights_and_one_tensor(tmp_path: Path, tiny_llama: Path, dtype: str) -> None:
    """A file of one shard: what is read of its mapping counts as the process's memory while the mapping stands."""
    folder = tiny.make_model(tmp_path / "large", hidden_size=768, intermediate_size=2048, num_hidden_layers=10)
    (file,) = folder.glob("*.safetensors")
    largest = max(tensor.nbytes for tensor in load_file(file).values())
    command = [sys.executable, "-c", MEASURE, str(folder), str(tiny_llama), dtype]
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    measured = json.loads(out.stdout)
    slack = 16 * 2**20  # the allocator's rounding and torch's own lazy buffers
    assert measured["weights"] > 90e6
    assert slack + largest < file.stat().st_size / 4
    assert measured["peak"] < measured["weights"] + largest + slack
