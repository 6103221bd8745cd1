"""The probe, on this machine and on the files of machines we do not sit at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from luthier.hardware.accelerators import accelerator_signs, intel_signs
from luthier.hardware.cgroups import cgroup_cores, cgroup_free, cgroup_memory
from luthier.hardware.cpu import cpu_device, cpu_flags, free_memory, own_memory
from luthier.hardware.device import GIB
from luthier.hardware.probe import describe, free_disk, this_device


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def cpuinfo(cores: list[tuple[int, int]], flags: str, key: str = "flags") -> str:
    """One block for each logical processor: (socket, core)."""
    return "".join(
        f"processor\t: {number}\nmodel name\t: Test CPU: 3 GHz\n{key}\t: fpu {flags}\nphysical id\t: {socket}\n"
        f"core id\t: {core}\n\n"
        for number, (socket, core) in enumerate(cores)
    )


def test_this_machine() -> None:
    device = this_device()
    assert device.memory_gib > 0
    assert 1 <= device.cores <= (os.cpu_count() or 1)
    assert "fp32" in device.fast
    if device.kind == "cpu":
        assert device.memory_gib * GIB <= psutil.virtual_memory().total
        assert device.capability is None


def test_no_torch_without_a_sign_of_an_accelerator() -> None:
    if accelerator_signs(Path("/")):
        pytest.skip("this machine has an accelerator's driver")
    code = "import sys; from luthier.hardware.probe import this_device; this_device(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("flags", "key", "fast"),
    [
        ("avx2 avx512f", "flags", ("fp32",)),
        ("avx512_bf16", "flags", ("bf16", "fp32")),
        ("avx512_bf16 avx512_vnni", "flags", ("bf16", "fp32", "int8")),
        ("amx_int8", "flags", ("fp32", "int8")),
        ("asimd bf16 i8mm", "Features", ("bf16", "fp32", "int8")),
        ("amx_bf16 amx_tile", "flags", ("bf16", "fp32")),
        ("asimd bf16", "Features", ("bf16", "fp32")),
        ("asimd", "Features", ("fp32",)),
        ("avx512_bf16x", "flags", ("fp32",)),
    ],
)
def test_cpu_flags(tmp_path: Path, flags: str, key: str, fast: tuple[str, ...]) -> None:
    write(tmp_path, "proc/cpuinfo", cpuinfo([(0, 0)], flags, key))
    device = cpu_device(tmp_path)
    assert device.fast == fast
    assert device.name == "Test CPU: 3 GHz"


def test_hyperthreads_and_sockets_are_physical_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two sockets of two cores of two threads; processor n and n + 4 share a core.
    places = [(0, 0), (0, 1), (1, 0), (1, 1)] * 2
    write(tmp_path, "proc/cpuinfo", cpuinfo(places, ""))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert cpu_device(tmp_path).cores == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 5}, raising=False)  # one core twice, half of another
    assert cpu_device(tmp_path).cores == 2
    write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000\n")  # half a core is one core, not none
    assert cpu_device(tmp_path).cores == 1


def test_cgroup_v2_takes_the_least_of_all_ancestors(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", f"{3 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{5 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/a/cpu.max", "150000 100000\n")
    write(tmp_path, "sys/fs/cgroup/a/b/cpu.max", "max 100000\n")
    assert cgroup_memory(tmp_path) == 3 * GIB
    assert cgroup_cores(tmp_path) == 1.5
    least = min(3 * GIB, psutil.virtual_memory().total)
    assert cpu_device(tmp_path).memory_gib == least / GIB


def test_cgroup_v1(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/x\n2:cpu,cpuacct:/x\n0::/\n")
    write(tmp_path, "sys/fs/cgroup/memory/x/memory.limit_in_bytes", f"{2 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")  # how v1 writes "none"
    write(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us", "-1\n")
    write(tmp_path, "sys/fs/cgroup/cpu/x/cpu.cfs_period_us", "100000\n")
    assert cgroup_memory(tmp_path) == 2 * GIB
    assert cgroup_cores(tmp_path) is None
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "400000\n")
    write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cgroup_cores(tmp_path) == 4.0


def test_container_that_sees_only_its_own_group(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/docker/abc\n")  # the host's path, not mounted in here
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{GIB}\n")
    assert cgroup_memory(tmp_path) == GIB


def test_machine_without_proc(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path) is None
    assert cpu_device(tmp_path).cores >= 1


@pytest.mark.parametrize("name", ["nvidiactl", "nvidia0", "dxg", "kfd"])
def test_signs_of_an_accelerator(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert not accelerator_signs(tmp_path)
    write(tmp_path, f"dev/{name}", "")
    assert accelerator_signs(tmp_path)


def test_flags_that_matter_are_named(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", cpuinfo([(0, 0)], "sse4_2 amx_bf16 avx2"))
    assert cpu_flags(tmp_path) == ("avx2", "amx_bf16")


@pytest.fixture
def big_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 GiB, 50 of them to be had, and nothing held by this process."""

    class Memory:
        total, available = 64 * GIB, 50 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr("luthier.hardware.cpu.own_memory", lambda: 0)


