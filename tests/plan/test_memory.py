"""The closed form of memory against what torch really keeps, on models of every shape of the formula; and its laws."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from luthier.data.batches import Batch, pack
from luthier.data.conversation import Example
from luthier.evaluate.loss import held_out_loss
from luthier.hardware.device import DeviceKind
from luthier.kernels import batched, kernels_with
from luthier.kernels.attention import only_math
from luthier.kernels.choose import TORCH, kernels_for
from luthier.kernels.loss import CHUNK_LOGITS as LOSS_CHUNK
from luthier.model.by_hand import layer_by_hand
from luthier.model.config import PROJECTIONS, ModelConfig
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.plan import activations, sizes
from luthier.plan.memory import predict_memory, weight_bytes
from luthier.plan.work import Work
from luthier.recipe.micro_batch import LEAST, WORTH
from luthier.train.optimizer import make_optimizer
from tests import tiny

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, max_positions=131072)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ATTENTION_ONLY = PROJECTIONS[:4]


def work(config: ModelConfig = LLAMA_8B, **changes: object) -> Work:
    base = Work(config, "bf16", "none", "adamw", "flash", 16, PROJECTIONS, 2048, 2048)
    return replace(base, **changes)  # type: ignore[arg-type]


def batch_of(lengths: tuple[int, ...], vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, vocabulary, (length,), generator=generator).numpy() for length in lengths]
    return pack([Example(ids=ids, labels=ids, row=row) for row, ids in enumerate(rows)])


def kept(decoder: Decoder, batch: Batch, *, recompute: bool = False) -> int:
    """Bytes that a forward pass through the layers keeps for the backward pass, each storage once; no parameter, and
    none of the tables that all layers share."""
    shared = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    positions = decoder._positions(batch.ids_T, batch.lengths, ())
    shared |= {table.untyped_storage().data_ptr() for table in (positions.cos, positions.sin)}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in shared:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: lest its address be given again
        return tensor

    h_TD = torch.nn.functional.embedding(batch.ids_T, decoder.model.embed_tokens.weight).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for layer in decoder.layers:
            if decoder.kernels.by_hand is None:
                h_TD = layer(h_TD, positions)
            else:
                h_TD = layer_by_hand(layer, h_TD, positions, None, recompute=recompute)
    return sum(size for size, _ in found.values())


CASES: dict[str, dict[str, object]] = {
    "plain": {},
    "fp32": {"precision": "fp32"},
    "attention only": {"targets": ATTENTION_ONLY},
    "documents of several lengths": {"lengths": (70, 31, 20)},
    "equal documents": {"lengths": (40, 40, 40)},
    "dropout": {"dropout": 0.1},
    "rank 3": {"rank": 3},
    "efficient": {"attention": "efficient"},
    "math": {"attention": "math"},
    "math in fp32": {"attention": "math", "precision": "fp32", "lengths": (60, 60)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_keeps_what_the_formula_says(case: str, family: str, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / family, family)
    asked: dict[str, object] = {
        "precision": "bf16",
        "lengths": (121,),
        "targets": PROJECTIONS,
        "rank": 5,
        **CASES[case],
    }
    lengths = asked.pop("lengths")
    assert isinstance(lengths, tuple)
    decoder = load_decoder(folder, dtype=DTYPES[str(asked["precision"])])
    asked = {"dropout": 0.0, **asked}
    spec = LoRASpec(asked["rank"], 7.0, asked["dropout"], asked["targets"])  # type: ignore[arg-type]
    add_lora(decoder, spec, 0)
    decoder.train()
    total, longest = sum(lengths), max(lengths)
    planned = work(decoder.config, tokens=total, longest=longest, documents=len(lengths), **asked)
    predicted = decoder.config.layers * activations.kept_bytes(planned)
    decoder.use(kernels_with(planned.attention))
    with only_math(planned.attention):
        measured = kept(decoder, batch_of(lengths, decoder.config.vocab_size))
    assert predicted == pytest.approx(measured, rel=0.02), f"{predicted / measured:.3f} of what is kept"


BY_HAND = [case for case in CASES if "math" not in case and case != "efficient"]


def tuned(folder: Path, asked: dict[str, object], name: str) -> Decoder:
    """With a LoRA, and the kernels of that name; skips where these are not there."""
    dtype = DTYPES[str(asked["precision"])]
    decoder = load_decoder(folder, dtype=dtype)
    add_lora(decoder, LoRASpec(asked["rank"], 7.0, asked["dropout"], asked["targets"]), 0)  # type: ignore[arg-type]
    decoder.train()
    kernels = TORCH if name == "torch" else kernels_for(torch.device("cpu"), dtype).kernels
    if not kernels.name.startswith(name):
        pytest.skip("the C kernels are not compiled here")
    decoder.use(kernels)
    return decoder


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("case", BY_HAND)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_by_hand_keeps_what_the_formula_says(
    case: str, family: str, name: str, recompute: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LUTHIER_KERNELS", raising=False)
    folder = tiny.make_model(tmp_path / family, family)
    usual: dict[str, object] = {"precision": "bf16", "targets": PROJECTIONS, "rank": 5, "dropout": 0.0}
    asked = {"lengths": (121,), **usual, **CASES[case]}
    lengths = asked.pop("lengths")
    assert isinstance(lengths, tuple)
    decoder = tuned(folder, asked, name)
    planned = work(
        decoder.config, tokens=sum(lengths), longest=max(lengths), documents=len(lengths), kernels=name, **asked
    )
    formula = activations.recomputed_bytes if recompute else activations.kept_bytes
    measured = kept(decoder, batch_of(lengths, decoder.config.vocab_size), recompute=recompute)
    assert decoder.config.layers * formula(planned) == measured


SHAPE = ModelConfig("llama", 4000, 192, 512, 2, 6, 2, 32, tied=True, max_positions=4096)


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that torch holds at most during the call, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    found = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    told = sorted((event.start_ns(), event.nbytes()) for event in found if event.name() == "[memory]")
    del result
    return max(accumulate((size for _, size in told), initial=0))


@pytest.mark.parametrize("lengths", [(512,), (128,) * 4])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("name", ["native", "torch"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_fullest_moments_of_a_layer_by_hand(
    precision: str, name: str, dropout: float, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backward, and the loss; the adapter's own gradients, a part of their own in the plan, are left out."""
    monkeypatch.delenv("LUTHIER_KERNELS", raising=False)
    decoder = Decoder(SHAPE).to(DTYPES[precision])
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    add_lora(decoder, LoRASpec(8, 8.0, dropout), 0)
    decoder.train()
    kernels = TORCH if name == "torch" else kernels_for(torch.device("cpu"), decoder.dtype).kernels
    if not kernels.name.startswith(name):
        pytest.skip("the C kernels are not compiled here")
    decoder.use(kernels)
    ids_T = torch.arange(512)
    h_TD = torch.randn(512, 192).to(decoder.dtype).requires_grad_()
    asked = {"precision": precision, "rank": 8, "dropout": dropout, "kernels": name}
    planned = work(SHAPE, tokens=512, longest=max(lengths), documents=len(lengths), **asked)
    out_TD = layer_by_hand(decoder.layers[1], h_TD, decoder._positions(ids_T, lengths, ()), None, recompute=False)
    grad_TD = torch.ones_like(out_TD)
    of_adapter = sum(4 * leaf.numel() for leaf in lora_parameters(decoder).values()) // SHAPE.layers
    measured = peak_of(lambda: torch.autograd.grad(out_TD, [h_TD], grad_TD)) + grad_TD.nbytes - of_adapter
    assert activations.backward_bytes(planned) == pytest.approx(measured, rel=0.12)
    loss = decoder.kernels.linear_cross_entropy
    measured = peak_of(lambda: loss(h_TD, decoder.head_weight, ids_T)) + 2 * h_TD.nbytes
    assert activations.loss_bytes(planned, tokens=512, trains=True) == pytest.approx(measured, rel=0.05)


