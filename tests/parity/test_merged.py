"""The merged folder in transformers, against the base with the adapter in PEFT and in our decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.export.merge import merge
from luthier.generate.generate import complete
from luthier.model.adapter import save_adapter
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny

IDS = torch.randint(6, 400, (53,), generator=torch.Generator().manual_seed(3))
CASES: dict[str, tuple[str, dict[str, object], LoRASpec]] = {
    "llama, sharded": ("llama", {"max_shard_size": "60KB"}, LoRASpec(5, 13.0)),
    "llama, tied, rsLoRA": ("llama", {"tie_word_embeddings": True}, LoRASpec(3, 7.0, scale="rslora")),
    "qwen2, biases, attention only": ("qwen2", {"vocab_size": 407}, LoRASpec(4, 6.0, targets=("attention",))),
    "qwen3, two projections": ("qwen3", {}, LoRASpec(2, 5.0, targets=("down_proj", "q_proj"))),
    "mistral, tied, sharded": ("mistral", {"tie_word_embeddings": True, "max_shard_size": "60KB"}, LoRASpec(6, 9.0)),
}


def adapted(base: Path, adapter: Path, spec: LoRASpec) -> Decoder:
    """The base in fp32 with a LoRA that changes it much (B is not zero), saved to `adapter`."""
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, spec, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora_parameters(decoder).items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    save_adapter(decoder, adapter, base=str(base))
    return decoder


def template_of(base: Path) -> Template:
    return make_template("model", load_tokenizer(base))


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        found: torch.Tensor = model(IDS[None]).logits[0].float()
    return found


@pytest.mark.parametrize("case", CASES)
def test_merged_gives_the_adapters_logits(case: str, tmp_path: Path) -> None:
    family, settings, spec = CASES[case]
    base = tiny.make_model(tmp_path / "base", family, **settings)
    decoder = adapted(base, tmp_path / "adapter", spec)
    with torch.no_grad():
        ours = decoder(IDS)
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
        theirs = peft(IDS[None]).logits[0]
    merged = merge(base, tmp_path / "adapter", tmp_path / "merged", template_of(base), dtype="fp32")
    found = logits(tmp_path / "merged")
    scale = ours.abs().max()
    # W + sBA in one rounding instead of two products: 2^-24 a product, some 30 of them, sums of 100 terms: below 1e-5.
    assert (found - ours).abs().max() < 1e-5 * scale
    assert (found - theirs).abs().max() < 1e-5 * scale
    assert (logits(base) - ours).abs().max() > 0.05 * scale  # the adapter does something
    assert merged.merged == sum("lora_A" in name for name in lora_parameters(decoder))
    weights = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert weights == sorted(path.name for path in base.glob("*.safetensors"))
    assert (len(weights) > 3) == ("sharded" in case)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_round_each_weight_once(dtype: str, tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", tie_word_embeddings=True)
    adapted(base, tmp_path / "adapter", LoRASpec(5, 13.0, targets=("v_proj", "up_proj")))
    template = template_of(base)
    merge(base, tmp_path / "adapter", tmp_path / "full", template, dtype="fp32")
    merge(base, tmp_path / "adapter", tmp_path / "half", template, dtype="bf16" if dtype == "bf16" else "fp16")
    full, half = load_file(tmp_path / "full" / "model.safetensors"), load_file(tmp_path / "half" / "model.safetensors")
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float16
    assert full.keys() == half.keys()
    for name, values in full.items():
        assert torch.equal(half[name], values.to(wanted)), name
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert config["dtype"] == ("bfloat16" if dtype == "bf16" else "float16")
    # Half an ulp a weight, 2^-9 for bf16, over some 25 matrices of random signs: well below a tenth of the logits.
    near = logits(tmp_path / "half"), logits(tmp_path / "full")
    assert (near[0] - near[1]).abs().max() < 0.1 * near[1].abs().max()


def test_generate_in_transformers_stops_and_asks_in_the_trained_form(tmp_path: Path) -> None:
    """sprig merged with a small adapter: transformers' own chat template and generate give our answers."""
    from luthier.model.locate import locate_model

    base = locate_model("sprig")
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, LoRASpec(4, 10.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora_parameters(decoder).items():
            if "lora_B" in name:
                parameter.normal_(std=0.003, generator=generator)
    save_adapter(decoder, tmp_path / "adapter", base="sprig")
    template = make_template("alpaca", load_tokenizer(base))  # not the template the base came with
    merge(base, tmp_path / "adapter", tmp_path / "merged", template, dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert set(template.stop_ids) <= set(model.generation_config.eos_token_id)
    ended = 0
    for question in ("What colour is the sky?", "What sound does a dog make?", "How many legs does a bear have?"):
        ids = template.prompt_ids([Turn("user", question)])
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        assert inputs["input_ids"][0].tolist() == ids
        theirs = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, len(ids) :].tolist()
        ours = complete(decoder, template.tokenizer, ids, stop_ids=template.stop_ids, max_new_tokens=60)
        assert theirs[: len(ours.ids)] == list(ours.ids)
        assert (theirs[-1] in template.stop_ids) == ours.ended
        ended += ours.ended
    assert ended > 0
