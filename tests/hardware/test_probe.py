"""The probe, on this machine and on the files of machines we do not sit at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from luthier.hardware.device import GIB
from luthier.hardware.probe import accelerator_signs, cgroup_cores, cgroup_memory, cpu_device, this_device


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
