"""A training step's LoRA gradients, by each set of kernels, against transformers + PEFT on rows that people wrote.

Ours take the rows packed, the peer one by one, so that it pads nothing; both with the same LoRA, whose B is not zero.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from luthier.data.batches import pack
from luthier.data.conversation import Example
from luthier.data.prepare import prepare
from luthier.data.tokenizer import load_tokenizer
from luthier.kernels import REFERENCE, Kernels
from luthier.kernels.choose import TORCH, kernels_for
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.recipe.schema import Recipe
from luthier.train.step import forward_backward
from tests import tiny

TOLERANCE = 1e-5
"""Asked for, of the norm of each gradient. fp32 rounds by 6e-8; a gradient sums some hundred tokens, through sums of a
hundred terms about ten times in a row: about 2e-6 on either side."""

BUNDLED = Path(tiny.__file__).parents[1] / "src/luthier/assets/data"
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 37},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
}
SPEC = LoRASpec(5, 7.0)
ROWS, GROUPS = 4, 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose every number is one of bf16, so that both dtypes train the same model."""
    made = tmp_path_factory.mktemp("families")
    for family, changes in FAMILIES.items():
        tiny.make_model(made / family, family, max_position_embeddings=2048, **changes)
        model = AutoModelForCausalLM.from_pretrained(made / family, dtype=torch.bfloat16)
        model.float().save_pretrained(made / family)
    return {family: made / family for family in FAMILIES}


@pytest.fixture(scope="module", params=["bundled", pytest.param("gsm8k", marks=pytest.mark.shared)])
def rows(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Sequence[Example]:
    """The first rows of a file, tokenised and labelled as for a run."""
    if request.param == "bundled":
        file = BUNDLED / "pirate" / "train.jsonl"
    else:
        file = request.getfixturevalue("shared") / "data" / "gsm8k_train.jsonl"
    few = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    with file.open(encoding="utf-8") as lines:
        tiny.write_rows(few, [json.loads(line) for line in islice(lines, ROWS * GROUPS)])
    recipe = Recipe(model="unused", data=[str(few)], split={"train": 1.0, "eval": 0.0})
    found = prepare(recipe, load_tokenizer(folders["llama"])).train
    assert len(found) == ROWS * GROUPS
    return [found[i] for i in range(len(found))]


@pytest.fixture(params=["native", "torch", "reference"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param != "native":
        return TORCH if request.param == "torch" else REFERENCE
    choice = kernels_for(torch.device("cpu"), torch.float32)
    if not choice.kernels.name.startswith("native"):
        pytest.skip(choice.notice)
    return choice.kernels


def peft_model(folder: Path, dtype: torch.dtype) -> PeftModel:
    """With A and B in fp32 whatever the base is in, as PEFT has them."""
    config = LoraConfig(r=SPEC.rank, lora_alpha=7, target_modules=list(SPEC.targets), task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in peft_tensors(model).values():
            weight.copy_((torch.randn(weight.shape, generator=generator) * 0.1).bfloat16())
    return model.train()


def peft_tensors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    named = ((name.removeprefix("base_model.model."), weight) for name, weight in model.named_parameters())
    return {name.replace(".default", ""): weight for name, weight in named if "lora_" in name}


def peft_step(model: PeftModel, rows: Sequence[Example], dtype: torch.dtype) -> tuple[float, dict[str, Tensor]]:
    """The mean loss of the labelled tokens and its gradients; in bf16 under autocast, as TRL's trainer computes."""
    model.zero_grad(set_to_none=True)
    labelled, total = sum(int((row.labels[1:] != -100).sum()) for row in rows), 0.0
    for row in rows:
        ids, labels = torch.from_numpy(row.ids).long(), torch.from_numpy(row.labels).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(ids[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum") / labelled
        loss.backward()
        total += float(loss.detach())
    named = peft_tensors(model).items()
    return total, {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


@dataclass(frozen=True)
class Peer:
    """What PEFT makes of each group of rows, in fp32 and in bf16, of the same model, and the LoRA that it has."""

    folder: Path
    groups: tuple[Sequence[Example], ...]
    values: dict[str, Tensor]
    single: tuple[tuple[float, dict[str, Tensor]], ...]
    half: tuple[tuple[float, dict[str, Tensor]], ...]


@pytest.fixture(scope="module", params=list(FAMILIES))
def peer(request: pytest.FixtureRequest, folders: dict[str, Path], rows: Sequence[Example]) -> Peer:
    folder = folders[request.param]
    groups = tuple(rows[start : start + ROWS] for start in range(0, ROWS * GROUPS, ROWS))
    single, half = peft_model(folder, torch.float32), peft_model(folder, torch.bfloat16)
    return Peer(
        folder,
        groups,
        {name: weight.detach() for name, weight in peft_tensors(single).items()},
        tuple(peft_step(single, group, torch.float32) for group in groups),
        tuple(peft_step(half, group, torch.bfloat16) for group in groups),
    )


def our_model(peer: Peer, dtype: torch.dtype) -> Decoder:
    decoder = load_decoder(peer.folder, dtype=dtype)
    add_lora(decoder, SPEC, seed=0)
    masters = lora_parameters(decoder)
    assert masters.keys() == peer.values.keys()
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(peer.values[name])
    return decoder.train()


def our_step(decoder: Decoder, kernels: Kernels, rows: Sequence[Example]) -> tuple[float, dict[str, Tensor]]:
    """The same of our training step, in two micro-batches, one layer recomputed."""
    decoder.use(kernels)
    decoder.checkpointing = 1
    masters = lora_parameters(decoder)
    for master in masters.values():
        master.grad = None
    half = len(rows) // 2
    loss = forward_backward(decoder, [pack(rows[:half]), pack(rows[half:])])
    return loss, {name: master.grad for name, master in masters.items() if master.grad is not None}


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


def test_gradients_in_fp32_are_pefts(peer: Peer, kernels: Kernels) -> None:
    decoder = our_model(peer, torch.float32)
    for group, (loss, wanted) in zip(peer.groups[:2], peer.single[:2], strict=True):
        our_loss, ours = our_step(decoder, kernels, group)
        assert our_loss == pytest.approx(loss, rel=1e-6)
        assert ours.keys() == wanted.keys()
        assert len(ours) == 3 * 7 * 2
        for name, gradient in wanted.items():
            assert distance(ours[name], gradient) < TOLERANCE, name


def test_gradients_in_bf16_are_no_worse_than_pefts(peer: Peer, kernels: Kernels) -> None:
    """Both against PEFT in fp32: the errors of all gradients of four steps together, which the draw of the roundings
    changes by 5 %."""
    decoder = our_model(peer, torch.bfloat16)
    ours, theirs = 0.0, 0.0
    for group, (_, exact), (_, half) in zip(peer.groups, peer.single, peer.half, strict=True):
        wanted = together(exact)
        theirs += distance(together(half), wanted) ** 2
        ours += distance(together(our_step(decoder, kernels, group)[1]), wanted) ** 2
    assert 0.0 < ours < 1.05**2 * theirs


def together(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])
