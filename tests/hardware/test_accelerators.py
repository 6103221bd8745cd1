"""Devices from facts about GPUs that this machine does not have."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from luthier.hardware.accelerators import Gpu, Run, driver_version, gpu_device, link_speed, run_tool, torch_gpus
from luthier.hardware.device import GIB
from luthier.hardware.probe import describe, this_device

T4 = Gpu("cuda", "Tesla T4", 15843721216, 15843721216 - 2**28, (7, 5))
A10G = Gpu("cuda", "NVIDIA A10G", 22 * GIB, 21 * GIB, (8, 6))


def card(root: Path) -> None:
    (root / "dev").mkdir()
    (root / "dev" / "nvidia0").touch()


def answers(nvlink: str | None, pcie: str | None) -> Run:
    """What nvidia-smi would say."""

    def run(command: Sequence[str]) -> str | None:
        assert command[0] == "nvidia-smi"
        return nvlink if command[1] == "nvlink" else pcie

    return run


@pytest.mark.parametrize(
    ("capability", "fast"),
    [
        ((6, 1), ("fp32",)),
        ((7, 0), ("fp16", "fp32")),
        ((7, 5), ("fp16", "fp32", "int8")),
        ((8, 0), ("bf16", "fp16", "fp32", "int8")),
        ((8, 6), ("bf16", "fp16", "fp32", "int8")),
        ((8, 9), ("bf16", "fp16", "fp32", "fp8", "int8")),
        ((10, 0), ("bf16", "fp16", "fp32", "fp8", "int8")),
        ((12, 0), ("bf16", "fp16", "fp32", "fp8", "int8")),
    ],
)
def test_formats_by_capability(capability: tuple[int, int], fast: tuple[str, ...]) -> None:
    assert gpu_device([Gpu("cuda", "card", GIB, GIB, capability)]).fast == fast


def test_capability_of_amd_does_not_mean_nvidias() -> None:
    device = gpu_device([Gpu("rocm", "AMD Instinct MI100", 32 * GIB, 32 * GIB, (9, 0), bf16=False)])
    assert device.kind == "cuda"
    assert device.fast == ("fp16", "fp32")


def test_of_the_host_too_only_what_is_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.hardware.accelerators.free_memory", lambda _: 3 * GIB)
    monkeypatch.setattr("luthier.hardware.accelerators.own_memory", lambda: GIB)
    monkeypatch.setattr("luthier.hardware.accelerators.host_memory", lambda _: 64 * GIB)
    assert gpu_device([T4]).host_gib == 4.0


def test_memory_that_another_process_holds_is_not_free() -> None:
    held = Gpu("cuda", "Tesla T4", T4.total, 4 * GIB, (7, 5))
    device = gpu_device([held])
    assert device.memory_gib == pytest.approx(14.756, abs=1e-3)
    assert (device.free_gib, device.usable_gib) == (4, 4)


def test_own_context_is_not_another_process() -> None:
    assert gpu_device([T4]).free_gib == T4.total / GIB


def test_card_that_gives_nothing() -> None:
    assert gpu_device([Gpu("cuda", "Tesla T4", T4.total, 0, (7, 5))]).usable_gib == 0


def test_different_cards_are_not_several() -> None:
    assert gpu_device([T4, A10G, A10G]).count == 1
    assert gpu_device([A10G, T4, A10G]).count == 2
    smaller = Gpu("cuda", "NVIDIA A10G", 11 * GIB, None, (8, 6))  # a part of a card
    assert gpu_device([A10G, smaller]).count == 1


def test_doctor_asks_how_several_equal_cards_are_linked(tmp_path: Path) -> None:
    card(tmp_path)
    lanes = "GPU 0: NVIDIA A100\n" + "".join(f"\t Link {number}: 25 GB/s\n" for number in range(12))
    device = describe(tmp_path, look=lambda _: (A10G, A10G), run=answers(lanes, None)).device
    assert (device.count, device.link) == (2, 300e9)
    alone = describe(tmp_path, look=lambda _: (A10G,), run=answers(lanes, None)).device
    assert (alone.count, alone.link) == (1, None)
    planned = this_device(tmp_path, look=lambda _: (A10G, A10G))  # training is on one: nothing is asked
    assert (planned.count, planned.link) == (2, None)


def test_pcie_where_there_is_no_nvlink() -> None:
    assert link_speed(answers(None, "4, 16\n")) == pytest.approx(31.5e9, rel=1e-3)
    assert link_speed(answers("GPU 0: no links\n", "3, 8\n")) == pytest.approx(7.88e9, rel=1e-3)
    assert link_speed(answers(None, None)) is None
    assert link_speed(answers(None, "[N/A], [N/A]\n")) is None
    assert link_speed(answers(None, "99, 16\n")) is None


def test_tool_that_is_missing_or_fails() -> None:
    assert run_tool(("/nonexistent/tool",)) is None
    assert run_tool(("false",)) is None
    assert run_tool(("echo", "yes")) == "yes\n"


def test_xpu_is_shown_and_the_cpu_trains(tmp_path: Path) -> None:
    card(tmp_path)
    machine = describe(tmp_path, look=lambda _: (Gpu("xpu", "Intel Arc A770", 16 * GIB, None),))
    assert machine.device.kind == "cpu"
    assert [(one.name, one.trains) for one in machine.accelerators] == [("Intel Arc A770", False)]
    with pytest.raises(ValueError, match="XPU"):
        gpu_device([Gpu("xpu", "Intel Arc A770", 16 * GIB, None)])


def test_unified_memory() -> None:
    device = gpu_device([Gpu("mps", "Apple M4 Max GPU", 48 * GIB, 40 * GIB, None, bf16=True)])
    assert (device.kind, device.memory_gib, device.free_gib) == ("mps", 48, 40)
    assert device.fast == ("bf16", "fp16", "fp32")


def test_gpus_are_not_looked_for_without_a_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")

    def look(every: bool) -> tuple[Gpu, ...]:
        raise AssertionError("torch would have been imported")

    assert this_device(tmp_path, look=look).kind == "cpu"


def test_only_doctor_asks_every_card(tmp_path: Path) -> None:
    card(tmp_path)
    asked: list[bool] = []

    def look(every: bool) -> tuple[Gpu, ...]:
        asked.append(every)
        return (T4,)

    this_device(tmp_path, look=look)
    describe(tmp_path, look=look)
    assert asked == [False, True]


def test_driver_version(tmp_path: Path) -> None:
    assert driver_version(tmp_path) is None
    path = tmp_path / "proc" / "driver" / "nvidia" / "version"
    path.parent.mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
    path.write_text(line, encoding="utf-8")
    assert driver_version(tmp_path) == "535.104.05"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n"
    path.write_text(opened, encoding="utf-8")
    assert driver_version(tmp_path) == "570.86.15"


class Properties:
    """As torch.cuda.get_device_properties gives them."""

    def __init__(self, name: str, memory: int, major: int, minor: int) -> None:
        self.name, self.total_memory, self.major, self.minor = name, memory, major, minor


def cards(monkeypatch: pytest.MonkeyPatch, *found: Properties, hip: str | None = None) -> list[int]:
    """Let torch see these; gives the list of those that are asked for their free memory. The second one is full."""
    asked: list[int] = []

    def mem_get_info(index: int) -> tuple[int, int]:
        asked.append(index)
        if index == 1:
            raise torch.OutOfMemoryError("CUDA error: out of memory")
        return 3 * GIB, found[index].total_memory

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.version, "hip", hip)
    return asked


def test_facts_from_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    two = Properties("Tesla T4", 15 * GIB, 7, 5), Properties("NVIDIA A10G", 22 * GIB, 8, 6)
    asked = cards(monkeypatch, *two)
    first = Gpu("cuda", "Tesla T4", 15 * GIB, 3 * GIB, (7, 5))
    assert torch_gpus() == (first, Gpu("cuda", "NVIDIA A10G", 22 * GIB, None, (8, 6)))
    assert asked == [0]
    assert torch_gpus(every=True) == (first, Gpu("cuda", "NVIDIA A10G", 22 * GIB, 0, (8, 6)))


def test_rocm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cards(monkeypatch, Properties("AMD Instinct MI300X", 191 * GIB, 9, 4), hip="6.4")
    assert torch_gpus() == (Gpu("rocm", "AMD Instinct MI300X", 191 * GIB, 3 * GIB, (9, 4), bf16=True),)


@pytest.mark.parametrize(("release", "bf16"), [("13.6", False), ("14.0", True), ("26.1", True), ("", False)])
def test_mac(monkeypatch: pytest.MonkeyPatch, release: str, bf16: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 48 * GIB)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 8 * GIB)
    monkeypatch.setattr("platform.mac_ver", lambda: (release, ("", "", ""), "arm64"))
    monkeypatch.setattr("luthier.hardware.accelerators.apple_chip", lambda: "Apple M4 Max")
    assert torch_gpus() == (Gpu("mps", "Apple M4 Max GPU", 48 * GIB, 40 * GIB, None, bf16),)


def test_no_gpu_or_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.hardware.accelerators.find_spec", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_gpus() == ()
