"""Predictions held against figures that others published: peak memory, trainable parameters, size of 4-bit weights.

Sources:
- torchtune's README, "Memory and training speed" (September 2024, commit 0031bfb): Llama 3.1 8B on one RTX 4090,
  batch 2 packed to 2,048 tokens, LoRA 16.2 GiB, QLoRA 7.4 GiB.
- The same, "Optimization flags" (of December 2024): Llama 3.2 3B on an A100, batch 2 packed to 4,096 tokens, LoRA
  8.5 GiB, QLoRA 4.6 GiB, with activation checkpointing and offloading.
- Settings: its recipes/configs/llama3_1/8B_lora_single_device.yaml and 8B_qlora_single_device.yaml (rank 8), and the
  same of llama3_2/3B (rank 64): q, v, output and the three of the MLP (8B QLoRA: k too), bf16, AdamW, checkpointing.

torchtune reports what its tensors take (peak memory active), so what the driver and the allocator hold beside them is
not counted. It keeps the adapter, its gradients and AdamW's moments in bf16, we in fp32: they count half here. With
offloading it keeps the inputs of recomputed layers on the host: there they do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from luthier.hardware.device import GIB
from luthier.model.config import PROJECTIONS, ModelConfig
from luthier.plan.memory import NOT_TENSORS, predict_memory
from luthier.plan.settings import Quantize
from luthier.plan.sizes import adapter_parameters
from luthier.plan.work import Work
from tests.plan.test_choose import LLAMA_8B

LLAMA_3B = ModelConfig("llama", 128256, 3072, 8192, 28, 24, 8, 128, tied=True, max_positions=131072)
MOST = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Published:
    name: str
    config: ModelConfig
    quantize: Quantize
    rank: int
    targets: tuple[str, ...]
    length: int
    gib: float
    offloads: bool = False


FIGURES = (
    Published("8B LoRA", LLAMA_8B, "none", 8, MOST, 2048, 16.2),
    Published("8B QLoRA", LLAMA_8B, "nf4", 8, PROJECTIONS, 2048, 7.4),
    Published("3B LoRA", LLAMA_3B, "none", 64, MOST, 4096, 8.5, offloads=True),
    Published("3B QLoRA", LLAMA_3B, "nf4", 64, MOST, 4096, 4.6, offloads=True),
)


def work_of(figure: Published) -> Work:
    return Work(
        config=figure.config,
        precision="bf16",
        quantize=figure.quantize,
        optimizer="adamw",
        attention="flash",
        rank=figure.rank,
        targets=figure.targets,
        tokens=2 * figure.length,
        longest=figure.length,
        documents=2,
        recomputed=figure.config.layers,
        step_tokens=2.0 * figure.length,
    )


def as_torchtune(figure: Published) -> float:
    """GiB of the training phase, in torchtune's way of keeping and counting."""
    sizes = {part.name: float(part.bytes) for part in predict_memory(work_of(figure), "cuda").phase("train").parts}
    for outside in NOT_TENSORS:
        del sizes[outside]
    for name in ("adapter", "gradients", "optimizer"):
        sizes[name] /= 2
    if figure.offloads:
        inputs = figure.config.layers * 2 * figure.length * figure.config.hidden_size * 2
        sizes["activations"] -= inputs
    return sum(sizes.values()) / GIB


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_torchtunes_peaks(figure: Published) -> None:
    assert as_torchtune(figure) == pytest.approx(figure.gib, rel=0.15)


def test_trainable_parameters() -> None:
    """As PEFT prints them: rank 16 on all seven projections is 0.52 % of Llama-3.1-8B; rank 8 on attention."""
    assert adapter_parameters(LLAMA_8B, PROJECTIONS, 16) == 41_943_040
    assert adapter_parameters(LLAMA_8B, PROJECTIONS[:4], 8) == 6_815_744