@pytest.mark.usefixtures("big_host")
def test_free_memory_is_not_all_memory(tmp_path: Path) -> None:
    device = cpu_device(tmp_path)
    assert (device.memory_gib, device.free_gib, device.usable_gib) == (64, 50, 50)


@pytest.mark.usefixtures("big_host")
def test_what_this_process_holds_is_not_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.hardware.cpu.own_memory", lambda: 2 * GIB)
    assert cpu_device(tmp_path).free_gib == 52
    monkeypatch.setattr("luthier.hardware.cpu.own_memory", lambda: 20 * GIB)
    assert cpu_device(tmp_path).free_gib == 64


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere shared memory is not told apart")
def test_own_memory_grows_with_what_is_allocated() -> None:
    before = own_memory()
    block = bytearray(b"x") * 2**27
    assert own_memory() - before > 0.9 * len(block)


@pytest.mark.usefixtures("big_host")
def test_container_with_less_than_the_host(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/box\n")
    write(tmp_path, "sys/fs/cgroup/box/memory.max", f"{8 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/box/memory.current", f"{5 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/box/memory.stat", f"anon {3 * GIB}\ninactive_file {GIB}\nactive_file {GIB}\n")
    device = cpu_device(tmp_path)
    assert (device.memory_gib, device.host_gib) == (8, 8)
    assert device.free_gib == 5  # 8 less what programs hold; the page cache is given back
    machine = describe(tmp_path, look=lambda _: ())
    assert (machine.total_gib, machine.limit_gib, machine.free_gib) == (64, 8, 5)


@pytest.mark.usefixtures("big_host")
def test_container_with_more_than_the_host_is_no_limit(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{100 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", f"{GIB}\n")
    assert describe(tmp_path, look=lambda _: ()).limit_gib is None
    assert free_memory(tmp_path) == 50 * GIB


def test_fullest_of_all_ancestors_counts(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.max", f"{4 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/a/b/memory.current", f"{GIB}\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.max", f"{10 * GIB}\n")
    write(tmp_path, "sys/fs/cgroup/a/memory.current", f"{9 * GIB}\n")  # a sibling of b's holds the rest
    assert (cgroup_memory(tmp_path), cgroup_free(tmp_path)) == (4 * GIB, GIB)
    write(tmp_path, "sys/fs/cgroup/a/memory.current", f"{11 * GIB}\n")  # over its limit for a moment
    assert cgroup_free(tmp_path) == 0


def test_free_of_cgroup_v1_takes_the_totals(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/cgroup", "4:memory:/x\n")
    folder = "sys/fs/cgroup/memory/x"
    write(tmp_path, f"{folder}/memory.limit_in_bytes", f"{6 * GIB}\n")
    write(tmp_path, f"{folder}/memory.usage_in_bytes", f"{5 * GIB}\n")
    stat = f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file {2 * GIB}\n"
    write(tmp_path, f"{folder}/memory.stat", stat)
    assert cgroup_free(tmp_path) == 4 * GIB


def test_limit_without_usage_is_all_free(tmp_path: Path) -> None:
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{GIB}\n")
    assert cgroup_free(tmp_path) == GIB
    assert cgroup_free(tmp_path / "elsewhere") is None


def test_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "runs" / "new") == pytest.approx(free_disk(tmp_path), abs=1)
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert describe(folder=tmp_path / "file" / "x").disk == tmp_path


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 0

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    assert this_device(tmp_path, look=lambda _: ()).disk_gib == 0


def test_intel_gpu_is_seen(tmp_path: Path) -> None:
    assert not intel_signs(tmp_path)
    write(tmp_path, "sys/class/drm/renderD128/device/vendor", "0x1002\n")
    assert not intel_signs(tmp_path)
    write(tmp_path, "sys/class/drm/renderD129/device/vendor", "0x8086\n")
    assert intel_signs(tmp_path)
