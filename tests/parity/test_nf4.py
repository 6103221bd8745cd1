"""NF4 against transformers with bitsandbytes on the same files, and against PEFT's QLoRA gradients.

The reference stays in train mode (it has no dropout): in eval mode bitsandbytes' CPU layer repacks its weights for
AVX-512 machines and then computes in bf16 whatever the compute dtype is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from luthier.kernels import linear_cross_entropy
from luthier.model.config import FAMILIES
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny

TOLERANCE = 1e-3
"""Asked for, relative to the norm of the logits; the same quantised numbers go through the same products."""

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
WIDE = {"hidden_size": 96, "intermediate_size": 200, "num_attention_heads": 6, "num_key_value_heads": 2}
"""Weights of 96 x 200 fill 300 blocks of 64: more than one group of 256 scales, so double quantisation has two."""


def ids(device: str) -> Tensor:
    return torch.randint(0, 400, (37,), generator=torch.Generator().manual_seed(8)).to(device)


def reference(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map=device
    )
    return model.train()


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits(tmp_path: Path, family: str, dtype: torch.dtype, device: str) -> None:
    folder = tiny.make_model(tmp_path, family, **WIDE)
    decoder = load_decoder(folder, dtype=dtype, device=device, quantize="nf4")
    with torch.no_grad():
        ours, wanted = decoder(ids(device)), reference(folder, dtype, device)(ids(device)[None]).logits[0]
        full = load_decoder(folder, dtype=dtype, device=device)(ids(device))
    assert ours.dtype == dtype
    assert distance(ours, wanted) < TOLERANCE
    assert distance(full, wanted) > 10 * TOLERANCE  # it is quantised indeed


def masters_of(folder: Path, dtype: torch.dtype, device: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of our QLoRA with the given LoRA weights; the frozen weights get none."""
    decoder = load_decoder(folder, dtype=dtype, device=device, quantize="nf4").train()
    add_lora(decoder, LoRASpec(3, 7.0), seed=0)
    masters = lora_parameters(decoder)
    assert masters.keys() == values.keys()
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(values[name])
    tokens = ids(device)
    linear_cross_entropy(decoder.hidden(tokens), decoder.head_weight, tokens.roll(-1)).backward()
    trained = {weight.data_ptr() for weight in masters.values()}
    assert all((weight.grad is not None) == (weight.data_ptr() in trained) for weight in decoder.parameters())
    return {name: master.grad for name, master in masters.items() if master.grad is not None}


def pefts_gradients(folder: Path, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(LoRA weights, gradients) of PEFT's QLoRA; the weights are such that bf16 holds them exactly."""
    config = LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(reference(folder, dtype, device), config, autocast_adapter_dtype=dtype == torch.float32)
    generator = torch.Generator().manual_seed(3)
    weights = {
        name.removeprefix("base_model.model.").replace(".default", ""): weight
        for name, weight in peft.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_((torch.randn(weight.shape, generator=generator) * 0.1).bfloat16())
    tokens = ids(device)
    functional.cross_entropy(peft(tokens[None]).logits[0].float(), tokens.roll(-1), reduction="sum").backward()
    gradients = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    return {name: weight.detach().float() for name, weight in weights.items()}, gradients


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_are_those_of_pefts_qlora(tmp_path: Path, device: str) -> None:
    folder = tiny.make_model(tmp_path, "qwen2", **WIDE)
    values, wanted = pefts_gradients(folder, torch.float32, device)
    ours = masters_of(folder, torch.float32, device, values)
    for name, gradient in ours.items():
        assert distance(gradient, wanted[name]) < 1e-3, name


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_gradients_are_as_near_to_fp32_as_pefts(tmp_path: Path, device: str) -> None:
    """Both round to bf16 some twenty times in a row, not at the same places: compared by their distance to fp32."""
    folder = tiny.make_model(tmp_path, "qwen2", **WIDE)
    file = folder / "model.safetensors"  # bf16 values, so that both dtypes quantise the same numbers
    rounded = {name: tensor.bfloat16().float() for name, tensor in load_file(file).items()}
    save_file(rounded, file, metadata={"format": "pt"})
    values, theirs = pefts_gradients(folder, torch.bfloat16, device)
    exact = masters_of(folder, torch.float32, device, values)
    ours = masters_of(folder, torch.bfloat16, device, values)
    for name, gradient in exact.items():
        # an error of the same kind and size; a factor of 1.5 for the draw of the roundings
        assert distance(ours[name], gradient) < 1.5 * distance(theirs[name], gradient), name
