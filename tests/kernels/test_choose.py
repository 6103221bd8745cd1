"""Which kernels a run gets, and that each way of having none that work is a sentence and never a crash."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.errors import UsageError
from luthier.hardware.compiled import VARIANTS, Compiled, compiled_kernels
from luthier.kernels import REFERENCE, choose
from luthier.kernels.check import disagreement
from luthier.kernels.choose import TORCH, Choice, kernels_for
from luthier.kernels.native import INTERFACE, Native
from luthier.runs import RunDirectory
from luthier.train.events import StepEvent, WarningEvent
from luthier.train.loop import train
from tests.kernels.libraries import file_of
from tests.train.world import Recorder, make_rows, make_settings, tiny_decoder

CPU = torch.device("cpu")
CC = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
SOURCES = Path(choose.__file__).parent / "native"
SUFFIX = EXTENSION_SUFFIXES[0]


@pytest.fixture(autouse=True)
def _no_wish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUTHIER_KERNELS", raising=False)


def only(monkeypatch: pytest.MonkeyPatch, compiled: Compiled) -> None:
    """As if this were what setup.py had left."""
    monkeypatch.setattr(choose, "compiled_kernels", lambda: compiled)


def compile_c(source: Path, to: Path) -> Path:
    """A shared library, unoptimised; skips where there is no compiler."""
    if CC is None:
        pytest.skip("no C compiler here")
    flags = ["-std=c11", "-O0", "-w", "-shared", "-fPIC", "-fopenmp"]
    subprocess.run([CC, *flags, str(source), "-o", str(to), "-lm"], check=True)
    return to


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_variant_that_runs_here_is_chosen(dtype: torch.dtype) -> None:
    compiled = compiled_kernels()
    choice = kernels_for(CPU, dtype)
    if compiled.file is None:
        assert choice.kernels is TORCH
        assert compiled.reason in choice.notice
    else:
        assert choice == Choice(choice.kernels, "")
        assert choice.kernels.name == f"native, {compiled.variant}"
        assert choice.kernels.by_hand is not None
        assert kernels_for(CPU, dtype).kernels is choice.kernels  # loaded and checked once


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_that_runs_here_passes_its_check(variant: str) -> None:
    assert disagreement(Native(file_of(variant))) is None


def test_the_environment_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    best = kernels_for(CPU, torch.float32)
    for wish, wanted in (("reference", Choice(REFERENCE)), ("torch", Choice(TORCH)), ("native", best), ("", best)):
        monkeypatch.setenv("LUTHIER_KERNELS", wish)
        assert kernels_for(CPU, torch.float32) == wanted


def test_an_unknown_wish_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_KERNELS", "fast")
    with pytest.raises(UsageError) as caught:
        kernels_for(CPU, torch.float32)
    assert "LUTHIER_KERNELS is 'fast'" in caught.value.message
    assert caught.value.remedy is not None
    assert all(name in caught.value.remedy for name in ("native", "torch", "reference", "unset it"))


def test_attention_of_a_run_that_asks_for_math_is_the_references() -> None:
    assert kernels_for(CPU, torch.float32, "math").kernels is REFERENCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_what_the_c_kernels_do_not_know_torch_does(dtype: torch.dtype) -> None:
    choice = kernels_for(CPU, dtype)
    assert choice.kernels is TORCH
    assert str(dtype).removeprefix("torch.") in choice.notice
    assert "torch's are used" in choice.notice


def test_nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = compiled_kernels(tmp_path)
    assert (compiled.file, compiled.variant) == (None, None)
    only(monkeypatch, compiled)
    choice = kernels_for(CPU, torch.bfloat16)
    assert choice.kernels is TORCH
    assert "were not compiled when luthier was installed" in choice.notice
    assert "torch's kernels are used" in choice.notice


def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"_avx2{SUFFIX}").write_text("half a download")
    compiled = compiled_kernels(tmp_path)
    assert compiled.file is None
    assert f"_avx2{SUFFIX} cannot be loaded" in compiled.reason
    only(monkeypatch, compiled)
    choice = kernels_for(CPU, torch.float32)
    assert choice.kernels is TORCH
    assert compiled.reason in choice.notice


def test_a_broken_file_does_not_hide_a_good_one(tmp_path: Path) -> None:
    (tmp_path / f"_{VARIANTS[0]}{SUFFIX}").write_text("half a download")
    shutil.copy(file_of("plain"), tmp_path)
    assert compiled_kernels(tmp_path).variant == "plain"


def test_a_library_for_another_processor_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text("int supported(void) { return 0; }")
    compile_c(tmp_path / "other.c", tmp_path / f"_avx512{SUFFIX}")
    shutil.copy(file_of("plain"), tmp_path)
    assert compiled_kernels(tmp_path).variant == "plain"
    (tmp_path / f"_plain{SUFFIX}").rename(tmp_path / "away")
    compiled_kernels.cache_clear()
    assert compiled_kernels(tmp_path).file is None


@pytest.mark.parametrize("text", ["int other(void) { return 1; }", "int supported(void) { return 1; }"])
def test_a_library_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "other.c").write_text(text)
    compile_c(tmp_path / "other.c", tmp_path / f"_plain{SUFFIX}")
    only(monkeypatch, compiled_kernels(tmp_path))
    choice = kernels_for(CPU, torch.float32)
    assert choice.kernels is TORCH
    assert f"_plain{SUFFIX} cannot be" in choice.notice
    assert "torch's kernels are used" in choice.notice


def test_a_library_of_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions may take other arguments, and a call would overwrite memory at random."""
    sources = tmp_path / "c"
    shutil.copytree(SOURCES, sources, ignore=shutil.ignore_patterns("*.so"))
    text = (sources / "kernels.c").read_text()
    assert f"{{ return {INTERFACE}; }}" in text
    (sources / "kernels.c").write_text(text.replace(f"{{ return {INTERFACE}; }}", f"{{ return {INTERFACE + 1}; }}"))
    compile_c(sources / "kernels.c", tmp_path / f"_plain{SUFFIX}")
    only(monkeypatch, compiled_kernels(tmp_path))
    choice = kernels_for(CPU, torch.float32)
    assert choice.kernels is TORCH
    assert f"_plain{SUFFIX} cannot be used (was compiled from other sources)" in choice.notice


