"""mlx-lm itself with what is exported for it: the same ids, the same next token, and its own quantiser's bytes."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import luthier
from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import ExportError
from luthier.export.affine import Bits, affine_quantized
from luthier.export.merge import merge
from luthier.export.mlx import write_mlx
from luthier.export.mlx_adapter import write_mlx_adapter
from luthier.generate.generate import complete
from luthier.model.adapter import save_adapter
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from tests import tiny
from tests.export.texts import ADDED_TEXTS, mixed, with_added_tokens, with_llama_3s_vocabulary

if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx_lm") is None:
    WHY = "mlx and mlx-lm are not installed (extra [mlx]): the tests of exports in mlx-lm itself do not run"
    if os.environ.get("CI", "").lower() == "true":
        raise RuntimeError(f"{WHY}, and in CI they must")
    pytest.skip(WHY, allow_module_level=True)

import mlx.core as mx
import mlx_lm

pytestmark = pytest.mark.mlx

SPRIG = Path(luthier.__file__).parent / "assets" / "sprig"
MX_DTYPES = {torch.float32: mx.float32, torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}

ROPE = {"rope_theta": 500000.0}  # not mlx-lm's default, so that a theta that is not read shows
YARN = ROPE | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DEFAULT = ROPE | {"rope_type": "default"}
LINEAR = ROPE | {"rope_type": "linear", "factor": 2.5}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"rope_parameters": DEFAULT}),
    "llama, biases, linear rope": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR},
    ),
    "llama, tied, llama3 rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None, "rope_parameters": DEFAULT}),
    "mistral, tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True, "rope_parameters": DEFAULT}),
    "qwen2": ("qwen2", {"rope_parameters": DEFAULT}),
    "qwen2, tied, yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("qwen3", {"rope_parameters": DEFAULT}),
    "qwen3, tied, yarn with a factor": (
        "qwen3",
        {"tie_word_embeddings": True, "rope_parameters": YARN | {"attention_factor": 1.3}},
    ),
    "qwen3, llama3 rope": ("qwen3", {"rope_parameters": LLAMA3}),
}
VOCAB = 407


def make(folder: Path, case: str, dtype: torch.dtype = torch.float32, **more: object) -> Path:
    """A random model whose last matrices have rows of 128 and 192, so that they can be quantised."""
    family, settings = CASES[case]
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "initializer_range": 0.15}
    if family != "qwen2":
        sizes["head_dim"] = 48  # and not hidden / heads
    tiny.make_model(folder, family, **{**sizes, "vocab_size": VOCAB, **settings, **more})
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 8
    save_file({name: one.to(dtype) for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def template_of(folder: Path) -> Template:
    return make_template("model", load_tokenizer(folder))


def rows(count: int = 6, length: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, 400, (length + k,), generator=generator).tolist() for k in range(count)]


def logits_of(model: object, ids: list[int]) -> NDArray[np.float32]:
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))  # type: ignore[operator]


def reference_logits(folder: Path, texts: list[list[int]], dtype: torch.dtype) -> list[NDArray[np.float32]]:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        return [reference(torch.tensor([ids])).logits[0].float().numpy() for ids in texts]


def agreement(wanted: list[NDArray[np.float32]], found: list[NDArray[np.float32]]) -> float:
    same = [one.argmax(1) == other.argmax(1) for one, other in zip(wanted, found, strict=True)]
    return float(np.concatenate(same).mean())


# --- the quantiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", MX_DTYPES)
def test_the_quantiser_is_mlx_own_bit_for_bit(dtype: torch.dtype, bits: Bits) -> None:
    generator = torch.Generator().manual_seed(bits)
    for size in (0.0, 1e-8, 1e-5, 0.02, 1.0, 300.0):
        w = torch.randn(65, 320, generator=generator) * size
        w[1], w[2], w[3], w[4], w[5] = 0.0, 0.5, -0.25, w[4].abs(), -w[5].abs()
        w[6, :64], w[7, 3] = torch.arange(64) - 32.0, 200.0
        w = w.to(dtype)
        made = affine_quantized(w, bits)
        ours = [made.packed.view(torch.int32).numpy().view(np.uint32), made.scales.float(), made.biases.float()]
        theirs = mx.quantize(mx.array(w.float().numpy()).astype(MX_DTYPES[dtype]), group_size=64, bits=bits)
        for mine, other in zip(ours, theirs, strict=True):
            kind = mx.uint32 if other.dtype == mx.uint32 else mx.float32
            assert np.array_equal(np.asarray(mine), np.array(other.astype(kind))), size


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["llama, tied, llama3 rope", "qwen2"])
def test_a_quantised_folder_is_what_mlx_lm_converts_to(case: str, bits: Bits, tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", case, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    made = write_mlx(folder, tmp_path / "ours", template_of(folder), bits)
    mlx_lm.convert(str(folder), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=64, dtype="bfloat16")
    ours, theirs = (load_file(tmp_path / which / "model.safetensors") for which in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert made.tensors == len(ours)
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name
    asked = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["quantization"] == asked


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_random_models_agree(case: str, tmp_path: Path) -> None:
    """In fp32 to rounding; in bf16 and fp16 the next token agrees as far as the rounding of activations lets it."""
    folder = make(tmp_path / "hf", case)
    texts = rows()
    wanted = reference_logits(folder, texts, torch.float32)
    write_mlx(folder, tmp_path / "f32", template_of(folder))
    model, tokenizer = mlx_lm.load(str(tmp_path / "f32"))
    found = [logits_of(model, ids) for ids in texts]
    spread = np.std(np.concatenate(wanted))
    worst = max(float(np.abs(one - other).max()) for one, other in zip(wanted, found, strict=True))
    assert worst / spread < 1e-4
    assert agreement(wanted, found) >= 0.995
    assert set(template_of(folder).stop_ids) <= tokenizer.eos_token_ids


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_models_compute_what_was_written(bits: Bits, tmp_path: Path) -> None:
    """mlx-lm on the quantised folder against transformers on the same numbers, dequantised by mlx."""
    folder = make(tmp_path / "hf", "llama, tied, llama3 rope")
    made = write_mlx(folder, tmp_path / "mlx", template_of(folder), bits)
    assert made.bits == bits
    assert made.kept == ()
    stored = {name: mx.array(one) for name, one in mx.load(str(tmp_path / "mlx" / "model.safetensors")).items()}
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        stem = name.removesuffix(".weight")
        if f"{stem}.scales" in stored:
            parts = (stored[name], stored[f"{stem}.scales"], stored[f"{stem}.biases"])
            weights[name] = torch.from_numpy(np.array(mx.dequantize(*parts, group_size=64, bits=bits)))
    rounded = shutil.copytree(folder, tmp_path / "rounded")
    save_file(weights, rounded / "model.safetensors", {"format": "pt"})
    texts = rows(3)
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    found = [logits_of(model, ids) for ids in texts]
    wanted = reference_logits(rounded, texts, torch.float32)
    assert agreement(wanted, found) >= 0.995
    # And 8 bits are near the model itself: a group's 255 steps leave 0.2 % of its range.
    if bits == 8:
        assert agreement(reference_logits(folder, texts, torch.float32), found) >= 0.9


def test_rows_that_are_no_multiple_of_a_group_stay(tmp_path: Path) -> None:
    folder = make(tmp_path / "hf", "llama", intermediate_size=160)
    made = write_mlx(folder, tmp_path / "mlx", template_of(folder), 4)
    assert set(made.kept) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)}
    assert "3 matrices" in made.notes[-1]
    model, _ = mlx_lm.load(str(tmp_path / "mlx"))
    assert np.isfinite(logits_of(model, rows(1)[0])).all()


def test_shards(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf", hidden_size=128, num_attention_heads=8, max_shard_size="200KB")
    texts = rows(2)
    wanted = reference_logits(folder, texts, torch.float32)
    for bits in (None, 8):
        out = tmp_path / f"mlx-{bits}"
        made = write_mlx(folder, out, template_of(folder), bits)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
        assert index["metadata"]["total_size"] == made.size
        model, _ = mlx_lm.load(str(out))
        found = [logits_of(model, ids) for ids in texts]
        assert agreement(wanted, found) >= (0.995 if bits is None else 0.8)


# --- sprig ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sprig(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mlx") / "sprig"
    write_mlx(SPRIG, out, template_of(SPRIG))
    return out


def test_sprig_reads_texts_as_we_do(sprig: Path) -> None:
    ours, (_, theirs) = load_tokenizer(SPRIG), mlx_lm.load(str(sprig))
    assert other_ids(ours, theirs, mixed(500)) == []
    turns = [Turn("user", "Why is the sea salt?"), Turn("assistant", "It is."), Turn("user", "Go on.")]
    asked = [{"role": turn.role, "content": turn.content} for turn in turns]
    assert theirs.apply_chat_template(asked, add_generation_prompt=True) == template_of(SPRIG).prompt_ids(turns)


def other_ids(ours: ChatTokenizer, theirs: object, texts: Sequence[str]) -> list[str]:
    """The texts that mlx-lm's tokenizer reads otherwise."""
    encode = theirs.encode  # type: ignore[attr-defined]
    return [text for text in texts if encode(text, add_special_tokens=False) != ours.encode(text)]