def test_state_is_what_the_optimizer_allocates(tiny_llama: Path) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.float32)
    add_lora(decoder, LoRASpec(6, 7.0), 0)
    leaves = lora_parameters(decoder)
    optimizer = make_optimizer("adamw", leaves, learning_rate=1e-3, weight_decay=0.0)
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf)
    optimizer.step()
    moments = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    scalars = 4 * len(leaves)  # the count of steps
    train = predict_memory(work(decoder.config, rank=6), "cpu").phase("train")
    found = {part.name: part.bytes for part in train.parts}
    assert found["optimizer"] == moments - scalars
    assert found["adapter"] == found["gradients"] == sum(leaf.nbytes for leaf in leaves.values())


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_weights_are_what_is_loaded(tiny_llama: Path, quantize: str) -> None:
    decoder = load_decoder(tiny_llama, dtype=torch.bfloat16, quantize=quantize)  # type: ignore[arg-type]
    held = sum(parameter.nbytes for parameter in decoder.parameters())
    if quantize == "nf4":
        from luthier.model.quantize import NF4Linear

        for module in decoder.modules():
            if isinstance(module, NF4Linear) and module.quant_state is not None:
                held += module.quant_state.absmax.nbytes
                assert module.quant_state.state2 is not None
                held += module.quant_state.state2.absmax.nbytes
    predicted = weight_bytes(work(decoder.config, quantize=quantize))
    assert predicted == pytest.approx(held, rel=0.02)


