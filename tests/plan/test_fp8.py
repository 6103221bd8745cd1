"""`quantize: fp8` in the plan: only where it is asked for, only where it can be had, and what it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from luthier.errors import UsageError
from luthier.hardware.device import Device
from luthier.plan.memory import predict_memory, weight_bytes
from luthier.plan.settings import Quantize
from luthier.plan.sizes import base_bytes, layer_weights
from luthier.plan.speed import predict_speed
from luthier.plan.support import quantizes
from tests.plan.test_choose import A10G, FACTS, LLAMA_8B, MPS, SPRIG, T4, choose, recipe

HOPPER = Device("cuda", "H100", 79.6, 26, (9, 0), ("bf16", "fp16", "fp32", "fp8", "int8"))


def test_nobody_gets_it_who_did_not_ask() -> None:
    plan = choose(recipe(), HOPPER, LLAMA_8B, FACTS)
    assert plan.settings.quantize == "none"
    assert any(line.startswith("fp8: never by itself") for line in plan.decision("quantize").rejected)
    tight = choose(recipe(), replace(HOPPER, memory_gib=12.0), LLAMA_8B, FACTS)
    assert tight.settings.quantize == "nf4"


def test_who_asks_gets_it_and_is_told_what_is_not_known() -> None:
    plan = choose(recipe(quantize="fp8"), HOPPER, LLAMA_8B, FACTS)
    assert plan.settings.quantize == "fp8"
    assert plan.settings.precision == "bf16"
    decision = plan.decision("quantize")
    assert "has not been measured" in decision.reason
    assert "with the base in FP8 the run needs" in decision.reason


@pytest.mark.parametrize("device", [A10G, T4, MPS], ids=lambda device: device.name)
def test_it_is_refused_where_there_is_none(device: Device) -> None:
    with pytest.raises(UsageError, match=rf"compute capability 8\.9 or more.*and this run is on {device.name}") as no:
        choose(recipe(quantize="fp8"), device, SPRIG, FACTS)
    assert "h100-80g" in str(no.value.remedy)
    assert not quantizes("fp8", device)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_it_computes_in_bf16_only(precision: str) -> None:
    with pytest.raises(UsageError, match=f"computes in bf16, and train.precision is {precision}"):
        choose(recipe(quantize="fp8", train={"precision": precision}), HOPPER, SPRIG, FACTS)


def test_a_weight_takes_a_byte_and_an_output_four() -> None:
    plain, packed = base_bytes(LLAMA_8B, "none", "bf16"), base_bytes(LLAMA_8B, "fp8", "bf16")
    outputs = 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096
    assert plain == 2 * layer_weights(LLAMA_8B)
    assert packed == layer_weights(LLAMA_8B) + 4 * outputs


def test_memory_and_time_know_it() -> None:
    work = choose(recipe(quantize="fp8"), HOPPER, LLAMA_8B, FACTS).work

    def of(quantize: Quantize) -> int:
        return weight_bytes(replace(work, quantize=quantize))

    assert of("nf4") < of("fp8") < of("none")
    assert of("none") - of("fp8") == LLAMA_8B.layers * (
        base_bytes(LLAMA_8B, "none", "bf16") - base_bytes(LLAMA_8B, "fp8", "bf16")
    )
    parts = {part.name for part in predict_memory(work, "cuda").phase("train").parts}
    assert "operands in FP8" in parts
    assert "rounding to FP8" in dict(predict_speed(work, HOPPER).parts)
