"""Pickles run code when they are opened: none is, whatever it is called and wherever it lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luthier.model.locate import locate_model
from tests.cli.command import Command
from tests.security.conftest import Refused

TRAIN = ("train", "recipe.yaml")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "model.pkl"])
def test_weights_that_are_only_a_pickle(refused: Refused, model: Path, payload: bytes, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(payload)
    refused(TRAIN, f"only pickled weights ({name}); opening a pickle can run code", "save_pretrained")


def test_pickles_beside_safetensors_are_never_opened(
    luthier: Command, model: Path, payload: bytes, marker: Path
) -> None:
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt", "rng_state.pth"):
        (model / name).write_bytes(payload)
    ended = luthier("plan", "recipe.yaml", "--json")
    assert ended.code == 0, ended.err
    assert locate_model(str(model)) == model
    assert not marker.exists()


def test_a_pickle_by_the_name_of_safetensors(refused: Refused, model: Path, payload: bytes) -> None:
    (model / "model.safetensors").write_bytes(payload)
    refused(TRAIN, "model.safetensors cannot be read as a safetensors file: it claims a header of")


def test_an_index_that_names_pickles(refused: Refused, model: Path, payload: bytes) -> None:
    (model / "pytorch_model.bin").write_bytes(payload)
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    refused(TRAIN, "names files that are not .safetensors; no other kind is opened")


def test_an_adapter_that_is_only_a_pickle(refused: Refused, model: Path, payload: bytes, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"],
              "base_model_name_or_path": str(model)}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in ("adapter_model.bin", "optimizer.pt", "training_args.bin"):
        (adapter / name).write_bytes(payload)
    refused(
        ("generate", adapter, "--prompt", "hello"), "pickled adapters (.bin) are not read", "PEFT writes safetensors"
    )


def test_rows_that_are_a_pickle(refused: Refused, model: Path, payload: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.pkl").write_bytes(payload)
    refused(("data", "check", tmp_path / "rows.pkl"), "rows.pkl", code=3)