MISTAKES = {
    "rms_norm": ("pointwise.h", "sum / (float)D + eps", "sum / (float)(D + 1) + eps"),
    "the gradient of rms_norm": ("pointwise.h", "dot * scale * scale / (float)D", "dot * scale / (float)D"),
    "swiglu": ("pointwise.h", "g / (1.0f + exponential(-g))", "g / (1.01f + exponential(-g))"),
    "the gradient of swiglu": ("pointwise.h", "silu * (1.0f - sigmoid)", "silu * sigmoid"),
    "rope": ("pointwise.h", "b * c + a * s", "b * c - a * s"),
    "attention": ("attention.h", "end = query + 1 - b->k", "end = query - b->k"),
    "the gradient of attention": ("attention.h", "p[j] * (e[j] - mean) * s->scale", "p[j] * e[j] * s->scale"),
    "cross_entropy": ("cross_entropy.h", "weight * (norm - right)", "norm - right"),
    "the gradient of cross_entropy": (
        "cross_entropy.h",
        "exponential(right - norm) - 1.0f",
        "exponential(right - norm)",
    ),
}


@pytest.mark.parametrize("kernel", list(MISTAKES))
def test_a_library_that_computes_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    """Each mistake in turn is found, and named, by the first look at a library."""
    header, right, wrong = MISTAKES[kernel]
    shutil.copytree(SOURCES, tmp_path / "c", ignore=shutil.ignore_patterns("*.so"))
    text = (tmp_path / "c" / header).read_text()
    assert text.count(right) >= 1, "the line has changed: change it here too"
    (tmp_path / "c" / header).write_text(text.replace(right, wrong))
    compile_c(tmp_path / "c" / "kernels.c", tmp_path / f"_plain{SUFFIX}")
    only(monkeypatch, compiled_kernels(tmp_path))
    choice = kernels_for(CPU, torch.float32)
    assert choice.kernels is TORCH
    assert f"_plain{SUFFIX} computes {kernel} in fp32 wrongly here" in choice.notice
    assert "torch's kernels are used; install luthier again" in choice.notice


def test_the_right_sources_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the tests above could pass with a compiler that gets everything wrong."""
    compile_c(SOURCES / "kernels.c", tmp_path / f"_plain{SUFFIX}")
    only(monkeypatch, compiled_kernels(tmp_path))
    choice = kernels_for(CPU, torch.float32)
    assert (choice.kernels.name, choice.notice) == ("native, plain", "")


def spoilt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rms_norm: Callable[[Native, Tensor, Tensor, float], Tensor]
) -> Choice:
    """The choice where one operation of the library does something else."""
    good = file_of("plain")
    copy = Path(shutil.copy(good, tmp_path))  # a name of its own: choices are remembered by file
    monkeypatch.setattr(Native, "rms_norm", rms_norm)
    only(monkeypatch, Compiled("plain", copy))
    return kernels_for(CPU, torch.float32)


def test_nan_is_no_agreement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def vanishes(ops: Native, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.full_like(x, torch.nan)

    choice = spoilt(monkeypatch, tmp_path, vanishes)
    assert choice.kernels is TORCH
    assert "computes rms_norm in fp32 wrongly here (off by nan" in choice.notice


def test_no_memory_for_the_check_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(ops: Native, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise MemoryError("attention: no memory for its scratch space")

    choice = spoilt(monkeypatch, tmp_path, fails)
    assert choice.kernels is TORCH
    assert "cannot be used (attention: no memory for its scratch space): torch's kernels are used" in choice.notice


def warnings_of(folder: Path, out: Path) -> list[str]:
    listener, settings = Recorder(), make_settings(steps=2)
    train(tiny_decoder(folder), make_rows(), settings, RunDirectory(out), base="a/model", listener=listener)
    assert len([event for event in listener.events if isinstance(event, StepEvent)]) == 2
    return [event.message for event in listener.events if isinstance(event, WarningEvent)]


def test_training_tells_the_notice(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a warning, which is shown and written down, before the first step."""
    only(monkeypatch, Compiled(None, None, "there is no library"))
    (message,) = warnings_of(tiny_llama, tmp_path)
    assert message == kernels_for(CPU, torch.float32).notice
    assert "there is no library" in message


def test_training_with_the_wanted_kernels_has_nothing_to_say(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LUTHIER_KERNELS", "reference")
    assert warnings_of(tiny_llama, tmp_path) == []
