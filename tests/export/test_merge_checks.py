"""What a merge refuses, what it takes of memory and disk, and the way back to the base."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError, FitError, ModelError
from luthier.export.merge import How, merge
from luthier.export.origin import is_merged_from, note_base
from luthier.export.room import check_room
from luthier.export.unmerge import unmerge
from luthier.model.adapter import save_adapter
from luthier.model.fingerprint import fingerprint
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny
from tests.export.texts import mixed, with_llama_3s_vocabulary

PLENTY = 2**60


def adapter_for(base: Path, folder: Path, targets: tuple[str, ...] = ("q_proj", "down_proj")) -> Path:
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, LoRASpec(3, 7.0, targets=targets), seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(decoder, folder, base="somewhere")
    note_base(folder, "owner/base", fingerprint(base))
    return folder


def template_of(base: Path) -> Template:
    return make_template("model", load_tokenizer(base))


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


# --- bad input --------------------------------------------------------------------------------------------------------


def test_pairs_that_are_missing_are_listed(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    kept = {name: values for name, values in load_file(path).items() if "layers.1." not in name}
    save_file(kept, path)
    with pytest.raises(ExportError, match="lacks 2 of the 6 pairs") as caught:
        merge(base, adapter, tmp_path / "out", template_of(base))
    for name in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert name in caught.value.message
    assert "layers.0" not in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_rank_that_its_config_does_not_say_is_refused(tmp_path: Path) -> None:
    """The scale is alpha by the rank of the config: with another one the update would be the wrong size in silence."""
    base = tiny.make_model(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 6}))
    with pytest.raises(ExportError, match=r"rank 3 in its tensors, 6 in adapter_config\.json"):
        merge(base, adapter, tmp_path / "out", template_of(base))


def test_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    base, other = tiny.make_model(tmp_path / "base"), tiny.make_model(tmp_path / "other", seed=1)
    adapter = adapter_for(base, tmp_path / "adapter")
    with pytest.raises(ExportError, match="fingerprint") as caught:
        merge(other, adapter, tmp_path / "out", template_of(other))
    assert fingerprint(base)[:12] in caught.value.message
    assert "owner/base" in caught.value.message
    assert "give the base that the adapter was trained on" in str(caught.value.remedy)
    assert merge(base, adapter, tmp_path / "out", template_of(base)).merged == 6


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", max_shard_size="60KB")
    adapter, template = adapter_for(base, tmp_path / "adapter"), template_of(base)
    gone = sorted(base.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        merge(base, adapter, tmp_path / "out", template)


def test_a_base_without_all_of_its_tensors_is_refused(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base")
    adapter, template = adapter_for(base, tmp_path / "adapter"), template_of(base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]  # not an adapted one
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (adapter / "base.json").unlink()
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight: .* is missing"):
        merge(base, adapter, tmp_path / "out", template)


def test_a_disk_too_small_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path / "not" / "there" / "yet", 1, "it")
    with pytest.raises(FitError, match=r"the model takes 1\.15e\+09 GB, and the disk of") as caught:
        check_room(tmp_path / "not" / "there", PLENTY, "the model")
    assert str(tmp_path) in caught.value.message
    assert not (tmp_path / "not").exists()
    base = tiny.make_model(tmp_path / "base")
    adapter, template = adapter_for(base, tmp_path / "adapter"), template_of(base)

    class Usage(NamedTuple):
        free: int = 2**24 + 100_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _place: Usage())
    with pytest.raises(FitError, match="merged model"):
        merge(base, adapter, tmp_path / "out", template)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# --- memory -----------------------------------------------------------------------------------------------------------

MERGES = """
import resource, sys
from pathlib import Path
import torch
from luthier.data.render import make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.export.merge import How, merge
from luthier.model.adapter import write_adapter
from luthier.model.load import check_weights
from luthier.model.lora import LoRASpec, lora_shapes
base, folder = Path(sys.argv[1]), Path(sys.argv[2])
spec = LoRASpec(16, 32.0)
(folder / "adapter").mkdir(parents=True)
shapes = lora_shapes(check_weights(base), spec)
write_adapter(folder / "adapter", spec, {name: torch.full(shape, 0.01) for name, shape in shapes.items()}, "x")
made = merge(base, folder / "adapter", folder / "merged", make_template("model", load_tokenizer(base)))
print(made.merged, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def wide_model(folder: Path, layers: int) -> Path:
    """Llama 3.2 1B's shapes in `layers` layers, one bf16 shard of zeros that takes no room on the disk."""
    sizes = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
    tokenizer = tiny.make_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    AutoConfig.for_model("llama", **sizes, **heads, **ids).save_pretrained(folder)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0

    def add(name: str, *shape: int) -> None:
        nonlocal end
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}

    add("model.embed_tokens.weight", 128256, 2048)
    add("model.norm.weight", 2048)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for name, rows, columns in (
            *(("self_attn.q_proj", 2048, 2048), ("self_attn.k_proj", 512, 2048), ("self_attn.v_proj", 512, 2048)),
            *(("self_attn.o_proj", 2048, 2048), ("mlp.gate_proj", 8192, 2048), ("mlp.up_proj", 8192, 2048)),
            ("mlp.down_proj", 2048, 8192),
        ):
            add(f"{at}.{name}.weight", rows, columns)
        add(f"{at}.input_layernorm.weight", 2048)
        add(f"{at}.post_attention_layernorm.weight", 2048)
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        file.truncate(8 + len(packed) + end)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux, and sparse files are everywhere")
@pytest.mark.parametrize("layers", [2, pytest.param(16, marks=pytest.mark.slow)])
def test_memory_is_bounded(layers: int, tmp_path: Path) -> None:
    """Also below one shard's size where that is large: one tensor is held at a time."""
    base = wide_model(tmp_path / "base", layers)
    command = [sys.executable, "-c", MERGES, str(base), str(tmp_path / "made")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    merged, peak = map(int, done.stdout.split())
    shard = (base / "model.safetensors").stat().st_size
    assert merged == 7 * layers
    assert peak < 1.5 * shard + 2**30
    if layers == 16:
        assert peak < shard
    shutil.rmtree(tmp_path / "made")


# --- onto the quantised base, and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_onto_quantised_is_what_the_adapter_was_trained_against(compute: torch.dtype, tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    name = "fp32" if compute is torch.float32 else "bf16"
    made = merge(base, adapter, tmp_path / "out", template_of(base), dtype="fp32", how=How(onto_quantised=name))
    assert made.onto == "nf4"
    held = load_decoder(base, dtype=compute, quantize="nf4")
    factors = load_file(adapter / "adapter_model.safetensors")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for weight, values in after.items():
        owner = weight.removesuffix(".weight")
        if "_proj" not in weight:
            assert torch.equal(values, before[weight]), weight
            continue
        wanted = held.get_submodule(owner).dense().float()
        assert not torch.equal(wanted, before[weight])
        stem = f"base_model.model.{owner}"
        if f"{stem}.lora_A.weight" in factors:
            wanted = wanted + 7.0 / 3 * (factors[f"{stem}.lora_B.weight"] @ factors[f"{stem}.lora_A.weight"])
        assert torch.equal(values, wanted), weight


@pytest.mark.parametrize("case", ["bf16", "fp16, sharded", "fp32, tied copy"])
def test_undone_is_the_base_to_the_byte(case: str, tmp_path: Path) -> None:
    base = tiny.make_model(
        tmp_path / "base",
        max_shard_size="60KB" if "sharded" in case else "5GB",
        tie_word_embeddings="tied" in case,
    )
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[case.split(",")[0]]
    for file in base.glob("*.safetensors"):
        weights = {name: values.to(dtype) for name, values in load_file(file).items()}
        if "tied" in case:
            weights["lm_head.weight"] = torch.ones_like(weights["model.embed_tokens.weight"])
        save_file(weights, file, {"format": "pt", "made": "by a test"})
    adapter = adapter_for(base, tmp_path / "adapter")
    merged = tmp_path / "merged"
    merge(base, adapter, merged, make_template("alpaca", load_tokenizer(base)), how=How(reversible=True))
    AutoModelForCausalLM.from_pretrained(merged)  # what is kept for the way back is in nobody's way
    assert unmerge(merged, tmp_path / "again").files == len(list(base.glob("*.safetensors")))
    assert hashes(tmp_path / "again") == hashes(base)
    if "fp32" in case:  # merged in bf16: the record has every tensor whole, and needs nothing of the merged ones
        return
    changed = sorted(merged.glob("*.safetensors"))[0]
    with changed.open("r+b") as file:
        file.seek(-2, 2)
        file.write(b"\x01\x02")
    with pytest.raises(ExportError, match="not the file that was merged"):
        unmerge(merged, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_a_merge_without_a_record_cannot_be_undone(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base")
    merge(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "out", template_of(base))
    with pytest.raises(ExportError, match="without a record") as caught:
        unmerge(tmp_path / "out", tmp_path / "again")
    assert "--reversible" in str(caught.value.remedy)


def test_a_merge_knows_the_adapter_it_was_made_of(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base")
    adapter = adapter_for(base, tmp_path / "adapter")
    assert not is_merged_from(tmp_path / "out", adapter)
    merge(base, adapter, tmp_path / "out", template_of(base))
    assert is_merged_from(tmp_path / "out", adapter)
    adapter_for(base, adapter, targets=("q_proj",))
    assert not is_merged_from(tmp_path / "out", adapter)


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    """A base whose vocabulary was extended: rows of the embedding and names of the tokens go along as they are."""
    base = tiny.make_model(tmp_path / "base", tie_word_embeddings=True, vocab_size=416)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|plan|>", "<|act|>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    merge(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "out", template_of(base), dtype="fp32")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "First <|plan|> and then<|act|>."
    assert again.encode(text) == tokenizer.encode(text)
    assert {400, 401} <= set(again.encode(text))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.shared
def test_ids_of_500_texts_in_transformers(shared: Path, tmp_path: Path) -> None:
    """What is merged tokenises in transformers as it was trained: Llama 3's vocabulary, and sprig's."""
    for base in (with_llama_3s_vocabulary(shared, tmp_path / "llama-3"), locate_model("sprig")):
        tokenizer, out = load_tokenizer(base), tmp_path / f"out-{base.name}"
        merge(base, adapter_for(base, tmp_path / f"adapter-{base.name}"), out, make_template("llama3", tokenizer))
        theirs = AutoTokenizer.from_pretrained(out)
        texts = mixed(500)
        assert [text for text in texts if theirs.encode(text, add_special_tokens=False) != tokenizer.encode(text)] == []
