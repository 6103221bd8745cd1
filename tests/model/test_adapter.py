"""An adapter from elsewhere is held against the model before any memory is taken for it. (PEFT's: tests/parity.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import FileError, ModelError
from luthier.model.adapter import CONFIG, PREFIX, WEIGHTS, load_adapter, save_adapter
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters, lora_shapes

SPEC = LoRASpec(4, 9.0, 0.0, ("q_proj", "down_proj"))


@pytest.fixture
def decoder(tiny_llama: Path) -> Decoder:
    return load_decoder(tiny_llama, dtype=torch.float32)


@pytest.fixture
def adapter(tiny_llama: Path, tmp_path: Path) -> Path:
    made = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(made, SPEC, seed=1)
    save_adapter(made, tmp_path / "adapter", base="b")
    return tmp_path / "adapter"


def refusal(decoder: Decoder, adapter: Path, kind: type[ModelError | FileError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        load_adapter(decoder, adapter)
    assert not lora_parameters(decoder), "nothing is changed"
    return caught.value.message


@pytest.mark.parametrize("targets", [("q_proj",), ("k_proj", "o_proj", "up_proj"), ("all-linear",)])
def test_the_shapes_are_those_that_are_made(decoder: Decoder, targets: tuple[str, ...]) -> None:
    spec = LoRASpec(3, 7.0, targets=targets)
    expected = lora_shapes(decoder, spec)
    add_lora(decoder, spec, seed=0)
    assert {name: tuple(leaf.shape) for name, leaf in lora_parameters(decoder).items()} == expected


def test_a_rank_of_a_billion_takes_no_memory(decoder: Decoder, adapter: Path) -> None:
    """192 GB for each of the projections, if it were believed."""
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    (adapter / CONFIG).write_text(json.dumps({**config, "r": 10**9}), encoding="utf-8")
    said = refusal(decoder, adapter)
    assert "model.layers.0.self_attn.q_proj.lora_A.weight: (4, 48), this model needs (1000000000, 48)" in said


def test_of_very_many_misfits_the_first_are_named(decoder: Decoder, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({**tensors, **{f"x.{n}": torch.zeros(1) for n in range(300)}}, adapter / WEIGHTS)
    lines = refusal(decoder, adapter).splitlines()
    assert len(lines) == 202
    assert lines[1].endswith(": no such place in this model")
    assert lines[-1] == "  and 100 more"


def test_a_tensor_under_two_names_is_none(decoder: Decoder, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    name = "model.layers.1.mlp.down_proj.lora_A.weight"
    save_file({**tensors, name: tensors[PREFIX + name].clone()}, adapter / WEIGHTS)
    assert f"{name}: twice, with {PREFIX} before it and without" in refusal(decoder, adapter)


def test_names_without_the_prefix_are_read_too(decoder: Decoder, adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    save_file({name.removeprefix(PREFIX): values for name, values in tensors.items()}, adapter / WEIGHTS)
    load_adapter(decoder, adapter)
    for name, leaf in lora_parameters(decoder).items():
        assert torch.equal(leaf, tensors[PREFIX + name])


def test_a_damaged_file_changes_nothing(decoder: Decoder, adapter: Path) -> None:
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-1])
    assert "cannot be read as a safetensors file" in refusal(decoder, adapter, FileError)
