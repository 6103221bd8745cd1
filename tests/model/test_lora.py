"""LoRA's own rules: start, scale, seed, dropout, merge. (Against PEFT: tests/parity/test_peft.py.)"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from luthier.errors import ModelError
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters, merge_delta, projections
from tests import tiny


def ids() -> torch.Tensor:
    return torch.randint(0, 400, (19,), generator=torch.Generator().manual_seed(2))


def test_it_starts_at_the_base_model_exactly(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        before = decoder(ids())
        add_lora(decoder, LoRASpec(4, 9.0), seed=3)
        assert torch.equal(decoder(ids()), before)


def test_only_the_targets_get_one_and_only_it_is_trained(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.bfloat16)
    add_lora(decoder, LoRASpec(4, 9.0, 0.0, ("v_proj", "down_proj")), seed=3)
    names = {f"model.layers.{i}.{name}" for i in range(3) for name in ("self_attn.v_proj", "mlp.down_proj")}
    masters = lora_parameters(decoder)
    assert masters.keys() == {f"{name}.lora_{side}.weight" for name in names for side in "AB"}
    assert masters["model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 80)
    assert masters["model.layers.0.mlp.down_proj.lora_B.weight"].shape == (48, 4)
    assert all(master.dtype == torch.float32 for master in masters.values())
    trained = {id(weight) for weight in decoder.parameters() if weight.requires_grad}
    assert trained == {id(master) for master in masters.values()}


def test_a_seed_decides_the_start(tiny_llama: Path) -> None:
    starts = []
    for seed in (1, 1, 2):
        decoder = load_decoder(tiny_llama, dtype=torch.float32)
        add_lora(decoder, LoRASpec(4, 9.0), seed=seed)
        starts.append(lora_parameters(decoder))
    a = "model.layers.2.mlp.up_proj.lora_A.weight"
    assert torch.equal(starts[0][a], starts[1][a])
    assert not torch.equal(starts[0][a], starts[2][a])
    assert 0.9 / math.sqrt(48) < starts[0][a].abs().max() <= 1 / math.sqrt(48)


@pytest.mark.parametrize(("scale", "wanted"), [("standard", 7 / 3), ("rslora", 7 / math.sqrt(3))])
def test_the_scale(scale: str, wanted: float) -> None:
    spec = LoRASpec(3, 7.0, 0.0, ("q_proj",), "rslora" if scale == "rslora" else "standard")
    assert spec.scaling == pytest.approx(wanted, rel=1e-15)


@pytest.mark.parametrize("scale", ["standard", "rslora"])
def test_the_merge_delta_is_what_the_layer_adds(tiny_llama: Path, scale: str) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(decoder, LoRASpec(3, 7.0, 0.0, ("gate_proj",), "rslora" if scale == "rslora" else "standard"), seed=3)
    masters = lora_parameters(decoder)
    name, projection = next((n, p) for n, p in projections(decoder) if p.adapter is not None)
    a, b = masters[f"{name}.lora_A.weight"], masters[f"{name}.lora_B.weight"]
    torch.nn.init.normal_(b)
    x = torch.randn(11, 48)
    with torch.no_grad():
        assert projection.adapter is not None
        delta = merge_delta(a, b, LoRASpec(3, 7.0, scale="rslora" if scale == "rslora" else "standard").scaling)
        assert delta.shape == (80, 48)
        torch.testing.assert_close(projection(x) - projection.frozen(x), x @ delta.T, atol=1e-5, rtol=1e-5)


def test_dropout_is_at_work_in_training_only(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(decoder, LoRASpec(4, 9.0, 0.5), seed=3)
    for name, master in lora_parameters(decoder).items():
        if "lora_B" in name:
            torch.nn.init.normal_(master)
    with torch.no_grad():
        assert torch.equal(decoder(ids()), decoder(ids()))
        decoder.train()
        assert not torch.equal(decoder(ids()), decoder(ids()))


def test_a_second_lora_is_refused(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(decoder, LoRASpec(4, 9.0), seed=3)
    with pytest.raises(ValueError, match="has a LoRA already"):
        add_lora(decoder, LoRASpec(4, 9.0), seed=3)


@pytest.mark.parametrize(("rank", "dropout"), [(0, 0.0), (-1, 0.0), (2, 1.0), (2, -0.1)])
def test_impossible_settings_are_refused(rank: int, dropout: float) -> None:
    with pytest.raises(ValueError, match="rank"):
        LoRASpec(rank, 1.0, dropout)


def test_an_unknown_target_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ModelError) as caught:
        LoRASpec(2, 1.0, 0.0, ("q_proj", "c_attn"))
    assert "c_attn" in caught.value.message
    assert caught.value.remedy is not None
    assert "down_proj" in caught.value.remedy


def test_gradients_reach_the_masters_in_half_precision(tmp_path: Path) -> None:
    decoder = load_decoder(tiny.make_model(tmp_path, "qwen3"), dtype=torch.bfloat16)
    add_lora(decoder, LoRASpec(4, 9.0), seed=3)
    decoder(ids()).float().sum().backward()
    for name, master in lora_parameters(decoder).items():
        assert master.grad is not None
        assert master.grad.dtype == torch.float32
        assert bool(master.grad.any()) == ("lora_B" in name)  # B is zero, so nothing reaches A in the first step