def test_the_chunk_of_logits_is_the_loss_s_own() -> None:
    assert sizes.CHUNK_LOGITS == LOSS_CHUNK
    assert sizes.SCORES == batched.SCORES
    assert sizes.TILE == batched.TILE
    source = Path(batched.__file__).with_name("cuda.py").read_text(encoding="utf-8")  # it needs triton to be imported
    assert f"_LOGITS = 2**{sizes.CUDA_CHUNK_LOGITS.bit_length() - 1}\n" in source


def test_the_group_of_held_out_rows_is_the_evaluation_s_own() -> None:
    assert inspect.signature(held_out_loss).parameters["tokens_per_batch"].default == sizes.EVALUATION_TOKENS


_works = st.builds(
    work,
    tokens=st.integers(1, 20_000),
    recomputed=st.integers(0, 32),
    rank=st.integers(1, 256),
    precision=st.sampled_from(["bf16", "fp16", "fp32"]),
    quantize=st.sampled_from(["none", "nf4"]),
    optimizer=st.sampled_from(["adamw", "adamw-8bit"]),
    attention=st.sampled_from(["flash", "efficient", "math"]),
    kernels=st.sampled_from(["native", "torch", "cuda", "reference"]),
    evaluation_tokens=st.integers(0, 5000),
)
_kinds = st.sampled_from(["cpu", "cuda", "mps"])


@given(_works, _kinds)
@settings(max_examples=200, deadline=None)
def test_laws(one: Work, kind: DeviceKind) -> None:
    one = replace(one, longest=one.tokens)
    train = predict_memory(one, kind).phase("train").bytes
    assert train > 0

    def other(**changes: object) -> int:
        return predict_memory(replace(one, **changes), kind).phase("train").bytes  # type: ignore[arg-type]

    assert other(tokens=one.tokens + 1, longest=one.tokens + 1) >= train
    assert other(rank=one.rank + 1) > train
    assert other(optimizer="adamw") >= train
    assert other(sharding="ddp", devices=4) >= train
    assert other(attention="flash") <= train
    if one.recomputed < 31:  # the last layer's own recomputation holds as much as keeping it
        assert other(recomputed=one.recomputed + 1) <= train
    if one.sharding == "none" and one.quantize == "nf4":
        assert other(quantize="none") > train


def parts_of(one: Work, kind: DeviceKind = "cpu") -> dict[str, int]:
    return {part.name: part.bytes for part in predict_memory(one, kind).phase("train").parts}


