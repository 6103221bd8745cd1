"""Every type of GGUF file in llama.cpp: the same ids, the same likeliest token, and what the fewer bits cost in loss.

The bounds are those that an export is held to: 99.5 % of the likeliest tokens for F16 and BF16, 98 % for Q8_0. Random
weights give near ties that any rounding flips, so the small models here have learned something first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from luthier.data.conversation import Turn
from luthier.data.render import make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.export.gguf import write_gguf
from luthier.export.gguf_types import K_QUANTS, QUANTIZE, Quantize
from luthier.model.load import load_decoder
from tests.export.texts import ADDED_TEXTS, mixed, with_added_tokens, with_llama_3s_vocabulary
from tests.parity.test_llama_cpp import LLAMA3, SPRIG, VOCAB, YARN, held_out, loaded, logits_of, make, same_ids

pytestmark = pytest.mark.llama_cpp

AT_LEAST: dict[Quantize, float] = {"f32": 0.995, "f16": 0.995, "bf16": 0.995, "q8_0": 0.98}

LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
SCALINGS = {"default": None, "linear": LINEAR, "yarn": YARN, "llama3": LLAMA3}
FAMILIES = [
    (family, scaling, tied)
    for number, (family, scaling) in enumerate(
        (family, scaling)
        for family in ("llama", "mistral", "qwen2", "qwen3")
        for scaling in SCALINGS
        # llama.cpp's qwen2 and qwen3 have no factors for single frequencies: refused, see test_llama_cpp.py
        if scaling != "llama3" or family in ("llama", "mistral")
    )
    for tied in ((number % 2 == 0),)
]


def orbits(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """[count, length] ids, each telling the next by one fixed permutation: what a small model learns in a second."""
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    columns = [torch.randint(0, 400, (count,), generator=generator)]
    while len(columns) < length:
        columns.append(order[columns[-1]])
    return torch.stack(columns, 1) + 6


def taught(folder: Path, generator: torch.Generator) -> None:
    """The model in `folder` once it tells orbits, in bf16 as a merge leaves it: half taught it would have near ties."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(300):
        ids = orbits(8, 100, generator)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.03:
            break
    model.to(torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize(("family", "scaling", "tied"), FAMILIES)
def test_the_likeliest_token(family: str, scaling: str, tied: bool, tmp_path: Path) -> None:
    settings: dict[str, object] = {"tie_word_embeddings": tied}
    if family == "mistral":
        settings["sliding_window"] = None
    if SCALINGS[scaling] is not None:
        settings["rope_parameters"] = SCALINGS[scaling]
    folder = tmp_path / "hf"
    make(folder, (family, settings))
    generator = torch.Generator().manual_seed(0)
    taught(folder, generator)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = orbits(6, 100, generator).tolist()
    with torch.no_grad():
        wanted = [reference(torch.tensor([ids])).logits[0].numpy() for ids in texts]
    # fp16 and bf16 round activations by 2^-11 and 2^-8, Q8_0 weights by 2^-8 of a block's largest (test_llama_cpp.py).
    for quantize, error in (("f16", 0.015), ("bf16", 0.06), ("q8_0", 0.15)):
        written = write_gguf(folder, tmp_path / f"{quantize}.gguf", quantize)
        with loaded(written.path) as model:
            found = [logits_of(model, ids, VOCAB) for ids in texts]
        for got, want in zip(found, wanted, strict=True):
            assert np.abs(got - want).max() < error * np.abs(want).max()
        agree = np.concatenate([g.argmax(-1) == w.argmax(-1) for g, w in zip(found, wanted, strict=True)])
        assert agree.mean() >= AT_LEAST[quantize], quantize


# --- sprig, in every type ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Held-out conversations as ids, with the logits of the weights in fp32."""

    ids: list[list[int]]
    logits: list[NDArray[np.float32]]


@pytest.fixture(scope="module")
def held() -> Held:
    decoder = load_decoder(SPRIG, dtype=torch.float32)
    template = make_template("model", load_tokenizer(SPRIG))
    rows = [*held_out("pirate", ("question", "answer")), *held_out("tales", ("title", "content"))[:20]]
    ids = [
        template.tokenizer.encode(template.render([Turn("user", asked), Turn("assistant", said)]), special=True)
        for asked, said in rows
    ]
    with torch.inference_mode():
        return Held(ids, [decoder(torch.tensor(one)).float().numpy() for one in ids])


def loss(ids: Sequence[Sequence[int]], logits: Sequence[NDArray[np.float32]]) -> float:
    """The mean negative log-likelihood of each token after the first, in nats."""
    total = []
    for one, scores in zip(ids, logits, strict=True):
        before = torch.from_numpy(scores[:-1].astype(np.float64))
        total.append(torch.nn.functional.cross_entropy(before, torch.tensor(one[1:]), reduction="none"))
    return float(torch.cat(total).mean())


@pytest.mark.parametrize("quantize", QUANTIZE)
def test_sprig(quantize: Quantize, held: Held, tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    written = write_gguf(SPRIG, tmp_path / "m.gguf", quantize)
    assert written.kept_f16 == ()
    assert written.notes == ()
    with loaded(written.path) as model:
        found = [logits_of(model, ids, held.logits[0].shape[-1]) for ids in held.ids]
    agree = np.concatenate([g.argmax(-1) == w.argmax(-1) for g, w in zip(found, held.logits, strict=True)]).mean()
    increase = loss(held.ids, found) - loss(held.ids, held.logits)
    record_property("agreement", float(agree))
    record_property("loss increase", increase)
    assert agree >= AT_LEAST.get(quantize, 0.9)
    # Measured: at most 0.016 nats either way, of 6.75, for Q4_K_M (docs/decisions/0014). Twice that is a fault.
    assert abs(increase) < (0.035 if quantize in (*K_QUANTS, "q4_0", "q5_0") else 0.007)


@pytest.mark.parametrize("quantize", ["f16", "q5_k_m"])
def test_parts_are_loaded_as_one(quantize: Quantize, held: Held, tmp_path: Path) -> None:
    whole = write_gguf(SPRIG, tmp_path / "whole.gguf", quantize)
    parts = write_gguf(SPRIG, tmp_path / "parts.gguf", quantize, split=2_500_000)
    assert len(parts.parts) > 1
    with loaded(whole.path) as one, loaded(parts.path) as several:
        for ids in held.ids[:3]:
            assert np.array_equal(logits_of(one, ids, 100), logits_of(several, ids, 100))


# --- token ids --------------------------------------------------------------------------------------------------------


def test_ids_of_500_texts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(SPRIG)
    with loaded(write_gguf(SPRIG, tmp_path / "m.gguf").path, vocabulary=True) as model:
        assert [text for text in mixed(500) if not same_ids(model, tokenizer, text)] == []


@pytest.mark.shared
def test_ids_of_500_texts_in_llama_3s_vocabulary(shared: Path, tmp_path: Path) -> None:
    folder = with_llama_3s_vocabulary(shared, tmp_path / "hf")
    tokenizer = load_tokenizer(folder)
    with loaded(write_gguf(folder, tmp_path / "m.gguf", "q8_0").path, vocabulary=True) as model:
        assert [text for text in mixed(500) if not same_ids(model, tokenizer, text)] == []


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens(tied: bool, tmp_path: Path) -> None:
    """Tokens that a user added, with rows of their own: found inside words, special ones only where they are meant."""
    folder = with_added_tokens(tmp_path / "hf", tied)
    tokenizer = load_tokenizer(folder)
    item, gizmo, call = (tokenizer.token_id(text) for text in ("<item>", "gizmo", "<|call|>"))
    assert (item, gizmo, call) == (400, 401, 402)
    written = write_gguf(folder, tmp_path / "m.gguf")
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with loaded(written.path) as model:
        for text in ADDED_TEXTS:
            assert same_ids(model, tokenizer, text), text
        ids = tokenizer.encode("<|call|>do<item>gizmo", special=True)
        assert {item, gizmo, call} <= set(ids)
        assert model.tokenize(b"<|call|>do<item>gizmo", add_bos=False, special=True) == ids
        with torch.no_grad():
            want = reference(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(logits_of(model, ids, 416) - want).max() < 0.015 * np.abs(want).max()
