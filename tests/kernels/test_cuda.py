"""The kernels for CUDA: their arithmetic, that they compile, what happens where they cannot be had, and on a card all.

What needs neither a card nor Triton runs everywhere. Triton alone, without a card, is enough to interpret the kernels
on a CPU and to compile them for a card (`pip install triton`, Linux); with a card they are run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.kernels import REFERENCE, choose
from luthier.kernels.choose import TORCH, kernels_for
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters

CARD = torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (torch for CUDA has it)")
needs_card = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA card"
)


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LUTHIER_KERNELS", raising=False)
    chosen = choose._cuda
    chosen.cache_clear()
    yield
    chosen.cache_clear()


def as_if(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0), triton: bool = True) -> None:
    """As if this machine had such a card."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(choose, "find_spec", lambda _: object() if triton else None)


@needs_triton
def test_interpreted_the_kernels_agree_with_float64() -> None:
    words = [sys.executable, "-m", "tests.kernels.triton_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(words, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


KERNELS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "_rms_norm": ({"x": "*T", "weight": "*T", "y": "*T", "eps": "fp32"}, {"SIZE": 4096}),
    "_rms_norm_backward": (
        {"grad": "*T", "x": "*T", "weight": "*T", "onto": "*T", "out": "*T", "eps": "fp32"},
        {"SIZE": 4096},
    ),
    "_rope": ({"x": "*T", "cos": "*T", "sin": "*T"}, {"HEADS": 32, "HALF": 64, "BACK": True}),
    "_swiglu": ({"gate": "*T", "up": "*T", "y": "*T", "count": "i32"}, {"BLOCK": 1024}),
    "_swiglu_backward": ({"grad": "*T", "gate": "*T", "up": "*T", "count": "i32"}, {"BLOCK": 1024}),
    "_cross_entropy": (
        {"logits": "*T", "labels": "*i64", "weights": "*fp32", "losses": "*fp32"},
        {"SIZE": 128256, "GRADIENT": True, "BLOCK": 8192},
    ),
    "_quantize_rows": ({"x": "*T", "factor": "*fp32", "out": "*fp8e4nv", "scales": "*fp32"}, {"SIZE": 14336}),
    "_transpose": ({"x": "*u8", "out": "*u8", "rows": "i32", "columns": "i32"}, {"TILE": 64}),
}
OPTIONAL = {"_rms_norm_backward": "onto", "_cross_entropy": "weights", "_quantize_rows": "factor"}


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("name", "left_out"), [*((name, None) for name in KERNELS), *OPTIONAL.items()])
def test_the_kernels_compile_for_cards_that_are_not_here(
    name: str, dtype: str, left_out: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from luthier.kernels import triton_fp8, triton_pointwise

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers, constants = KERNELS[name]
    types, constants = {key: of.replace("T", dtype) for key, of in pointers.items()}, dict(constants)
    if left_out is not None:
        del types[left_out]
        constants[left_out] = None
    kernel = getattr(triton_pointwise, name, None) or getattr(triton_fp8, name)
    source = ASTSource(kernel, {key: types.get(key, "constexpr") for key in kernel.arg_names}, constexprs=constants)
    for capability in (89, 90) if name == "_quantize_rows" else (80, 90):
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
        assert made.asm["cubin"]


@needs_triton
@pytest.mark.parametrize(("size", "window"), [(18, None), (64, 5), (128, None), (256, 1)])
def test_attention_s_calls_are_those_of_this_torch(size: int, window: int | None) -> None:
    """By torch's own shapes without numbers: names, order and number of arguments and results."""
    from luthier.kernels.cuda import Cuda

    q_THd, k_TKd = (torch.empty(10, heads, size, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    o_THd, rest = Cuda().attention(q_THd, k_TKd, k_TKd, (1, 9), window)
    assert o_THd.shape == q_THd.shape
    grads = Cuda().attention_backward(o_THd, (q_THd, k_TKd, k_TKd), (o_THd, rest), (1, 9), window)
    assert [grad.shape for grad in grads] == [q_THd.shape, k_TKd.shape, k_TKd.shape]


@needs_triton
def test_heads_that_flash_attention_does_not_know_are_computed_and_said() -> None:
    from luthier.kernels import cuda
    from luthier.kernels.attention import attention

    cuda._say_too_large.cache_clear()
    q_THd, k_TKd, v_TKd = (torch.randn(10, heads, 264) for heads in (4, 2, 2))
    with pytest.warns(UserWarning, match="no kernel for heads of 264"):
        o_THd, _ = cuda.Cuda().attention(q_THd, k_TKd, v_TKd, (1, 9), None)
    torch.testing.assert_close(o_THd, attention(q_THd, k_TKd, v_TKd, (1, 9), None))


@needs_triton
def test_where_documents_start_is_made_once() -> None:
    from luthier.kernels.cuda import _starts

    starts = _starts((3, 1, 7), torch.device("cpu"))
    assert starts.tolist() == [0, 3, 4, 11]
    assert starts.dtype == torch.int32
    assert _starts((3, 1, 7), torch.device("cpu")) is starts


@pytest.mark.parametrize(
    ("capability", "triton", "dtype", "said"),
    [
        ((9, 0), True, torch.float32, "know bf16 and fp16, not float32"),
        ((7, 5), True, torch.float16, "need compute capability 8.0, and this card has 7.5"),
        ((9, 0), False, torch.bfloat16, "compiled by triton, which is not installed"),
    ],
)
def test_what_is_missing_is_said(
    capability: tuple[int, int], triton: bool, dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if(monkeypatch, capability, triton)
    choice = kernels_for(CARD, dtype)
    assert choice.kernels is REFERENCE
    assert said in choice.notice
    assert "torch's kernels are used" in choice.notice


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is there")
def test_a_triton_that_cannot_be_imported_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if(monkeypatch)
    choice = kernels_for(CARD, torch.bfloat16)
    assert choice.kernels is REFERENCE
    assert "the CUDA kernels cannot be used (ModuleNotFoundError: No module named 'triton')" in choice.notice


def test_wrong_numbers_lead_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if(monkeypatch)
    monkeypatch.setattr(choose, "_cuda", lambda *_: (None, "the CUDA kernels compute rope in bfloat16 wrongly here"))
    choice = kernels_for(CARD, torch.bfloat16)
    assert choice.kernels is REFERENCE
    assert choice.notice.startswith("the CUDA kernels compute rope in bfloat16 wrongly here: torch's kernels are used")


def test_efficient_attention_is_flash_s_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if(monkeypatch)
    monkeypatch.setattr(choose, "_cuda", lambda *_: (TORCH, ""))
    assert kernels_for(CARD, torch.bfloat16).notice == ""
    choice = kernels_for(CARD, torch.bfloat16, "efficient")
    assert choice.kernels is TORCH
    assert "efficient is computed by flash attention" in choice.notice
    assert kernels_for(CARD, torch.bfloat16, "math").kernels is REFERENCE


def test_the_environment_asks_for_a_card_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_KERNELS", "cuda")
    choice = kernels_for(torch.device("cpu"), torch.bfloat16)
    assert choice.kernels is TORCH
    assert "need an NVIDIA card, and this run is on cpu" in choice.notice


@needs_card
@needs_triton
def test_on_a_card_the_kernels_agree_with_float64() -> None:
    from tests.kernels.triton_cases import Cases, fp8

    Cases("cuda", torch.bfloat16).all()
    if torch.cuda.get_device_capability() >= (8, 9):
        fp8("cuda")


@needs_card
@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_card_they_pass_their_check_and_are_taken(dtype: torch.dtype) -> None:
    choice = kernels_for(CARD, dtype)
    assert (choice.kernels.name, choice.notice) == ("cuda", "")


@needs_card
@needs_triton
def test_on_a_card_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from luthier.kernels.cuda import Cuda

    real = Cuda.rope
    monkeypatch.setattr(Cuda, "rope", staticmethod(lambda x, cos, sin, back=False: real(x, sin, cos, back)))
    choice = kernels_for(CARD, torch.bfloat16)
    assert choice.kernels is REFERENCE
    assert "compute rope in bfloat16 wrongly here" in choice.notice


@needs_card
@needs_triton
def test_on_a_card_no_operation_waits_for_it() -> None:
    from luthier.kernels.cuda import Cuda

    ops, lengths = Cuda(), (5, 60, 1)
    x, weight = torch.randn(66, 64, device=CARD).bfloat16(), torch.randn(64, device=CARD).bfloat16()
    q_THd = x.view(66, 4, 16)
    labels_N = torch.zeros(66, dtype=torch.int64, device=CARD)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):  # compiled in the first round
            ops.rms_norm_backward(ops.rms_norm(x, weight, 1e-5), x, weight, 1e-5)
            o_THd, rest = ops.attention(q_THd, q_THd, q_THd, lengths, None)
            ops.attention_backward(o_THd, (q_THd, q_THd, q_THd), (o_THd, rest), lengths, None)
            ops.linear_cross_entropy(x, x, labels_N)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _gradients(folder: Path, device: str, wish: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Of a packed batch through the tiny model in bf16, with a LoRA whose B is not zero."""
    monkeypatch.setenv("LUTHIER_KERNELS", wish)
    decoder = load_decoder(folder, dtype=torch.bfloat16, device=device)
    add_lora(decoder, LoRASpec(4, 8.0), seed=0)
    leaves = lora_parameters(decoder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn(leaf.shape, generator=generator) * 0.05)
    decoder.train()
    decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)
    ids_T = torch.randint(0, 400, (70,), generator=generator).to(device)
    hidden_TD = decoder.hidden(ids_T, (1, 40, 29))
    decoder.kernels.linear_cross_entropy(hidden_TD, decoder.head_weight, ids_T.roll(-1)).backward()  # type: ignore[no-untyped-call]
    return {name: leaf.grad.cpu() for name, leaf in leaves.items() if leaf.grad is not None}


@needs_card
@needs_triton
def test_on_a_card_gradients_are_the_references(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rounds each of some twenty steps to 2^-8: a tenth of the norm is far more than that, and less than an error
    of one operation comes to."""
    wanted = _gradients(tiny_llama, "cuda", "reference", monkeypatch)
    ours = _gradients(tiny_llama, "cuda", "cuda", monkeypatch)
    assert ours.keys() == wanted.keys()
    for name, grad in ours.items():
        assert (grad - wanted[name]).norm() <= 0.1 * wanted[name].norm(), name
