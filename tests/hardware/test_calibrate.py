"""Calibration: what is measured is sane, kept for this machine only, and found again without torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import get_args

import pytest

from luthier.errors import UsageError
from luthier.hardware.calibrate import calibrate, estimate_rates, kernels_timed, stored_rates
from luthier.hardware.cpu import cpu_device
from luthier.hardware.device import Device, DeviceKind, Precision, Rates
from luthier.hardware.kernels import installed_here
from luthier.hardware.measure import measure
from luthier.hardware.timed import TorchTimed
from luthier.train.timed import KernelsTimed

CPU = Device("cpu", "a test's CPU", 8.0, 2, fast=("bf16", "fp32"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Device, Rates]:
    """A real calibration of this machine, made once: the cache it lies in, the device, the rates."""
    cache = tmp_path_factory.mktemp("rates")
    device = replace(cpu_device(), installed=installed_here())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_CACHE", str(cache))
        return cache, device, calibrate(device, time.process_time, KernelsTimed(device))


@pytest.fixture
def cache(kept: tuple[Path, Device, Rates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that cache, to be spoiled."""
    (file,) = (kept[0] / "rates").iterdir()
    (tmp_path / "rates").mkdir()
    (tmp_path / "rates" / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    return tmp_path / "rates" / file.name


def figures(rates: Rates) -> list[float]:
    """Every rate."""
    found = [one.flops for one in rates.matmul] + [rates.bandwidth, rates.dequantize, rates.operation]
    found += [flops for one in rates.attention for flops in (one.forward, one.backward)]
    return found if rates.fresh is None else [*found, rates.fresh]


def test_this_machine_is_measured(kept: tuple[Path, Device, Rates]) -> None:
    _, device, rates = kept
    assert all(0 < figure < math.inf for figure in figures(rates))
    assert {one.precision for one in rates.matmul} == {one for one in device.fast if one in get_args(Precision)}
    widths = [one.width for one in rates.matmul if one.precision == "fp32"]
    assert widths == sorted(widths)
    assert widths[0] == 16
    assert len(widths) >= 3
    # Between a pocket calculator and any CPU there is: 0.1 GFLOP/s to 100 TFLOP/s, an operation 0.1 µs to 10 ms.
    assert all(1e8 < one.flops < 1e14 for one in rates.matmul)
    assert 1e-7 < rates.operation < 1e-2
    assert rates.source.startswith("measured on this machine")


def test_long_documents_are_not_measured_slower_than_short_ones(kept: tuple[Path, Device, Rates]) -> None:
    lengths = [one for one in kept[2].attention if one.precision == "fp32"]
    assert [one.length for one in lengths] == sorted(one.length for one in lengths)
    assert lengths[-1].forward > 0.5 * lengths[0].forward  # half: other programs run beside the tests


class Clock:
    """Every reading is `tick` seconds after the one before: an operation takes as long, however fast this machine."""

    def __init__(self, tick: float) -> None:
        self.tick, self.seconds, self.readings = tick, 0.0, 0

    def __call__(self) -> float:
        self.readings += 1
        self.seconds += self.tick
        return self.seconds


@pytest.mark.parametrize("tick", [0.01, 0.025])
def test_measuring_takes_three_seconds_at_most(tick: float) -> None:
    clock = Clock(tick)
    measure(CPU, clock)
    assert clock.seconds <= 3.3


def test_once_three_seconds_are_over_nothing_is_repeated() -> None:
    """On a machine so slow that one operation takes all of them: a start, a before and an after for each."""
    clock = Clock(3.0)
    rates = measure(CPU, clock)
    measured = len(rates.matmul) + 2 * len(rates.attention) + 5  # chain, NF4, an operation, two of fresh blocks
    assert clock.readings == 1 + 3 * measured


def test_what_was_measured_is_found_again(kept: tuple[Path, Device, Rates], cache: Path) -> None:
    assert stored_rates(kept[1]) == kept[2]


def test_rates_of_other_kernels_count_as_absent(
    kept: tuple[Path, Device, Rates], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kept[2].kernels == kernels_timed(kept[1])
    change(cache, "kernels", "reference")
    assert stored_rates(kept[1]) is None


def test_without_the_kernels_torchs_own_operations_are_timed() -> None:
    rates = measure(CPU, Clock(0.01))
    assert rates.kernels == TorchTimed("cpu").kernels == "reference"


def test_finding_it_imports_no_torch(cache: Path) -> None:
    code = (
        "import sys\nfrom luthier.hardware.calibrate import stored_rates\n"
        "from luthier.hardware.probe import this_device\n"
        "print(stored_rates(this_device()) is not None, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_nothing_measured_is_nothing_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "none"))
    assert stored_rates(CPU) is None
    assert not (tmp_path / "none").exists()


def test_rates_belong_to_one_machine_and_one_torch(
    kept: tuple[Path, Device, Rates], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = kept[1]
    assert stored_rates(replace(device, name="another")) is None
    assert stored_rates(replace(device, cores=device.cores + 1)) is None
    assert stored_rates(replace(device, installed=replace(device.installed, wish="reference"))) is None
    with monkeypatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "63")
        assert stored_rates(device) is None
    real = metadata.version
    other: Callable[[str], str] = lambda name: "0.1" if name == "torch" else real(name)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(metadata, "version", other)
        assert stored_rates(device) is None
    assert stored_rates(device) is not None


def change(path: Path, name: str, value: object) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    document["rates"][name] = value
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bandwidth", 0),
        ("bandwidth", -1.0),
        ("bandwidth", "fast"),
        ("bandwidth", None),
        ("operation", True),
        ("matmul", []),
        ("matmul", {}),
        ("matmul", [{"precision": "bf16", "width": 16}]),
        ("matmul", [{"precision": "bf17", "width": 16, "flops": 1.0}]),
        ("matmul", [{"precision": "bf16", "width": 0, "flops": 1.0}]),
        ("attention", [["bf16", 1.0]]),
        ("fresh", "x"),
    ],
)
def test_a_rate_that_is_none_counts_as_absent(
    kept: tuple[Path, Device, Rates], cache: Path, name: str, value: object
) -> None:
    change(cache, name, value)
    assert stored_rates(kept[1]) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 1}', b'{"schema": 1, "machine": {}, "rates": []}']
)
def test_a_broken_file_counts_as_absent(kept: tuple[Path, Device, Rates], cache: Path, content: bytes) -> None:
    cache.write_bytes(content)
    assert stored_rates(kept[1]) is None


