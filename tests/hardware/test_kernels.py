"""The rule that says which kernels a run gets: for every device, without torch, and the same that training obeys."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Literal, get_args

import pytest
import torch

from luthier.errors import UsageError
from luthier.hardware.catalogue import known
from luthier.hardware.compiled import compiled_kernels
from luthier.hardware.cpu import cpu_device
from luthier.hardware.device import Device, Installed, KernelSet
from luthier.hardware.kernels import VARIABLE, cuda_lacks, installed_here, kernel_set, kernels_of, wish
from luthier.kernels.choose import kernels_for

CPU = Device("cpu", "a CPU", 16.0, 2, fast=("bf16", "fp32"), installed=Installed(compiled="avx2"))
H100 = known("h100")
NONE = Installed(compiled=None, reason="there is no library")


@pytest.mark.parametrize(
    ("device", "precision", "attention", "label"),
    [
        (CPU, "bf16", "flash", "native, avx2"),
        (CPU, "fp32", "efficient", "native, avx2"),
        (CPU, "fp32", "math", "reference"),
        (CPU, "fp16", "flash", "torch"),
        (replace(CPU, installed=NONE), "bf16", "flash", "torch"),
        (known("cpu-16g"), "fp32", "flash", "native"),
        (H100, "bf16", "flash", "cuda"),
        (H100, "fp32", "efficient", "reference"),
        (known("t4"), "fp16", "efficient", "reference"),
        (known("mi300x"), "bf16", "flash", "reference"),
        (replace(H100, installed=Installed(triton=False)), "bf16", "flash", "reference"),
        (known("m4-max-64g"), "bf16", "math", "reference"),
    ],
)
def test_the_rule(device: Device, precision: str, attention: Literal["flash", "efficient", "math"], label: str) -> None:
    assert kernels_of(device, precision, attention).label == label


def test_what_is_not_expected_is_said() -> None:
    assert "there is no library" in kernels_of(replace(CPU, installed=NONE), "bf16", "flash").notice
    assert "know bf16 and fp16, not fp32" in kernels_of(H100, "fp32", "flash").notice
    assert "not fp16 on cpu" in kernels_of(CPU, "fp16", "flash").notice
    assert kernels_of(CPU, "bf16", "flash").notice == ""


@pytest.mark.parametrize("wanted", get_args(KernelSet))
def test_the_environment_is_asked_first(wanted: KernelSet) -> None:
    choice = kernels_of(replace(CPU, installed=replace(CPU.installed, wish=wanted)), "bf16", "flash")
    assert choice.name == ("torch" if wanted == "cuda" else wanted)
    assert ("need an NVIDIA card" in choice.notice) == (wanted == "cuda")
    assert kernel_set("cuda", "bf16", "flash", wanted, None).name == ("torch" if wanted == "native" else wanted)


def test_a_wish_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wish({}) is None
    assert wish({VARIABLE: ""}) is None
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(UsageError, match="LUTHIER_KERNELS is 'fast'") as caught:
        installed_here()
    assert "native, cuda, torch, reference" in str(caught.value.remedy)


def test_cards_and_what_they_lack() -> None:
    assert cuda_lacks("bf16", (8, 0), rocm=False, triton=True) == ""
    assert "compute capability 8.0, and this card has 7.5" in cuda_lacks("fp16", (7, 5), rocm=False, triton=True)
    assert "NVIDIA's" in cuda_lacks("bf16", (9, 4), rocm=True, triton=True)
    assert "triton" in cuda_lacks("bf16", (9, 0), rocm=False, triton=False)


@pytest.mark.parametrize("wanted", ["", "reference", "torch", "native"])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_gets_what_the_plan_says(precision: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, wanted)
    device = replace(cpu_device(), installed=installed_here())
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    for attention in ("flash", "math"):
        planned = kernels_of(device, precision, attention)  # type: ignore[arg-type]
        choice = kernels_for(torch.device("cpu"), dtype, attention)  # type: ignore[arg-type]
        assert (choice.kernels.name, choice.notice) == (planned.label, planned.notice)


@pytest.mark.skipif(compiled_kernels().file is None, reason="no C kernels here")
@pytest.mark.skipif(sys.platform != "linux", reason="what a process has mapped is read from /proc")
def test_looking_leaves_no_library_behind() -> None:
    """The system's OpenMP, once in the process, would be torch's too."""
    code = (
        "from luthier.hardware.compiled import compiled_kernels\nassert compiled_kernels().file is not None\n"
        "import sys\nassert 'torch' not in sys.modules\nmaps = open('/proc/self/maps').read()\n"
        "print('libgomp' in maps, '/native/' in maps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