@pytest.mark.parametrize("tokens", [2 * LEAST, 2 * LEAST + 1])
def test_what_two_halves_at_once_have_twice(tokens: int) -> None:
    """In fp32, where nothing is filled up."""
    alone = work(precision="fp32", quantize="nf4", kernels="torch", tokens=tokens, longest=tokens)
    whole, two = parts_of(alone), parts_of(replace(alone, documents=2))
    half = replace(alone, tokens=-(-tokens // 2))
    assert two["gradients"] == 2 * whole["gradients"]
    assert two["dequantised weights"] == 2 * whole["dequantised weights"]
    assert two["loss"] == 2 * activations.loss_bytes(half, tokens=half.tokens, trains=True) > whole["loss"]
    for name in ("weights", "adapter", "optimizer", "activations", "context"):
        assert two[name] == whole[name]
    narrow = replace(alone, config=replace(LLAMA_8B, vocab_size=2000))
    assert parts_of(replace(narrow, documents=2))["backward"] == 2 * activations.backward_bytes(
        replace(narrow, tokens=half.tokens)
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"documents": 1}, "cpu"),
        ({"dropout": 0.1}, "cpu"),
        ({"tokens": 2 * LEAST - 1}, "cpu"),
        ({"config": replace(LLAMA_8B, hidden_size=WORTH // 2048 - 1)}, "cpu"),
        ({}, "cuda"),
    ],
    ids=["one document", "dropout", "few tokens", "narrow", "cuda"],
)
def test_what_goes_undivided_has_it_once(changes: dict[str, object], kind: DeviceKind) -> None:
    one = replace(work(longest=200, documents=12), **changes)  # type: ignore[arg-type]
    parts = parts_of(one, kind)
    assert parts["gradients"] == parts["adapter"]
    if kind == "cpu" and "tokens" not in changes:
        divided = parts_of(work(longest=200, documents=12))
        assert divided["gradients"] == 2 * divided["adapter"]


@given(_works, st.integers(2, 40), st.sampled_from([2 * LEAST - 1, 2 * LEAST]) | st.integers(1, 4000), st.data())
@settings(max_examples=200, deadline=None)
def test_a_fuller_micro_batch_never_needs_less(one: Work, documents: int, tokens: int, data: st.DataObject) -> None:
    """On a CPU too, where from some size on it is divided; documents of several lengths."""
    longest = data.draw(st.integers(-(-tokens // documents) + 1, max(tokens, -(-tokens // documents) + 1)))
    one = replace(one, tokens=tokens, longest=longest, documents=documents)
    held = predict_memory(one, "cpu").phase("train").bytes
    for fuller in (replace(one, tokens=tokens + 1), replace(one, documents=documents + 1)):
        if fuller.tokens < fuller.documents * fuller.longest:
            assert predict_memory(fuller, "cpu").phase("train").bytes >= held


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"step_tokens": 1500.0}, True),
        ({"step_tokens": 3000.0, "micro_batches": 2}, True),
        ({"step_tokens": 1500.0, "precision": "fp32"}, True),
        ({"step_tokens": 2000.0}, False),
        ({}, False),
    ],
)
def test_kernels_are_built_for_micro_batches_of_many_lengths(changes: dict[str, object], counted: bool) -> None:
    """Where all are as long as the largest, or nothing says how long they are, one number of rows comes up."""
    for kind in ("cpu", "cuda"):
        parts = predict_memory(work(**changes), kind).phase("train").parts  # type: ignore[arg-type]
        assert ("kernels" in {part.name for part in parts}) == (counted and kind == "cpu")


def test_fsdp_cuts_weights_state_and_nothing_else() -> None:
    whole, cut = (predict_memory(work(sharding=s, devices=4), "cuda").phase("train") for s in ("none", "fsdp"))
    at = {part.name: part.bytes for part in whole.parts}
    of = {part.name: part.bytes for part in cut.parts}
    for name in ("weights", "adapter", "gradients", "optimizer"):
        assert of[name] == pytest.approx(at[name] / 4, abs=1)
    for name in ("activations", "context"):
        assert of[name] == at[name]
    assert of["gathered weights"] > 0
