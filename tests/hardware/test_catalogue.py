"""The catalogue: every entry is sane, names are read leniently, unknown ones get the nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.errors import UsageError
from luthier.hardware.catalogue import MACHINES, known
from luthier.hardware.datasheets import CARDS, CHIPS, PROCESSORS
from luthier.hardware.device import Device
from luthier.hardware.utilisation import CPU, CUDA_LIMITED, MPS, ROCM
from luthier.hardware.utilisation import CUDA as CUDA_PART

NAMES = [device.known_as or "" for device in MACHINES]
GB = 1e9 / 2**30
PAGE = Path(__file__).resolve().parents[2] / "docs" / "hardware.md"


def test_names_are_unique_and_find_themselves() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert [known(name) for name in NAMES] == list(MACHINES)


@pytest.mark.parametrize("device", MACHINES, ids=NAMES)
def test_entry_is_sane(device: Device) -> None:
    rates = device.rates
    assert rates is not None
    assert device.free_gib is None
    assert device.disk_gib is None
    assert (device.capability is not None) == (device.kind == "cuda")
    assert device.usable_gib == device.memory_gib > 4
    assert {one.precision for one in rates.matmul} == {one for one in device.fast if one in ("bf16", "fp16", "fp32")}
    reached = {(one.precision, one.width): one.flops for one in rates.matmul}
    for half in ("bf16", "fp16"):
        if half in device.fast:
            assert all(reached[half, width] >= reached["fp32", width] for width in (16, 512, 4096))
    for precision in {one.precision for one in rates.matmul}:
        widths = [one for one in rates.matmul if one.precision == precision]
        assert [one.width for one in widths] == sorted(one.width for one in widths)
        assert [one.flops for one in widths] == sorted(one.flops for one in widths)
    for one in rates.attention:
        assert 0 < one.backward <= one.forward < reached[one.precision, 4096]
    assert 1e10 < rates.bandwidth < 1e13
    assert 0 < rates.dequantize < rates.bandwidth
    assert rates.source


def test_memory_is_less_than_what_is_sold() -> None:
    for card in CARDS:
        assert 0.9 * card.sold_gb * GB < card.seen_gib <= card.sold_gb
        assert known(card.name).memory_gib == card.seen_gib
    for chip in CHIPS:
        for size in chip.sold_gb:
            mac = known(f"{chip.name}-{size}g")
            assert mac.host_gib == size
            assert 0.66 * size < mac.memory_gib <= 0.75 * size
    for processor in PROCESSORS:
        assert known(processor.name).memory_gib < processor.sold_gb


def test_rates_stay_below_the_datasheet() -> None:
    for card in CARDS:
        rates = known(card.name).rates
        assert rates is not None
        assert card.source in rates.source
        assert rates.bandwidth < card.bandwidth * 1e9
        for one in rates.matmul:
            assert one.flops < 1e12 * (card.single if one.precision == "fp32" else card.half)


def test_t4_has_no_bf16_and_an_l4_has_fp8() -> None:
    assert known("t4").fast == ("fp16", "fp32", "int8")
    assert "bf16" in known("l4").fast
    assert "fp8" in known("l4").fast
    assert "fp8" not in known("a100-40g").fast


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("T4", "t4"),
        ("Tesla T4", "t4"),
        ("t4-16g", "t4"),
        ("a100-40", "a100-40g"),
        ("a100-40g", "a100-40g"),
        ("A100 40GB", "a100-40g"),
        ("a100_40gb", "a100-40g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("H100 SXM", "h100"),
        ("h100-80g", "h100"),
        ("MI300X", "mi300x"),
        ("M4 Max 64GB", "m4-max-64g"),
        ("apple m1 8g", "m1-8g"),
        ("CPU-16G", "cpu-16g"),
        ("4xA100-40G", "4xa100-40g"),
        ("8 x H100", "8xh100"),
        ("1xt4", "t4"),
    ],
)
def test_spellings(spelling: str, name: str) -> None:
    assert known(spelling).known_as == name


@given(st.sampled_from(NAMES))
def test_case_does_not_matter(name: str) -> None:
    assert known(name.upper()) == known(name)


CUDA = [device.known_as or "" for device in MACHINES if device.kind == "cuda"]


@given(st.sampled_from(CUDA), st.integers(2, 1024))
def test_several_of_a_card(name: str, count: int) -> None:
    one, many = known(name), known(f"{count}x{name}")
    assert many == known(f"{count}X{name.upper()}")
    assert (many.count, many.memory_gib, many.link, many.rates) == (count, one.memory_gib, one.link, one.rates)
    assert many.known_as == f"{count}x{name}"
    assert many.link is not None
    assert many.host_gib == (None if one.host_gib is None else count * one.host_gib)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("rtx4080", "rtx4090"), ("v100", "h100"), ("h1000", "h100"), ("m4-max-65g", "m4-max-64g"), ("2xa10", "a10g")],
)
def test_unknown_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match="no machine") as caught:
        known(name)
    assert nearest in (caught.value.remedy or "")
    assert "luthier doctor --machines" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("a100", "a100-40g, a100-80g;"),
        ("m4-max", "m4-max-36g, m4-max-48g, m4-max-64g, m4-max-128g;"),
        ("M4 Max", "m4-max-36g, m4-max-48g, m4-max-64g, m4-max-128g;"),
        ("m4", "m4-16g, m4-24g, m4-32g;"),
        ("cpu", "cpu-16g, cpu-32g, cpu-64g;"),
        ("4xa100", "a100-40g, a100-80g;"),
    ],
)
def test_name_without_its_memory(name: str, sizes: str) -> None:
    with pytest.raises(UsageError, match="several sizes") as caught:
        known(name)
    assert sizes in (caught.value.remedy or "")


@pytest.mark.parametrize("name", ["", " ", "x", "4x", "-", "nvidia", "sxm", "🙂"])
def test_name_of_nothing(name: str) -> None:
    with pytest.raises(UsageError, match="no machine"):
        known(name)


@pytest.mark.parametrize("name", ["0xt4", "1025xt4", f"{'9' * 5000}xt4"])
def test_impossible_count(name: str) -> None:
    with pytest.raises(UsageError, match="so many"):
        known(name)


@pytest.mark.parametrize("name", ["2xm4-max-64g", "2xcpu-16g"])
def test_several_that_cannot_train_together(name: str) -> None:
    with pytest.raises(UsageError, match="only CUDA"):
        known(name)


@given(st.text(max_size=40))
def test_any_text_is_a_machine_or_a_usage_error(name: str) -> None:
    try:
        device = known(name)
    except UsageError:
        return
    assert device.known_as is not None


def test_the_page_has_the_figures_of_the_tables() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for card in CARDS:
        memory = f"{card.sold_gb} GB / {card.seen_gib} GiB"
        row = f"| `{card.name}` | {memory} | {card.half:g} | {card.single:g} | {card.bandwidth:g} | {card.link:g} |"
        assert row in text
    for chip in CHIPS:
        sizes = ", ".join(map(str, chip.sold_gb))
        assert f"| `{chip.name}` | {sizes} | {chip.single:g} | {chip.bandwidth:g} | {chip.source} |" in text
    for one in PROCESSORS:
        assert f"| `{one.name}` | {one.sold_gb} GB | {one.single:g} |" in text


def test_the_page_has_the_parts_of_the_peaks() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for part in (CUDA_PART, CUDA_LIMITED, ROCM, MPS, CPU):
        parts = f"{part.half:.0%} | {part.single:.0%} | {part.forward:.0%} / {part.backward:.0%} | {part.bandwidth:.0%}"
        assert parts.replace("%", " %") in text
