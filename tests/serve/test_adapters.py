"""Several adapters over one base: one copy of its tensors, and each answers as if it were loaded alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from luthier.generate.generate import answer_all
from luthier.generate.request import Request
from luthier.model.adapter import load_adapter
from luthier.model.lora import lora_parameters
from luthier.model.shared import share
from luthier.serve.models import Served
from tests.serve.world import load, served, serving, write_adapter

PROMPTS = ("The quick brown", "A king had three daughters; the eldest", "def add(a, b):\n")


@pytest.fixture(scope="module")
def adapters(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(tiny_llama, folder / name, seed, 3 + seed) for seed, name in enumerate(("one", "two"))}


def over_one_base(folder: Path, adapters: dict[str, Path], quantize: str) -> list[Served]:
    base = load(folder, quantize)
    found = [served(folder, "base", base)]
    for name, path in adapters.items():
        decoder = share(base)
        load_adapter(decoder, path)
        found.append(served(folder, name, decoder, "base"))
    return found


def alone(folder: Path, adapter: Path | None, quantize: str) -> list[str]:
    """What the engine says where only this adapter has ever been loaded."""
    model = served(folder, decoder=load(folder, quantize))
    if adapter is not None:
        load_adapter(model.decoder, adapter)
    template = model.template
    requests = [
        Request(tuple(template.tokenizer.encode(text)), frozenset(template.stop_ids), (), 20) for text in PROMPTS
    ]
    return [answer.text for answer in answer_all(model.decoder, template.tokenizer, requests, slots=1)]


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_each_answers_as_if_it_were_alone_over_one_copy(
    tiny_llama: Path, adapters: dict[str, Path], quantize: str
) -> None:
    models = over_one_base(tiny_llama, adapters, quantize)
    base, *others = [
        {name: tensor.data_ptr() for name, tensor in model.decoder.named_parameters() if ".adapter." not in name}
        for model in models
    ]
    assert len(base) > 20
    assert others == [base, base]  # the very same memory
    if quantize == "nf4":
        scales = [
            {id(module.quant_state) for module in model.decoder.modules() if hasattr(module, "quant_state")}
            for model in models
        ]
        assert scales[0] == scales[1] == scales[2] != set()
    assert not lora_parameters(models[0].decoder)
    wanted = {"base": alone(tiny_llama, None, quantize)}
    wanted |= {name: alone(tiny_llama, path, quantize) for name, path in adapters.items()}
    assert len(set(map(tuple, wanted.values()))) == 3
    with serving(models) as running:
        client = running.client()
        listed = {model.id: getattr(model, "parent", None) for model in client.models.list()}
        assert listed == {"base": None, "one": "base", "two": "base"}
        streams = [
            (name, at, client.completions.create(model=name, prompt=text, max_tokens=20, temperature=0, stream=True))
            for at, text in enumerate(PROMPTS)
            for name in wanted
        ]
        for name, at, stream in streams:
            assert "".join(chunk.choices[0].text for chunk in stream) == wanted[name][at]


def test_a_base_is_shared_before_it_has_an_adapter(tiny_llama: Path, adapters: dict[str, Path]) -> None:
    decoder = load(tiny_llama)
    load_adapter(decoder, adapters["one"])
    with pytest.raises(ValueError, match="share the base before"):
        share(decoder)
