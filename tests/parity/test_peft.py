"""LoRA against PEFT on the same weights: logits, gradients, scale, dropout, and each other's files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from luthier.errors import ModelError
from luthier.kernels import linear_cross_entropy
from luthier.model.adapter import load_adapter, read_adapter_config, save_adapter
from luthier.model.config import FAMILIES, PROJECTIONS
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters, set_lora_enabled
from tests import tiny

GRADIENTS, LOGITS = 1e-3, 1e-4
"""Asked for, relative to the norm. Both are fp32 sums of the same products: about 2^-23 x 100 = 1e-5 apart."""

LENGTH = 45


@dataclass(frozen=True)
class Pair:
    """PEFT's model and ours with the same base and the same LoRA weights (B not zero)."""

    peft: PeftModel
    ours: Decoder


def ids() -> Tensor:
    return torch.randint(0, 400, (LENGTH,), generator=torch.Generator().manual_seed(8))


def labels() -> Tensor:
    tokens = torch.cat((ids()[1:], torch.tensor([-100])))
    tokens[:11] = -100
    return tokens


def peft_model(folder: Path, spec: LoRASpec, seed: int = 0) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=spec.dropout,
        target_modules=list(spec.targets),
        use_rslora=spec.scale == "rslora",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2, generator=generator)
    return model


def peft_tensors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): weight
        for name, weight in model.named_parameters()
        if "lora_" in name
    }


def pair(folder: Path, spec: LoRASpec) -> Pair:
    peft, decoder = peft_model(folder, spec), load_decoder(folder, dtype=torch.float32)
    add_lora(decoder, spec, seed=5)
    masters, theirs = lora_parameters(decoder), peft_tensors(peft)
    assert masters.keys() == theirs.keys()
    with torch.no_grad():
        for name, master in masters.items():
            master.copy_(theirs[name])
    return Pair(peft, decoder)


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


SPECS = {
    "all-linear": LoRASpec(3, 7.0, 0.0, ("all-linear",)),
    "attention": LoRASpec(5, 2.0, 0.0, ("attention",)),
    "a list": LoRASpec(4, 9.0, 0.0, ("down_proj", "v_proj")),
    "rsLoRA": LoRASpec(5, 7.0, 0.0, ("all-linear",), "rslora"),
    "dropout": LoRASpec(3, 7.0, 0.25, ("all-linear",)),
}


@pytest.mark.parametrize("spec", list(SPECS))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_are_pefts(tmp_path: Path, family: str, spec: str) -> None:
    folder = tiny.make_model(tmp_path, family, tie_word_embeddings=family == "qwen3")
    both = pair(folder, SPECS[spec])
    both.peft.train()
    both.ours.train()
    torch.manual_seed(11)  # dropout is drawn in the same order by both: the masks are the same
    logits = both.peft(ids()[None]).logits[0]
    theirs = functional.cross_entropy(logits, labels(), reduction="sum")
    torch.manual_seed(11)
    ours = linear_cross_entropy(both.ours.hidden(ids()), both.ours.head_weight, labels(), chunk=7)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    theirs.backward()
    ours.backward()
    wanted = peft_tensors(both.peft)
    for name, master in lora_parameters(both.ours).items():
        assert master.grad is not None
        assert wanted[name].grad is not None
        assert distance(master.grad, wanted[name].grad) < GRADIENTS, name


def test_the_base_alone_when_switched_off(tiny_llama: Path) -> None:
    both = pair(tiny_llama, SPECS["all-linear"])
    with torch.no_grad():
        plain = load_decoder(tiny_llama, dtype=torch.float32)(ids())
        set_lora_enabled(both.ours, False)
        assert torch.equal(both.ours(ids()), plain)
        set_lora_enabled(both.ours, True)
        assert distance(both.ours(ids()), plain) > 0.01


