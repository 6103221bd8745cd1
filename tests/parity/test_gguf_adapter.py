"""The adapter's GGUF file on the base's, in llama.cpp itself: what the merged model says."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.data.render import make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf import write_gguf
from luthier.export.gguf_adapter import write_gguf_adapter
from luthier.export.merge import merge
from luthier.model.adapter import save_adapter
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny

if importlib.util.find_spec("llama_cpp") is None:
    WHY = "llama-cpp-python is not installed (extra [llama-cpp]; it needs a C++ compiler): its tests do not run"
    if os.environ.get("CI", "").lower() == "true":
        raise RuntimeError(f"{WHY}, and in CI they must")
    pytest.skip(WHY, allow_module_level=True)

import llama_cpp

pytestmark = pytest.mark.llama_cpp

# More rows than tokens: qwen2's own tokenizer class adds one.
SIZES = {"vocab_size": 407, "hidden_size": 96, "intermediate_size": 160, "initializer_range": 0.15}


def adapter_for(base: Path, folder: Path, spec: LoRASpec) -> Path:
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, spec, seed=0)
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(decoder, folder, base="somewhere")
    return folder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_base_and_adapter_are_the_merged_model(family: str, tmp_path: Path) -> None:
    more: dict[str, object] = {"sliding_window": None} if family == "mistral" else {}
    base = tiny.make_model(tmp_path / "base", family, **{**SIZES, **more})
    scale = "rslora" if family == "mistral" else "standard"
    adapter = adapter_for(base, tmp_path / "adapter", LoRASpec(3, 7.0, targets=("all-linear",), scale=scale))  # type: ignore[arg-type]
    template = make_template("model", load_tokenizer(base))
    merge(base, adapter, tmp_path / "merged", template, dtype="fp32")
    write_gguf(base, tmp_path / "base.gguf", template=template)
    assert write_gguf_adapter(base, adapter, tmp_path / "adapter.gguf") == 2 * 7 * 3
    ids = torch.randint(6, 400, (120,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        wanted = reference(torch.tensor([ids])).logits[0].numpy()
    found = {}
    for name, lora in (("with", str(tmp_path / "adapter.gguf")), ("without", None)):
        model = llama_cpp.Llama(
            str(tmp_path / "base.gguf"), lora_path=lora, n_ctx=256, n_threads=1, logits_all=True, verbose=False
        )
        model.eval(ids)
        found[name] = np.array(model.scores[: len(ids), : wanted.shape[1]])
        model.close()
    # The base's weights are fp16: the bound of test_llama_cpp.
    assert np.abs(found["with"] - wanted).max() / wanted.std() < 0.1
    assert (found["with"].argmax(1) == wanted.argmax(1)).mean() >= 0.97
    assert (found["without"].argmax(1) == wanted.argmax(1)).mean() < 0.9


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny.make_model(tmp_path / "base", **SIZES)
    other = tiny.make_model(tmp_path / "other", **{**SIZES, "num_hidden_layers": 4})
    adapter = adapter_for(other, tmp_path / "adapter", LoRASpec(2, 4.0, targets=("v_proj",)))
    with pytest.raises(ExportError, match=r"model\.layers\.3\.self_attn\.v_proj\.weight: the base has no"):
        write_gguf_adapter(base, adapter, tmp_path / "adapter.gguf")
    assert not (tmp_path / "adapter.gguf").exists()
