"""Every file of a checkpoint, cut or changed at any byte, linked elsewhere or gone: always found, never loaded."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from luthier.errors import Interrupted, LuthierError, TrainingError
from luthier.model.tensor_file import write_tensors
from luthier.runs import RunDirectory
from luthier.train.checkpoint import load_checkpoint, read_state
from luthier.train.checkpoints import Checkpoints, name_of
from luthier.train.events import WarningEvent
from luthier.train.making import make_trainee
from luthier.train.manifest import MANIFEST, check, read, seal
from tests.train.snapshots import save as save_snapshot
from tests.train.snapshots import snapshot
from tests.train.test_loop import SETTINGS, Signals, assert_same_run, run_it
from tests.train.world import Recorder, tiny_decoder

FILES = (
    *("manifest.json", "state.json", "optimizer.safetensors", "rng.safetensors"),
    *("adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
)
SAMPLED = 150
"""Offsets of each file of tensors; of the JSON files all are taken."""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4, both whole."""
    folder = tmp_path_factory.mktemp("two")
    for step in (2, 4):
        save_snapshot(folder, snapshot(step), keep=3)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_byte_counts(two: Path, name: str) -> None:
    """At each offset a bit flipped, and the file cut: this one is named, and the one before it found instead."""
    path, drawn = two / name_of(4) / name, random.Random(name)
    content = path.read_bytes()
    offsets = range(len(content))
    if name.endswith(".safetensors") and len(content) > SAMPLED:
        offsets = sorted({*drawn.sample(offsets, SAMPLED), *range(16), len(content) - 1})
    try:
        for offset in offsets:
            flipped = bytearray(content)
            flipped[offset] ^= 1 << drawn.randrange(8)
            for harmed in (bytes(flipped), content[:offset]):
                path.write_bytes(harmed)
                found = Checkpoints(two).newest_whole()
                assert found.step == 2, f"{name} was changed at {offset} and nobody saw it"
                assert len(found.damaged) == 1
                assert f"step-000004 is not whole ({name}: " in found.damaged[0]
    finally:
        path.write_bytes(content)
    assert Checkpoints(two).newest_whole().step == 4
    assert len(offsets) >= 100, "or this shows little"


@pytest.mark.parametrize("name", FILES)
def test_a_longer_file_a_missing_one_and_a_link_are_seen(two: Path, tmp_path: Path, name: str) -> None:
    path = two / name_of(4) / name
    content = path.read_bytes()
    aside = tmp_path / "aside"
    aside.write_bytes(content)
    try:
        path.write_bytes(content + b"\n")
        assert Checkpoints(two).newest_whole().step == 2
        path.unlink()
        assert Checkpoints(two).newest_whole().step == 2
        path.symlink_to(aside)
        assert Checkpoints(two).newest_whole().step == 2, "the same bytes, where somebody else may change them"
        path.unlink()
        path.mkdir()
        assert Checkpoints(two).newest_whole().step == 2
        path.rmdir()
    finally:
        path.write_bytes(content)
    assert Checkpoints(two).newest_whole().step == 4