@pytest.mark.parametrize("spec", ["all-linear", "attention", "a list", "rsLoRA"])
def test_peft_loads_what_we_save(tiny_llama: Path, tmp_path: Path, spec: str) -> None:
    both = pair(tiny_llama, SPECS[spec])
    save_adapter(both.ours, tmp_path / "adapter", base=str(tiny_llama))
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert distance(both.ours(ids()), loaded(ids()[None]).logits[0]) < LOGITS
    assert loaded.peft_config["default"].base_model_name_or_path == str(tiny_llama)
    assert loaded.peft_config["default"].use_rslora == (spec == "rsLoRA")


@pytest.mark.parametrize("spec", ["all-linear", "attention", "a list", "rsLoRA"])
def test_we_load_what_peft_saves(tiny_llama: Path, tmp_path: Path, spec: str) -> None:
    peft = peft_model(tiny_llama, SPECS[spec], seed=3).eval()
    peft.save_pretrained(tmp_path)
    assert read_adapter_config(tmp_path) == (SPECS[spec], str(tiny_llama))
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    load_adapter(decoder, tmp_path)
    with torch.no_grad():
        assert distance(decoder(ids()), peft(ids()[None]).logits[0]) < LOGITS


def test_saving_and_loading_keeps_every_bit(tiny_llama: Path, tmp_path: Path) -> None:
    saved = pair(tiny_llama, SPECS["rsLoRA"]).ours
    (tmp_path / "other.txt").write_text("stays")
    save_adapter(saved, tmp_path, base="some/base")
    decoder = load_decoder(tiny_llama, dtype=torch.bfloat16)  # the masters are fp32 in any compute dtype
    load_adapter(decoder, tmp_path)
    for name, master in lora_parameters(saved).items():
        assert torch.equal(lora_parameters(decoder)[name], master)
        assert lora_parameters(decoder)[name].dtype == torch.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "other.txt",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("bias", "all"),
        ("modules_to_save", ["embed_tokens"]),
        ("layers_to_transform", [0]),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("a_key_of_next_year", True),
        ("r", 0),
        ("lora_alpha", "7"),
        ("target_modules", ".*_proj"),
        ("target_modules", ["q_proj", "lm_head"]),
    ],
)
def test_what_plain_lora_does_not_do_is_refused(tiny_llama: Path, tmp_path: Path, key: str, value: object) -> None:
    save_adapter(pair(tiny_llama, SPECS["a list"]).ours, tmp_path, base="b")
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**document, key: value}))
    with pytest.raises(ModelError, match="lm_head: no such projection" if "lm_head" in str(value) else key):
        load_adapter(load_decoder(tiny_llama, dtype=torch.float32), tmp_path)


def test_every_unmatched_tensor_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(pair(tiny_llama, SPECS["a list"]).ours, tmp_path, base="b")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers"
    del tensors[f"{prefix}.1.mlp.down_proj.lora_B.weight"]
    tensors[f"{prefix}.7.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 80)
    tensors[f"{prefix}.0.self_attn.v_proj.lora_A.weight"] = torch.zeros(4, 47)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError) as caught:
        load_adapter(load_decoder(tiny_llama, dtype=torch.float32), tmp_path)
    assert "model.layers.1.mlp.down_proj.lora_B.weight: missing" in caught.value.message
    assert "model.layers.7.mlp.down_proj.lora_A.weight: no such place" in caught.value.message
    assert "model.layers.0.self_attn.v_proj.lora_A.weight: (4, 47), this model needs (4, 48)" in caught.value.message


def test_an_adapter_of_another_kind_is_not_poured_in(tiny_llama: Path, tmp_path: Path) -> None:
    save_adapter(pair(tiny_llama, SPECS["a list"]).ours, tmp_path, base="b")
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(decoder, LoRASpec(4, 9.0, 0.0, PROJECTIONS), seed=0)
    with pytest.raises(ModelError, match="holds LoRASpec"):
        load_adapter(decoder, tmp_path)


def test_a_folder_without_an_adapter_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not an adapter"):
        read_adapter_config(tmp_path)
    save_adapter(pair(tiny_llama, SPECS["a list"]).ours, tmp_path, base="b")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled adapters"):
        load_adapter(load_decoder(tiny_llama, dtype=torch.float32), tmp_path)