def test_a_file_of_another_machine_under_this_name_counts_as_absent(
    kept: tuple[Path, Device, Rates], cache: Path
) -> None:
    document = json.loads(cache.read_text(encoding="utf-8"))
    document["machine"]["device"] = "another"
    cache.write_text(json.dumps(document), encoding="utf-8")
    assert stored_rates(kept[1]) is None


def test_a_cache_that_cannot_be_written_is_said(
    kept: tuple[Path, Device, Rates], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("LUTHIER_CACHE", str(blocked))
    monkeypatch.setattr("luthier.hardware.measure.measure", lambda *_: kept[2])
    with pytest.raises(UsageError, match=r"cannot be kept in .*file") as caught:
        calibrate(kept[1])
    assert "LUTHIER_CACHE" in str(caught.value.remedy)


@pytest.mark.parametrize("kind", get_args(DeviceKind))
@pytest.mark.parametrize("capability", [None, (6, 1), (7, 5), (8, 6), (9, 0), (12, 0)])
def test_every_machine_has_an_estimate(kind: DeviceKind, capability: tuple[int, int] | None) -> None:
    rates = estimate_rates(Device(kind, "x", 8.0, 4, capability, ("bf16", "fp16", "fp32", "fp8")))
    assert all(0 < figure < math.inf for figure in figures(rates))
    assert "luthier doctor --calibrate" in rates.source
    assert {"fp32", "bf16"} <= {one.precision for one in rates.matmul}


def test_more_cores_are_estimated_faster() -> None:
    two, eight = (estimate_rates(replace(CPU, cores=cores)) for cores in (2, 8))
    assert all(a.flops < b.flops for a, b in zip(two.matmul, eight.matmul, strict=True))
    assert two.bandwidth < eight.bandwidth