@pytest.mark.shared
def test_llama_3s_vocabulary(shared: Path, tmp_path: Path) -> None:
    folder = with_llama_3s_vocabulary(shared, tmp_path / "hf")
    ours = load_tokenizer(folder)
    write_mlx(folder, tmp_path / "mlx", make_template("llama3", ours))
    _, theirs = mlx_lm.load(str(tmp_path / "mlx"))
    assert other_ids(ours, theirs, mixed(500)) == []


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens(tied: bool, tmp_path: Path) -> None:
    folder = with_added_tokens(tmp_path / "hf", tied)
    tokenizer = load_tokenizer(folder)
    write_mlx(folder, tmp_path / "mlx", template_of(folder))
    model, theirs = mlx_lm.load(str(tmp_path / "mlx"))
    assert other_ids(tokenizer, theirs, [text for text in ADDED_TEXTS if "<|" not in text]) == []
    ids = tokenizer.encode("<|call|>do<item>gizmo", special=True)
    assert {400, 401, 402} <= set(ids)
    assert theirs.encode("<|call|>do<item>gizmo", add_special_tokens=False) == ids
    model.set_dtype(mx.float32)
    (wanted,) = reference_logits(folder, [ids], torch.float32)
    assert np.abs(logits_of(model, ids) - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_sprig_predicts_the_same(sprig: Path, tmp_path: Path) -> None:
    """Teacher-forced on held-out stories, against transformers in fp32: the next token at every place.

    Activations in bf16 flip near-ties of a model this small whoever computes them: transformers in bf16 agrees with
    itself in fp32 at 0.990 of the places, mlx at 0.987. So the weights, which are the export's, are held against it by
    activations in fp16 and fp32.
    """
    tokenizer = load_tokenizer(SPRIG)
    data = SPRIG.parent / "data" / "tales" / "eval.jsonl"
    ids = [tokenizer.encode(json.loads(line)["content"])[:150] for line in data.read_text().splitlines()[:8]]
    assert sum(map(len, ids)) > 1000
    wanted = reference_logits(SPRIG, ids, torch.float32)
    model, _ = mlx_lm.load(str(sprig))
    assert agreement(wanted, [logits_of(model, one) for one in ids]) >= 0.975
    for dtype in (mx.float16, mx.float32):
        model.set_dtype(dtype)
        assert agreement(wanted, [logits_of(model, one) for one in ids]) >= 0.995
    for bits, share in (8, 0.97), (4, 0.70):
        write_mlx(SPRIG, tmp_path / f"mlx-{bits}", template_of(SPRIG), bits)
        model, _ = mlx_lm.load(str(tmp_path / f"mlx-{bits}"))
        model.set_dtype(mx.float32)  # mlx's quantised products on a CPU take many times as long in bf16
        assert agreement(wanted[:2], [logits_of(model, one) for one in ids[:2]]) >= share


def test_sprig_answers_the_same(sprig: Path) -> None:
    turns = [Turn("user", "Where is the king?")]
    template = template_of(SPRIG)
    model, tokenizer = mlx_lm.load(str(sprig))
    model.set_dtype(mx.float32)
    asked = [{"role": "user", "content": turns[0].content}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=40)
    decoder = load_decoder(SPRIG, dtype=torch.float32)
    ours = complete(
        decoder, template.tokenizer, template.prompt_ids(turns), stop_ids=template.stop_ids, max_new_tokens=40
    )
    assert text.strip() == ours.text.strip()


# --- adapters ---------------------------------------------------------------------------------------------------------


def adapter_for(base: Path, folder: Path, targets: tuple[str, ...], scale: str = "standard") -> Path:
    decoder = load_decoder(base, dtype=torch.float32)
    add_lora(decoder, LoRASpec(3, 7.0, targets=targets, scale=scale), seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in lora_parameters(decoder).values():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    save_adapter(decoder, folder, base="somewhere")
    return folder


@pytest.mark.parametrize("case", ["llama, tied, llama3 rope", "mistral", "qwen2", "qwen3, tied, yarn with a factor"])
def test_an_adapter_is_the_merged_model(case: str, tmp_path: Path) -> None:
    base = make(tmp_path / "base", case)
    targets = ("all-linear",) if case == "qwen2" else ("q_proj", "o_proj", "down_proj")
    adapter = adapter_for(base, tmp_path / "adapter", targets, "rslora" if case == "mistral" else "standard")
    template = template_of(base)
    merge(base, adapter, tmp_path / "merged", template, dtype="fp32")
    made = write_mlx_adapter(base, adapter, tmp_path / "mlx", template)
    assert made.base == tmp_path / "mlx" / "base"  # theta lies where mlx-lm does not look
    assert any("rope_theta" in note for note in made.notes)
    texts = rows(3)
    wanted = reference_logits(tmp_path / "merged", texts, torch.float32)
    model, _ = mlx_lm.load(str(made.base), adapter_path=str(made.folder))
    found = [logits_of(model, ids) for ids in texts]
    assert max(float(np.abs(one - other).max()) for one, other in zip(wanted, found, strict=True)) < 1e-3
    plain, _ = mlx_lm.load(str(made.base))
    assert agreement(wanted, [logits_of(plain, ids) for ids in texts]) < 0.9  # it is the adapter that does it


def test_a_base_that_mlx_lm_reads_right_is_used_as_it_is(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama")
    config = json.loads((base / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"]}  # as transformers 4 wrote it
    (base / "config.json").write_text(json.dumps(config))
    adapter, template = adapter_for(base, tmp_path / "adapter", ("v_proj",)), template_of(base)
    made = write_mlx_adapter(base, adapter, tmp_path / "mlx", template)
    assert (made.base, made.notes) == (base, ())
    assert sorted(path.name for path in made.folder.iterdir()) == ["adapter_config.json", "adapters.safetensors"]
    merge(base, adapter, tmp_path / "merged", template, dtype="fp32")
    model, _ = mlx_lm.load(str(base), adapter_path=str(made.folder))
    texts = rows(2)
    assert (
        agreement(reference_logits(tmp_path / "merged", texts, torch.float32), [logits_of(model, i) for i in texts])
        == 1
    )
    # A template of another name, which mlx-lm would not find in the base's folder: a base goes along.
    other = make_template("alpaca", load_tokenizer(base))
    made = write_mlx_adapter(base, adapter, tmp_path / "alpaca", other)
    assert any("chat template" in note for note in made.notes)
    _, tokenizer = mlx_lm.load(str(made.base), adapter_path=str(made.folder))
    asked = [{"role": "user", "content": "Why?"}]
    wanted = other.render([Turn("user", "Why?")], generation_prompt=True)
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False) == wanted


def test_an_adapter_on_a_quantised_base(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "qwen3")
    adapter, template = adapter_for(base, tmp_path / "adapter", ("all-linear",)), template_of(base)
    made = write_mlx_adapter(base, adapter, tmp_path / "mlx", template, 8)
    assert json.loads((made.base / "config.json").read_text())["quantization"]["bits"] == 8
    model, _ = mlx_lm.load(str(made.base), adapter_path=str(made.folder))
    merge(base, adapter, tmp_path / "merged", template, dtype="fp32")
    texts = rows(2)
    assert (
        agreement(reference_logits(tmp_path / "merged", texts, torch.float32), [logits_of(model, i) for i in texts])
        > 0.9
    )


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "llama")
    other = make(tmp_path / "other", "llama", num_hidden_layers=4, intermediate_size=256)
    adapter = adapter_for(other, tmp_path / "adapter", ("q_proj", "down_proj"))
    with pytest.raises(ExportError, match="does not fit the base") as caught:
        write_mlx_adapter(base, adapter, tmp_path / "mlx", template_of(base))
    assert "model.layers.3.self_attn.q_proj.weight: the base has no such weight" in caught.value.message
    assert caught.value.message.count("in the base, ") == 3
    assert caught.value.remedy
    assert not (tmp_path / "mlx").exists()