def test_a_folder_under_anothers_name_is_seen(two: Path, tmp_path: Path) -> None:
    """A copy of step 2 in the place of step 6."""
    shutil.copytree(two, tmp_path / "c")
    shutil.copytree(two / name_of(2), tmp_path / "c" / name_of(6))
    found = Checkpoints(tmp_path / "c").newest_whole()
    assert found.step == 4
    assert "another step: step 2, where step 6 was written" in found.damaged[0]


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "adapter/../state.json", "", ".", "a\\b", "./x", "a//b"]
)
def test_a_manifest_names_no_file_elsewhere(two: Path, tmp_path: Path, name: str) -> None:
    """Its own hash is right: somebody made it so."""
    folder = tmp_path / name_of(4)
    shutil.copytree(two / name_of(4), folder)
    document = json.loads((folder / MANIFEST).read_text())
    document["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    resealed(folder, document)
    (fault,) = check(folder, "checkpoint", 4)
    assert (fault.file, fault.reason) == (MANIFEST, "names a file outside its folder")


def resealed(folder: Path, document: dict[str, object]) -> None:
    """Write the manifest with a hash that is right."""
    import hashlib

    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    body = {key: value for key, value in document.items() if key != "sha256"}
    own = hashlib.sha256(orjson.dumps(body, option=options)).hexdigest()
    (folder / MANIFEST).write_bytes(orjson.dumps({**body, "sha256": own}, option=options))


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=400), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["schema", "kind", "step", "files", "sha256", "bytes", "x"]), inner, max_size=6),
    max_leaves=20,
)))  # fmt: skip
def test_any_other_manifest_is_a_fault(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    faults = check(folder, "checkpoint")
    assert [fault.file for fault in faults] == [MANIFEST]
    with pytest.raises(ValueError, match="manifest"):
        read(folder)


def harm(folder: Path) -> None:
    """One bit of a weight."""
    path = folder / "adapter" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def test_the_one_before_is_gone_on_from_and_the_damage_told(tiny_llama: Path, tmp_path: Path) -> None:
    expected = run_it(tiny_llama, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path / "run", listener=Signals(at=5))
    harm(tmp_path / "run" / "checkpoints" / name_of(5))
    listener = Recorder()
    result = run_it(tiny_llama, tmp_path / "run", listener=listener, resume=True)
    assert listener.events[0].step == 4
    (told,) = [event.message for event in listener.events if isinstance(event, WarningEvent)]
    assert told.startswith("step-000005 is not whole (adapter/adapter_model.safetensors: changed: SHA-256 ")
    assert told.endswith("going on from step-000004")
    assert_same_run(tmp_path / "run", result, (tmp_path / "whole", expected))


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("rng.safetensors", {}),
        ("rng.safetensors", {"cpu": torch.zeros(7, dtype=torch.uint8)}),
        ("rng.safetensors", {"cpu": torch.zeros(5056)}),
        ("optimizer.safetensors", {}),
        ("optimizer.safetensors", {"model.layers.0.self_attn.q_proj.lora_A.weight/exp_avg": torch.zeros(3)}),
        ("adapter/adapter_model.safetensors", {"x": torch.zeros(3)}),
    ],
)
def test_a_sealed_checkpoint_with_other_tensors_is_refused(
    tiny_llama: Path, tmp_path: Path, name: str, tensors: dict[str, torch.Tensor]
) -> None:
    """Its manifest is right, so somebody made it: an error, and nothing else."""
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=3))
    folder = tmp_path / "checkpoints" / name_of(3)
    (folder / name).write_bytes(save(tensors))
    seal(folder, "checkpoint", 3)
    with pytest.raises(LuthierError) as caught:
        run_it(tiny_llama, tmp_path, resume=True)
    assert caught.value.exit_code in (2, 5)
    assert caught.value.remedy


@pytest.mark.parametrize("change", [{"loss_scale": {"scale": 1.0}}, {"progress": {"step": 7}}, {"identity": None}])
def test_a_sealed_checkpoint_with_another_state_is_refused(
    tiny_llama: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    with pytest.raises(Interrupted):
        run_it(tiny_llama, tmp_path, listener=Signals(at=3))
    folder = tmp_path / "checkpoints" / name_of(3)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | change))
    seal(folder, "checkpoint", 3)
    with pytest.raises(TrainingError, match="step-000003: not a checkpoint that can be continued"):
        load_checkpoint(folder, make_trainee(tiny_decoder(tiny_llama), SETTINGS))
    with pytest.raises(TrainingError):
        run_it(tiny_llama, tmp_path, resume=True)


def test_state_is_held_against_the_manifest_by_itself(tiny_llama: Path, tmp_path: Path) -> None:
    save_snapshot(tmp_path, snapshot(4), keep=1)
    path = tmp_path / name_of(4) / "state.json"
    path.write_bytes(path.read_bytes().replace(b'"tokens": 28', b'"tokens": 29'))
    with pytest.raises(TrainingError, match=r"state\.json: changed"):
        read_state(tmp_path / name_of(4))
    assert not RunDirectory(tmp_path).adapter.exists()


TENSORS = {
    "b": torch.randn(3, 4), "a": torch.randn(3), "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3),
    "step": torch.tensor(5), "u8": torch.arange(7, dtype=torch.uint8), "i8": torch.arange(3, dtype=torch.int8),
    "bf": torch.randn(3).bfloat16(), "h": torch.randn(5).half(), "d": torch.randn(2).double(),
    "i32": torch.arange(3, dtype=torch.int32), "é": torch.zeros(1), "t": torch.randn(3, 4).mT,
}  # fmt: skip


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("names", [(), ("a",), tuple(TENSORS)])
def test_the_bytes_are_those_of_the_library(
    tmp_path: Path, names: tuple[str, ...], metadata: dict[str, str] | None
) -> None:
    tensors = {name: TENSORS[name] for name in names}
    write_tensors(tmp_path / "x", tensors, metadata)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "x").read_bytes() == save(plain, metadata=metadata)
    again = load_file(tmp_path / "x")
    assert all(torch.equal(again[name], tensor) and again[name].dtype == tensor.dtype for name, tensor in plain.items())
