"""The speed model: its FLOPs against figures worked out by hand, its order against common sense, its units."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.hardware.catalogue import known
from luthier.hardware.device import AttentionRate, Device, MatmulRate, Precision, Rates
from luthier.hardware.timed import LAYER_OPERATIONS
from luthier.model.config import PROJECTIONS, ModelConfig
from luthier.plan.passes import backward_passes, forward_passes
from luthier.plan.speed import predict_speed
from luthier.plan.work import Work

LLAMA_8B = ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, max_positions=131072)
LLAMA_3B = ModelConfig("llama", 128256, 3072, 8192, 28, 24, 8, 128, tied=True, max_positions=131072)
TINY = ModelConfig("llama", 1000, 64, 128, 2, 4, 2, 16)
RATES = Rates(
    matmul=(
        MatmulRate("bf16", 16, 1.5e11),
        MatmulRate("bf16", 512, 4e11),
        MatmulRate("fp32", 16, 7e10),
        MatmulRate("fp32", 512, 9e10),
    ),
    attention=(
        AttentionRate("bf16", 128, 2e10, 1e10),
        AttentionRate("bf16", 2048, 5e10, 7e10),
        AttentionRate("fp32", 128, 2e10, 2e10),
        AttentionRate("fp32", 2048, 5e10, 5e10),
    ),
    bandwidth=5e10,
    dequantize=4e9,
    operation=6e-6,
    source="the test",
    fresh=3e9,
)
CPU = Device("cpu", "test", 16.0, 2, fast=("bf16", "fp32"), rates=RATES)
GPU = Device("cuda", "test", 80.0, 8, (9, 0), ("bf16", "fp16", "fp32"), rates=replace(RATES, fresh=None))


def work(config: ModelConfig = TINY, *, tokens: int = 512, documents: int = 1, **given: object) -> Work:
    base = Work(
        config=config,
        precision="bf16",
        quantize="none",
        optimizer="adamw",
        attention="flash",
        rank=16,
        targets=PROJECTIONS,
        tokens=tokens,
        longest=tokens // documents,
        documents=documents,
        step_tokens=float(tokens),
    )
    return replace(base, **given)  # type: ignore[arg-type]


# peers.md section 3: about 33 GFLOP a token for an 8B LoRA at 4,096 tokens, about 49 where all is recomputed. By hand,
# in GFLOP: 6.98e9 weights of the layers 27.9, head 128256 x 4096 x 4 = 2.1, LoRA 41.9e6 x 6 = 0.25, attention
# 32 layers x 7 x 4096 x 4096 = 3.8 (2 forward and 5 backward, half masked); once more forward: 14.0 + 0.1 + 1.1.
@pytest.mark.parametrize(("recomputed", "gigaflops"), [(0, 34.0), (32, 49.1)])
def test_flops_of_an_8b_lora(recomputed: int, gigaflops: float) -> None:
    speed = predict_speed(work(LLAMA_8B, tokens=4096, recomputed=recomputed), GPU)
    assert speed.flops_per_token == pytest.approx(gigaflops * 1e9, rel=0.01)


def test_a_layer_of_one_product_by_hand() -> None:
    """TINY has 2 layers of 64 x 64 (q, o), 32 x 64 (k, v) and 128 x 64 (gate, up, down), 4 heads of 16, 1,000 words."""
    weights, first = 2 * 4096 + 2 * 2048 + 3 * 8192, 4096 + 2 * 2048
    adapter = 16 * (2 * 128 + 2 * 96 + 3 * 192)
    attention = 7 * 512 * 64
    token = 2 * (4 * weights + 6 * adapter + attention) - 2 * first + 4 * 1000 * 64
    assert predict_speed(work(), CPU).flops_per_token == pytest.approx(token)


def test_only_labelled_tokens_reach_the_head() -> None:
    whole, half = (predict_speed(work(labelled=share), CPU) for share in (1.0, 0.5))
    assert whole.flops_per_token - half.flops_per_token == pytest.approx(2 * 1000 * 64)
    assert half.step_seconds < whole.step_seconds


def test_short_documents_cost_less_attention_than_one_long() -> None:
    one, many = (dict(predict_speed(work(documents=n), CPU).parts)["attention"] for n in (1, 8))
    assert many < one


def test_the_parts_make_up_the_step() -> None:
    speed = predict_speed(work(quantize="nf4", recomputed=1, micro_batches=3, step_tokens=1500.0), CPU)
    assert sum(seconds for _, seconds in speed.parts) == pytest.approx(speed.step_seconds)
    assert speed.tokens_per_second == pytest.approx(1500 / speed.step_seconds)
    assert {"recomputation", "dequantisation", "head and loss", "optimizer"} <= {name for name, _ in speed.parts}
    assert speed.source == "the test"


def test_held_out_tokens_cost_less_than_trained_ones() -> None:
    speed = predict_speed(work(evaluation_tokens=4096), CPU)
    assert 0 < speed.evaluation_seconds < 1000 / speed.tokens_per_second


def test_a_gpu_works_while_operations_are_queued() -> None:
    fast = replace(GPU, rates=replace(RATES, fresh=None, operation=1e-9))
    large = work(LLAMA_8B, tokens=4096)
    assert dict(predict_speed(large, GPU).parts).get("host") is None
    slower = predict_speed(large, GPU).step_seconds - predict_speed(large, fast).step_seconds
    assert slower == pytest.approx(32 * 7 * 2 * 4 * 6e-6, rel=0.01)  # the update's alone: nothing is computed meanwhile
    small = work(tokens=8, longest=8, step_tokens=8.0)
    assert predict_speed(small, GPU).step_seconds > 10 * predict_speed(small, fast).step_seconds


def test_without_rates_it_is_estimated_and_says_so() -> None:
    speed = predict_speed(work(), replace(CPU, rates=None))
    assert 0 < speed.step_seconds < 60
    assert "estimated" in speed.source


def test_a_precision_without_hardware_is_slower_than_fp32() -> None:
    plain = replace(RATES, matmul=RATES.matmul[2:], attention=RATES.attention[2:])
    device = replace(CPU, rates=plain)
    assert predict_speed(work(), device).step_seconds > predict_speed(work(precision="fp32"), device).step_seconds


def test_two_devices_halve_the_work_and_pay_for_the_link() -> None:
    one = work(LLAMA_8B, tokens=2048, micro_batches=2, step_tokens=4096.0)
    two = replace(one, micro_batches=1, devices=2, sharding="ddp")
    link = replace(GPU, count=2, link=1e9)
    alone, both = predict_speed(one, GPU), predict_speed(two, link)
    assert alone.step_seconds / 2 < both.step_seconds < alone.step_seconds
    # 41,943,040 fp32 gradients around a ring of two
    assert dict(both.parts)["communication"] == pytest.approx(41_943_040 * 4 / 1e9)
    sharded = predict_speed(replace(two, sharding="fsdp"), replace(link, link=1e8))
    assert sharded.step_seconds > both.step_seconds


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_calibration_counts_the_operations_of_a_layer_as_the_model_does(precision: Precision) -> None:
    two, three = (
        dict(predict_speed(work(replace(TINY, layers=layers), precision=precision), CPU).parts)["host"]
        for layers in (2, 3)
    )
    assert (three - two) / RATES.operation == pytest.approx(LAYER_OPERATIONS[precision], rel=0.01)


def test_a_layer_by_hand_makes_fewer_calls_and_passes() -> None:
    auto, hand = (dict(predict_speed(work(kernels=name), CPU).parts) for name in ("reference", "native"))
    assert hand["host"] < auto["host"]
    assert hand["element by element"] < auto["element by element"]
    assert hand["frozen products"] == auto["frozen products"]


def test_a_layer_by_hand_worked_out() -> None:
    """TINY: D 64, Q 64, K 32, F 128. Of a layer and a token forward 4 D + 2 (Q + K) + 3 F, 4 D for the sums, 2 O of
    each target; backward 12 D + 2 (Q + K) + 6 F, 6 D for the sums, 2 I of each group of targets."""
    forward = 4 * 64 + 2 * 96 + 3 * 128 + 4 * 64 + 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    backward = 12 * 64 + 2 * 96 + 6 * 128 + 6 * 64 + 2 * (64 + 64 + 64 + 128)
    one = work(kernels="native")
    assert forward_passes(one, training=True).narrow == forward
    assert backward_passes(one).narrow == backward


def test_dropout_costs_calls_and_passes_by_hand_too() -> None:
    plain, dropped = (predict_speed(work(kernels="native", dropout=share), CPU).step_seconds for share in (0.0, 0.1))
    assert dropped > plain


ATTENTION_AND_MLP = tuple(name for name in PROJECTIONS if name != "k_proj")  # torchtune's LoRA recipes, rank 8

PUBLISHED = [
    # NeMo AutoModel, docs/performance-summary.mdx (2025-10-02): rank 16 on all projections, 2 x 4096, bf16.
    ("h100", LLAMA_8B, "none", PROJECTIONS, 16, 2, 4096, 12_473),
    # torchtune's README (stored 2026-04-23): 2 x 2048 packed, compiled; its 3B rows at 4096.
    ("rtx4090", LLAMA_8B, "none", ATTENTION_AND_MLP, 8, 2, 2048, 3_083),
    ("rtx4090", LLAMA_8B, "nf4", ATTENTION_AND_MLP, 8, 2, 2048, 2_413),
    ("a100-80g", LLAMA_3B, "none", ATTENTION_AND_MLP, 8, 1, 4096, 8_210),
    ("a100-80g", LLAMA_3B, "nf4", ATTENTION_AND_MLP, 8, 1, 4096, 8_035),
]


@pytest.mark.parametrize(("machine", "config", "quantize", "targets", "rank", "rows", "length", "published"), PUBLISHED)
def test_no_faster_than_compiled_and_fused_peers(
    machine: str,
    config: ModelConfig,
    quantize: str,
    targets: tuple[str, ...],
    rank: int,
    rows: int,
    length: int,
    published: float,
) -> None:
    """Peers' kernels are fused and ours plain torch: by the catalogue's rates we reach 0.6 to 1.0 of their figures."""
    one = work(config, tokens=rows * length, documents=rows, quantize=quantize, targets=targets, rank=rank)
    assert 0.6 < predict_speed(one, known(machine)).tokens_per_second / published < 1.0


SHARES = st.floats(0.0, 1.0)


@st.composite
def works(draw: st.DrawFn) -> Work:
    documents = draw(st.integers(1, 8))
    tokens = documents * draw(st.integers(1, 4096))
    longest = draw(st.integers(-(-tokens // documents), tokens - documents + 1))
    micro_batches = draw(st.integers(1, 16))
    precision: Literal["bf16", "fp16", "fp32"] = draw(st.sampled_from(("bf16", "fp16", "fp32")))
    return Work(
        config=draw(st.sampled_from((TINY, LLAMA_8B))),
        precision=precision,
        quantize=draw(st.sampled_from(("none", "nf4"))),
        optimizer=draw(st.sampled_from(("adamw", "adamw-8bit", "paged-adamw-8bit"))),
        attention=draw(st.sampled_from(("flash", "efficient", "math"))),
        rank=draw(st.integers(1, 256)),
        targets=PROJECTIONS[: draw(st.integers(1, 7))],
        tokens=tokens,
        longest=longest,
        documents=documents,
        recomputed=draw(st.integers(0, 2)),
        step_tokens=draw(st.floats(0.1, 1.0)) * tokens * micro_batches,
        micro_batches=micro_batches,
        evaluation_tokens=draw(st.integers(0, 8192)),
        dropout=draw(st.sampled_from((0.0, 0.1))),
        labelled=draw(SHARES),
        kernels=draw(st.sampled_from(("native", "torch", "cuda", "reference"))),
    )


DEVICES = st.sampled_from((CPU, GPU, replace(CPU, rates=None), replace(GPU, rates=None)))


@given(works(), DEVICES)
def test_every_figure_is_a_positive_number(one: Work, device: Device) -> None:
    speed = predict_speed(one, device)
    found = (speed.step_seconds, speed.tokens_per_second, speed.evaluation_seconds, speed.flops_per_token)
    assert all(0 < figure < math.inf for figure in found)
    assert all(0 < seconds < math.inf for _, seconds in speed.parts)


@given(works(), DEVICES, st.floats(1.0, 4.0))
def test_more_tokens_are_never_faster(one: Work, device: Device, factor: float) -> None:
    more = replace(one, step_tokens=one.step_tokens * factor)
    assert predict_speed(more, device).step_seconds >= predict_speed(one, device).step_seconds * (1 - 1e-9)


@given(works(), DEVICES)
def test_recomputing_more_layers_is_never_faster(one: Work, device: Device) -> None:
    times = [predict_speed(replace(one, recomputed=n), device).step_seconds for n in range(one.config.layers + 1)]
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(times))


@given(works(), DEVICES)
def test_four_bits_are_never_faster_than_sixteen_on_one_device(one: Work, device: Device) -> None:
    plain, packed = (predict_speed(replace(one, quantize=q), device) for q in ("none", "nf4"))
    assert packed.step_seconds >= plain.step_seconds * (1 - 1e-9)
    assert packed.evaluation_seconds >= plain.evaluation_seconds * (1 - 1e-9)


@given(works(), st.sampled_from((GPU, replace(GPU, rates=None))), st.integers(2, 16))
def test_smaller_micro_batches_are_never_faster_on_a_gpu(one: Work, device: Device, cuts: int) -> None:
    """Of rows of one length. (On a CPU they can be: small blocks stay with the allocator, and in its caches.)"""
    whole = replace(one, tokens=one.longest * cuts, documents=cuts, step_tokens=float(one.longest * cuts))
    whole = replace(whole, micro_batches=1)
    cut = replace(whole, tokens=one.longest, documents=1, micro_batches=cuts)
    assert predict_speed(cut, device).step_seconds >= predict_speed(whole, device).step_seconds * (1 - 1e-9)
