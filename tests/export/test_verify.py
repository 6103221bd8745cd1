"""An export that is the model passes, and one that is not fails with what differs first: in the real runtimes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf import write_gguf
from luthier.export.merge import merge
from luthier.export.runtime_llama_cpp import gguf_files
from luthier.export.runtimes import RUNTIMES
from luthier.export.verify import THRESHOLDS, Asked, Reference, Row, Verified, missing, refer, verify_model
from luthier.model.adapter import save_adapter
from luthier.model.load import load_decoder
from luthier.model.locate import locate_model
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny

QUESTIONS = ("What colour is the sky?", "Tell me a story about a dog.", "How many legs does a cat have?")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama, sharded": ("llama", {"max_shard_size": "60KB"}),
    "llama, tied, llama3 rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral, tied": ("mistral", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3, more rows than tokens": ("qwen3", {"vocab_size": 407}),
}
llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (extra [llama-cpp])"
)


def asked_of(template: Template) -> Asked:
    rows = []
    for question in QUESTIONS:
        prompt = template.prompt_ids([Turn("user", question)])
        answer = template.tokenizer.encode(" The answer is that nobody knows it, dear.")
        rows.append(Row((*prompt, *answer, template.end_of_turn), len(prompt)))
    return Asked(tuple(rows), QUESTIONS, "a test")


def held_out(template: Template) -> Asked:
    """Rows that sprig was not trained on."""
    path = locate_model("sprig").parent / "data" / "pirate" / "test.jsonl"
    pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:40]]
    rows = []
    for pair in pairs:
        prompt = template.prompt_ids([Turn("user", pair["question"])])
        rows.append(Row((*prompt, *template.tokenizer.encode(pair["answer"]), template.end_of_turn), len(prompt)))
    return Asked(tuple(rows), QUESTIONS, "a test")


def adapted(
    base: Path, adapter: Path, ask: Callable[[Template], Asked] = asked_of
) -> tuple[Reference, Asked, Template]:
    """Base and adapter as the reference; the adapter is saved."""
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, LoRASpec(4, 10.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora_parameters(decoder).items():
            if "lora_B" in name:
                parameter.normal_(std=0.003, generator=generator)
    save_adapter(decoder, adapter, base=str(base))
    template = make_template("model", load_tokenizer(base))
    asked = ask(template)
    return refer(decoder, template, asked, "base and adapter"), asked, template


@pytest.mark.parametrize("case", CASES)
def test_transformers_says_what_the_adapter_says(case: str, tmp_path: Path) -> None:
    family, settings = CASES[case]
    base = tiny.make_model(tmp_path / "base", family, **settings)  # type: ignore[arg-type]
    reference, asked, template = adapted(base, tmp_path / "adapter")
    merge(base, tmp_path / "adapter", tmp_path / "hf", template, dtype="fp32")
    found = verify_model(RUNTIMES["hf"], tmp_path / "hf", asked, reference)
    assert found.passed, found.failures
    assert (found.weights, found.threshold) == ("F32", 0.995)
    assert found.tokens == sum(len(row.ids) for row in asked.rows)
    assert found.argmax_agreement == 1.0
    assert found.continuations_identical == found.continuations == 3
    assert abs(float(found.loss_increase or 0.0)) < 1e-4
    assert "transformers 5" in found.runtime or "transformers 4" in found.runtime


@pytest.fixture(scope="module")
def sprig(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference, Asked]:
    """sprig with a small adapter, merged in its own bf16; what base and adapter say."""
    folder = tmp_path_factory.mktemp("sprig")
    base = locate_model("sprig")
    reference, asked, template = adapted(base, folder / "adapter", held_out)
    merge(base, folder / "adapter", folder / "hf", template)
    return folder / "hf", reference, asked


def broken(sprig: tuple[Path, Reference, Asked], to: Path) -> Path:
    shutil.copytree(sprig[0], to)
    return to


def verified(folder: Path, sprig: tuple[Path, Reference, Asked]) -> Verified:
    return verify_model(RUNTIMES["hf"], folder, sprig[2], sprig[1])


def test_a_merged_sprig_passes(sprig: tuple[Path, Reference, Asked]) -> None:
    found = verified(sprig[0], sprig)
    assert found.passed, found.failures
    assert (found.weights, found.tokens_identical) == ("BF16", True)


def test_other_weights_fail(sprig: tuple[Path, Reference, Asked], tmp_path: Path) -> None:
    """A factor of 1.5 on one matrix: it loads, it speaks, and it is not the model."""
    folder = broken(sprig, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"] *= 1.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = verified(folder, sprig)
    assert found.passed is False
    assert found.tokens_identical
    assert found.argmax_agreement is not None
    assert found.argmax_agreement < THRESHOLDS["BF16"]
    assert found.argmax_agreement_decided is not None
    assert found.argmax_agreement <= found.argmax_agreement_decided < THRESHOLDS["BF16"]
    assert any("the likeliest next token is the same, or a near-tie, at" in failure for failure in found.failures)
    assert found.first_difference is not None
    assert found.first_difference.what in ("the next token", "the continuation")
    assert found.first_difference.expected != found.first_difference.found


def test_another_chat_template_fails(sprig: tuple[Path, Reference, Asked], tmp_path: Path) -> None:
    folder = broken(sprig, tmp_path / "hf")
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant", "helper"))
    found = verified(folder, sprig)
    assert (found.passed, found.tokens_identical) == (False, False)
    assert found.first_difference is not None
    assert found.first_difference.what == "token ids of the chat template's prompt"
    assert "assistant" in found.first_difference.expected
    assert found.argmax_agreement is not None
    assert found.argmax_agreement >= THRESHOLDS["BF16"]  # the weights are right, and it says so


def test_a_model_that_never_stops_fails(sprig: tuple[Path, Reference, Asked], tmp_path: Path) -> None:
    folder = broken(sprig, tmp_path / "hf")
    for name in ("generation_config.json", "config.json"):
        document = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(document | {"eos_token_id": 3067}))
    found = verified(folder, sprig)
    assert found.passed is False
    assert "a stop token" in found.failures[0]
    assert "<|eot_id|>" in found.failures[0]


def test_a_tokenizer_that_lost_its_merges_fails(sprig: tuple[Path, Reference, Asked], tmp_path: Path) -> None:
    folder = broken(sprig, tmp_path / "hf")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][:500]
    document["model"]["ignore_merges"] = False
    (folder / "tokenizer.json").write_text(json.dumps(document))
    found = verified(folder, sprig)
    assert (found.passed, found.tokens_identical) == (False, False)
    assert found.first_difference is not None
    assert (found.first_difference.what, found.first_difference.row) == ("token ids", 0)


def test_a_runtime_that_is_not_installed_is_said_with_its_command() -> None:
    kind = replace(RUNTIMES["gguf"], module="no_such_module")
    found = missing(kind)
    assert found is not None
    assert (found.passed, found.install) == (None, "pip install 'luthier[llama-cpp]'")
    assert "llama-cpp-python is not installed" in found.reason
    assert missing(RUNTIMES["hf"]) is None


def test_of_a_file_in_parts_the_first_is_opened(tmp_path: Path) -> None:
    for name in ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf", "verify.json"):
        (tmp_path / name).touch()
    assert [path.name for path in gguf_files(tmp_path)] == ["a-00001-of-00002.gguf", "b.gguf"]


@llama_cpp
@pytest.mark.llama_cpp
@pytest.mark.parametrize(("quantize", "weights"), [("f16", "F16"), ("q8_0", "Q8_0")])
def test_llama_cpp_says_what_is_merged(
    sprig: tuple[Path, Reference, Asked], tmp_path: Path, quantize: str, weights: str
) -> None:
    merged, reference, asked = sprig
    path = tmp_path / "model.gguf"
    write_gguf(merged, path, quantize)  # type: ignore[arg-type]
    against = refer(load_decoder(merged, dtype=torch.float32), reference.template, asked, "the merged model")
    found = verify_model(RUNTIMES["gguf"], path, asked, against)
    assert found.passed, found.failures
    assert (found.weights, found.threshold, found.tokens_identical) == (weights, THRESHOLDS[weights], True)
    assert found.loss is not None
    assert found.loss_reference is not None
    assert abs(found.loss - found.loss_reference) < 0.05


@llama_cpp
@pytest.mark.llama_cpp
def test_llama_cpp_finds_rows_in_the_wrong_order(sprig: tuple[Path, Reference, Asked], tmp_path: Path) -> None:
    """q's rows as transformers has them, read as llama.cpp does: the classic broken conversion."""
    merged, reference, asked = sprig
    folder = broken(sprig, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "q_proj" in name:
            values = weights[name]
            weights[name] = values.view(-1, 2, 2, values.shape[1]).transpose(1, 2).reshape(values.shape).contiguous()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_gguf(folder, tmp_path / "model.gguf")
    against = refer(load_decoder(merged, dtype=torch.float32), reference.template, asked, "the merged model")
    found = verify_model(RUNTIMES["gguf"], tmp_path / "model.gguf", asked, against)
    assert found.passed is False
    assert found.tokens_identical
    assert found.first_difference is not None
    assert found.first_difference.row is not None


@llama_cpp
@pytest.mark.llama_cpp
def test_a_file_that_llama_cpp_cannot_load_is_an_error(sprig: tuple[Path, Reference, Asked], tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ExportError, match="cannot load"):
        verify_model(RUNTIMES["gguf"], tmp_path / "model.gguf", sprig[2], sprig[1])


@pytest.mark.llama_cpp
def test_a_template_that_writes_the_day_is_the_same_on_any_day(tmp_path: Path) -> None:
    """It was trained with one day, and every runtime writes today's: the two templates are the same all the same."""
    pytest.importorskip("llama_cpp")
    base = tiny.make_model(tmp_path / "base", initializer_range=0.15)
    source = "{{ bos_token }}Today: {{ strftime_now('%d %b %Y') }}\n" + tiny.CHAT_TEMPLATE.replace(
        "{{ bos_token }}", ""
    )
    (base / "chat_template.jinja").write_text(source)
    reference, asked, template = adapted(base, tmp_path / "adapter")
    assert "26 Jul 2024" in template.render([Turn("user", "Hi")])
    merge(base, tmp_path / "adapter", tmp_path / "hf", template, dtype="fp32")
    write_gguf(tmp_path / "hf", tmp_path / "model.gguf", "f32")
    for kind, path in (("hf", tmp_path / "hf"), ("gguf", tmp_path / "model.gguf")):
        found = verify_model(RUNTIMES[kind], path, asked, reference)
        assert found.tokens_identical, found.failures
