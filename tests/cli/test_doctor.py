"""`luthier doctor`: what it shows, as text and as JSON, and what it finds on machines that are not this one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from luthier.cli import doctor
from luthier.cli.doctor_checks import LIBRARIES, Finding, checks, installed, kernels_line
from luthier.hardware.calibrate import kernels_timed
from luthier.hardware.catalogue import MACHINES
from luthier.hardware.device import Device, Installed, Rates
from luthier.hardware.probe import Accelerator, Machine
from luthier.hardware.timed import Timed

from .command import Command

CPU = Device("cpu", "Test CPU", 60.0, 8, free_gib=50.0, host_gib=60.0, disk_gib=200.0)
SOUND = Machine("Linux 6, x86_64", CPU, CPU, ("avx2",), 64.0, 50.0, None, Path("/runs"), 200.0, (), None, False)
T4 = Accelerator("cuda", "Tesla T4", 14.7, 14.6, (7, 5), True)
ALL = {one.name: "9.9" for one in LIBRARIES}


def found(machine: Machine, versions: dict[str, str | None] | None = None, **others: str) -> tuple[Finding, ...]:
    return checks(machine, {**ALL, **others} if versions is None else versions, (3, 12, 1), {"torch": "2.9"})


@pytest.fixture
def luthier(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    return Command(monkeypatch, capfd)


def test_shows_this_machine(luthier: Command) -> None:
    ended = luthier("doctor")
    assert ended.code == 0
    for word in ("machine", "memory", "disk", "trains on", "python", "torch", "bitsandbytes", "--calibrate"):
        assert word in ended.out


def test_json(luthier: Command) -> None:
    ended = luthier("doctor", "--json")
    assert ended.code == 0
    document = orjson.loads(ended.out)
    assert document["schema"] == 1
    assert document["machine"]["device"]["memory_gib"] > 0
    assert document["versions"]["torch"] == installed()["torch"]
    assert isinstance(document["findings"], list)


def test_machines(luthier: Command) -> None:
    ended = luthier("doctor", "--machines")
    assert ended.code == 0
    for word in ("t4", "a100-40g", "m4-max-36g", "36 48 64 128 GB", "cpu-bf16-64g"):
        assert word in ended.out
    document = orjson.loads(luthier("doctor", "--machines", "--json").out)
    assert [one["known_as"] for one in document["machines"]] == [device.known_as for device in MACHINES]


def test_calibrate_measures_and_keeps(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = MACHINES[-1].rates
    assert rates is not None

    def measure(device: Device, timed: Timed) -> Rates:
        assert timed.kernels == kernels_timed(device)
        assert device.disk_gib is not None
        return replace(rates, source="measured by a test")

    monkeypatch.setattr("luthier.hardware.calibrate.calibrate", measure)
    ended = luthier("doctor", "--calibrate")
    assert ended.code == 0
    assert "measured by a test" in ended.out
    assert "TFLOP/s" in ended.out


def test_machines_are_not_measured(luthier: Command) -> None:
    ended = luthier("doctor", "--machines", "--calibrate")
    assert ended.code == 2
    assert ended.out == ""


def test_unknown_hardware_ends_with_2_and_the_nearest_names(luthier: Command, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: sprig\ndata: pirate\n", encoding="utf-8")
    ended = luthier("plan", recipe, "--hardware", "rtx4080")
    assert ended.code == 2
    assert "rtx4090" in ended.message
    assert "luthier doctor --machines" in ended.message
    assert "Traceback" not in ended.err


def test_torch_that_cannot_be_loaded(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**others: object) -> Machine:
        if not others:
            raise ImportError("libcudart.so.12: cannot open shared object file")
        return SOUND

    monkeypatch.setattr(doctor, "describe", broken)
    ended = luthier("doctor")
    assert ended.code == 0
    assert "libcudart.so.12" in " ".join(ended.out.split())


def test_no_heavy_library_is_imported_on_a_plain_cpu() -> None:
    code = (
        "import sys; from luthier.hardware import accelerators as a; from pathlib import Path\n"
        "if a.accelerator_signs(Path('/')) or a.intel_signs(Path('/')): sys.exit(0)\n"
        "from luthier.cli import doctor; doctor.run(machines=False, calibrate=False, as_json=True)\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_to_say_of_a_sound_machine() -> None:
    assert found(SOUND) == ()
    assert found(replace(SOUND, driver="535.1", accelerators=(T4,))) == ()


def only(findings: tuple[Finding, ...]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def test_missing_library() -> None:
    finding = only(found(SOUND, {**ALL, "bitsandbytes": None}))
    assert finding.severity == "problem"
    assert "nf4" in finding.message
    assert finding.remedy == "pip install bitsandbytes"
    assert found(SOUND, {**ALL, "llama-cpp-python": None}) == ()  # an extra
    assert only(found(SOUND, {**ALL, "torch": None})).remedy == "pip install 'torch>=2.9'"


@pytest.mark.parametrize(
    ("version", "old"),
    [("2.8.1", True), ("2.9", False), ("2.9.0+cu128", False), ("2.10.0", False), ("1.99", True), ("2.9.0a0", False)],
)
def test_library_that_is_too_old(version: str, old: bool) -> None:
    findings = found(SOUND, torch=version)
    assert (len(findings) == 1) == old
    if old:
        assert only(findings).remedy == "pip install --upgrade 'torch>=2.9'"


def test_old_python() -> None:
    finding = only(checks(SOUND, ALL, (3, 9, 7), {}))
    assert (finding.severity, "3.9.7" in finding.message) == ("problem", True)


def test_card_that_a_cpu_build_cannot_use() -> None:
    finding = only(found(replace(SOUND, driver="535.104.05", signs=True), torch="2.9.1+cpu"))
    assert finding.severity == "problem"
    assert "build for the CPU" in finding.message
    assert "535.104.05" in finding.message
    assert "pip uninstall torch" in (finding.remedy or "")


def test_card_that_torch_does_not_find() -> None:
    assert "finds no card" in only(found(replace(SOUND, driver="450.1", signs=True), torch="2.9.1+cu128")).message


def test_signs_of_a_gpu_that_torch_does_not_find() -> None:
    finding = only(found(replace(SOUND, signs=True)))
    assert (finding.severity, "signs of a GPU" in finding.message) == ("warning", True)


@pytest.mark.parametrize(("free", "severity"), [(14.0, None), (12.0, "note"), (4.0, "warning"), (0.0, "warning")])
def test_card_taken_by_another_process(free: float, severity: str | None) -> None:
    findings = found(replace(SOUND, driver="535.1", accelerators=(replace(T4, free_gib=free),)))
    assert [one.severity for one in findings] == ([] if severity is None else [severity])
    assert all("nvidia-smi" in (one.remedy or "") for one in findings)


def test_different_cards() -> None:
    other = replace(T4, name="NVIDIA A10G")
    assert "different cards" in only(found(replace(SOUND, driver="1", accelerators=(T4, other)))).message


def test_cards_that_nothing_trained_on() -> None:
    amd = Accelerator("rocm", "AMD Instinct MI300X", 191.5, 191.0, (9, 4), True)
    assert "nobody has trained" in only(found(replace(SOUND, accelerators=(amd,)))).message
    arc = Accelerator("xpu", "Intel Arc A770", 16.0, None, None, False)
    assert "nothing trains" in only(found(replace(SOUND, accelerators=(arc,)))).message


def test_container_well_below_the_host() -> None:
    cpu = replace(CPU, memory_gib=8.0)
    finding = only(found(replace(SOUND, cpu=cpu, limit_gib=8.0, free_gib=7.0)))
    assert "8.0 GiB of the host's 64.0" in finding.message
    assert found(replace(SOUND, limit_gib=60.0)) == ()


def test_memory_that_others_hold() -> None:
    assert "only 3.0" in only(found(replace(SOUND, free_gib=3.0))).message


@pytest.mark.parametrize(("free", "severity"), [(0.0, "problem"), (0.4, "problem"), (3.0, "warning"), (11.0, None)])
def test_little_disk(free: float, severity: str | None) -> None:
    findings = found(replace(SOUND, disk_gib=free))
    assert [one.severity for one in findings] == ([] if severity is None else [severity])


def test_the_worst_comes_first() -> None:
    sick = replace(SOUND, disk_gib=0.0, limit_gib=8.0, free_gib=3.0)
    assert [one.severity for one in found(sick)] == ["problem", "warning", "note"]


def test_every_finding_says_what_to_do() -> None:
    sick = replace(SOUND, disk_gib=0.0, limit_gib=8.0, free_gib=3.0, driver="1", signs=True)
    assert all(one.remedy for one in found(sick, dict.fromkeys(ALL)))


def test_kernels_are_told_and_how_to_get_them() -> None:
    sound = replace(SOUND, device=replace(CPU, installed=Installed(compiled="avx2")))
    assert kernels_line(sound.device) == "native, avx2"
    none = replace(CPU, installed=Installed(compiled=None, reason="there is no library"))
    assert kernels_line(none) == "torch: there is no library"
    (found,) = (one for one in checks(replace(SOUND, device=none), {}, (3, 12), {}) if "more slowly" in one.message)
    assert found.severity == "warning"
    assert "C compiler" in str(found.remedy)
    assert not [one for one in checks(sound, {}, (3, 12), {}) if "more slowly" in one.message]
    assert kernels_line(replace(CPU, installed=Installed(compiled="avx2", wish="reference"))) == (
        "reference, as LUTHIER_KERNELS says"
    )
