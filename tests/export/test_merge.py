"""What the merged folder holds, file by file, and what is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError
from luthier.export.huggingface import CardFigure, ModelCard, base_license, card_text, export_huggingface
from luthier.export.merge import merge, write_tokenizer
from luthier.model.adapter import save_adapter
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A bf16 base whose own chat template and stop tokens are not those that will be trained."""
    folder = tiny.make_model(tmp_path / "base")
    weights = {name: values.bfloat16() for name, values in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def adapter_for(base: Path, folder: Path, targets: tuple[str, ...] = ("q_proj", "down_proj")) -> Path:
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, LoRASpec(3, 7.0, targets=targets), seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(decoder, folder, base="somewhere")
    return folder


def alpaca(base: Path) -> Template:
    return make_template("alpaca", load_tokenizer(base))


def test_untouched_tensors_are_the_same_bytes(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out", alpaca(base))
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    factors = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].dtype == torch.bfloat16
        if "q_proj" in name or "down_proj" in name:
            stem = "base_model.model." + name.removesuffix(".weight")
            delta = 7.0 / 3 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double()
            exact = values.double() + delta
            # One rounding to bf16 is half an ulp, at most 2^-8 of the value; before it fp32 rounded the summands, which
            # counts where they cancel: some ten roundings of 2^-24 each.
            bound = 2**-8 * exact.abs() + 2**-20 * (values.double().abs() + delta.abs())
            assert ((after[name].double() - exact).abs() <= bound).all(), name
            assert not torch.equal(after[name], values)
        else:
            assert torch.equal(after[name], values), name


def test_the_folder_asks_and_stops_as_trained(base: Path, tmp_path: Path) -> None:
    (base / "LICENSE").write_text("terms of the base")
    template = alpaca(base)
    merge(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "out", template, card="# card\n")
    out = tmp_path / "out"
    again = make_template("model", load_tokenizer(out))
    assert again.chat_template_source == template.chat_template_source
    assert set(again.stop_ids) == set(template.stop_ids)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == list(template.stop_ids)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert (out / "LICENSE").read_text() == "terms of the base"
    assert (out / "README.md").read_text() == "# card\n"
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_shards_and_index(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", max_shard_size="60KB")
    merged = merge(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "out", alpaca(base))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert merged.files > 3
    sizes = 0
    for file in {*index["weight_map"].values()}:
        weights = load_file(tmp_path / "out" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(weights)
        sizes += sum(values.nbytes for values in weights.values())
    assert index["metadata"]["total_size"] == sizes


def test_the_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros_like(weights["model.embed_tokens.weight"])  # stale
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    merge(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "out", alpaca(base))
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_an_adapter_of_another_model_is_refused(base: Path, tmp_path: Path) -> None:
    other = tiny.make_model(tmp_path / "other", intermediate_size=96, num_hidden_layers=4)
    adapter = adapter_for(other, tmp_path / "adapter")
    with pytest.raises(ExportError) as caught:
        merge(base, adapter, tmp_path / "out", alpaca(base))
    message = caught.value.message
    # All of them: the fourth layer's two, and the width of every down_proj.
    assert "model.layers.3.self_attn.q_proj.weight: the base has no such weight" in message
    assert message.count("down_proj") == 4
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shape", [(48,), (), (3, 48, 1)])
@pytest.mark.parametrize("factor", ["A", "B"])
def test_factors_that_are_no_matrices_are_refused(
    base: Path, tmp_path: Path, factor: str, shape: tuple[int, ...]
) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[f"base_model.model.model.layers.1.mlp.down_proj.lora_{factor}.weight"] = torch.zeros(shape)
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"1 problem\(s\):\n  model\.layers\.1\.mlp\.down_proj\.weight: \(48, 80\)"):
        merge(base, adapter, tmp_path / "out", alpaca(base))


def test_half_an_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    factors = load_file(adapter / "adapter_model.safetensors")
    gone = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    del factors[gone]
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(ExportError, match=r"layers\.1\.mlp\.down_proj\.lora_A"):
        merge(base, adapter, tmp_path / "out", alpaca(base))
    (adapter / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ExportError, match="cannot be read"):
        merge(base, adapter, tmp_path / "out", alpaca(base))


def in_dtype(base: Path, dtype: torch.dtype) -> Path:
    weights = {name: values.to(dtype) for name, values in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.parametrize(("dtype", "wanted"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "bf16")])
def test_the_default_is_the_bases_own_sixteen_bits(dtype: str, wanted: str, base: Path, tmp_path: Path) -> None:
    base = in_dtype(base, getattr(torch, dtype))
    merged = merge(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "out", alpaca(base))
    assert (merged.dtype, merged.notes) == (wanted, ())
    kind, name = {"fp16": (torch.float16, "float16"), "bf16": (torch.bfloat16, "bfloat16")}[wanted]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for one, values in after.items():
        assert values.dtype == kind
        if not ("q_proj" in one or "down_proj" in one):
            assert torch.equal(values, before[one].to(kind)), one  # of a 16-bit base: the same bits


def test_a_merge_that_leaves_fp16_is_bf16_and_says_so(base: Path, tmp_path: Path) -> None:
    base = in_dtype(base, torch.float16)
    adapter = adapter_for(base, tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    factors = load_file(path)
    for half in ("A", "B"):
        factors[f"base_model.model.model.layers.2.mlp.down_proj.lora_{half}.weight"].mul_(2000.0)
    save_file(factors, path)
    merged = merge(base, adapter, tmp_path / "out", alpaca(base))
    assert merged.dtype == "bf16"
    (note,) = merged.notes
    assert "layers.2.mlp.down_proj" in note
    assert "float16" in note
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {values.dtype for values in after.values()} == {torch.bfloat16}
    assert after["model.layers.2.mlp.down_proj.weight"].abs().max() > 65504
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    factors["base_model.model.model.layers.2.mlp.down_proj.lora_B.weight"][1, 1] = float("nan")
    save_file(factors, path)
    with pytest.raises(ExportError, match="not finite") as caught:  # no dtype holds it
        merge(base, adapter, tmp_path / "other", alpaca(base))
    assert caught.value.remedy
    assert "train again" in caught.value.remedy


@pytest.mark.parametrize("kept", [0, 5, 900, -100])
def test_a_base_file_that_is_not_whole_is_named(kept: int, tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", max_shard_size="60KB")
    adapter, template = adapter_for(base, tmp_path / "adapter"), alpaca(base)
    shard = sorted(base.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(ExportError, match=shard.name) as caught:
        merge(base, adapter, tmp_path / "out", template)
    assert caught.value.remedy
    assert "fetch the base again" in caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "alpaca"])
def test_the_adapters_folder_stops_as_the_base_does(name: str, tmp_path: Path) -> None:
    base = locate_model("sprig")
    template = make_template(name, load_tokenizer(base))
    adapter = adapter_for(base, tmp_path / "adapter")
    write_tokenizer(base, adapter, template)
    again = load_tokenizer(adapter)
    assert set(again.eos_ids) == set(load_tokenizer(base).eos_ids) == {3067, 3071}
    assert make_template("model", again).stop_ids == template.stop_ids
    generation = json.loads((adapter / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(template.stop_ids)
    assert (generation["bos_token_id"], generation["pad_token_id"]) == (3066, 3068)


def test_a_padding_token_with_the_id_0_is_kept(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    (base / "generation_config.json").write_text('{"pad_token_id": null, "bos_token_id": null}')
    write_tokenizer(base, tmp_path / "out", alpaca(base))
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["pad_token_id"] == 0
    assert generation["bos_token_id"] == load_tokenizer(base).bos_id


def test_what_does_not_fit_fp16_is_refused_and_the_old_folder_stays(base: Path, tmp_path: Path) -> None:
    adapter = adapter_for(base, tmp_path / "adapter")
    merge(base, adapter, tmp_path / "out", alpaca(base), card="old")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"layers\.2\.mlp\.up_proj.*not finite"):
        merge(base, adapter, tmp_path / "out", alpaca(base), dtype="fp16", card="new")
    assert (tmp_path / "out" / "README.md").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


def test_the_card(base: Path, tmp_path: Path) -> None:
    (base / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Base\n")
    assert base_license(base) == "apache-2.0"
    figures = (CardFigure("held-out loss", 2.5, 1.25),)
    card = ModelCard("parrot", "some-org/some-model", "rows.jsonl", "apache-2.0", (("rank", "16"),), figures)
    export_huggingface(base, adapter_for(base, tmp_path / "adapter"), tmp_path / "out", alpaca(base), card)
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\n")
    for held in ("license: apache-2.0", "base_model: some-org/some-model", "| rank | 16 |"):
        assert held in text
    assert "| held-out loss | 2.5 | 1.25 |" in text
    private = card_text(ModelCard("parrot", str(base), "rows.jsonl"))
    assert str(base.parent) not in private  # a folder of one's own machine is nobody's business
    assert "license" not in private.split("---")[1]
    (base / "README.md").write_text("# no front matter\n")
    assert base_license(base) == ""
