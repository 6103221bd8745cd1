"""`luthier doctor`: what this machine has, what is missing, and the machines that a plan can be made for."""

from __future__ import annotations

import platform
import sys
from dataclasses import asdict, replace
from importlib import metadata

from rich.markup import escape

from luthier.cli import console
from luthier.cli.doctor_checks import LIBRARIES, Finding, checks, installed, kernels_line
from luthier.errors import UsageError
from luthier.hardware.accelerators import Gpu
from luthier.hardware.catalogue import MACHINES, known
from luthier.hardware.datasheets import CHIPS
from luthier.hardware.device import Device, Rates
from luthier.hardware.probe import Accelerator, Machine, describe
from luthier.runs import SCHEMA_VERSION

__all__ = ["run"]

_MARKS = {"problem": "[red]problem[/]", "warning": "[yellow]warning[/]", "note": "[cyan]note[/]"}
_LABEL = 11


def run(*, machines: bool, calibrate: bool, as_json: bool) -> None:
    """Show this machine, or with `machines` the catalogue. calibrate: measure rates first (at most 3 s)."""
    if machines and calibrate:
        raise UsageError("--machines lists other machines, --calibrate measures this one", "ask for one of them")
    if machines:
        _machines(as_json)
        return
    machine, broken = _look()
    if calibrate:
        from luthier.hardware.calibrate import calibrate as measure
        from luthier.train.timed import KernelsTimed

        with console.waiting("measuring this machine, for three seconds"):
            rates = measure(machine.device, timed=KernelsTimed(machine.device))
        machine = replace(machine, device=replace(machine.device, rates=rates))
    versions = installed()
    found = (*broken, *checks(machine, versions, sys.version_info[:3]))
    if as_json:
        console.print_json(_document(machine, versions, found))
    else:
        _show(machine, versions, found)


def _look() -> tuple[Machine, tuple[Finding, ...]]:
    """The machine; where torch is there but cannot be loaded, as if there were no sign of a GPU."""
    try:
        return describe(), ()
    except (ImportError, OSError) as error:
        said = f"torch cannot be loaded: {error}"
        found = Finding("problem", said, "pip install --force-reinstall torch")
        return replace(describe(look=_no_gpus), signs=False), (found,)


def _no_gpus(every: bool) -> tuple[Gpu, ...]:  # noqa: ARG001  (a Look)
    return ()


def _document(machine: Machine, versions: dict[str, str | None], found: tuple[Finding, ...]) -> dict[str, object]:
    described = {**asdict(machine), "disk": str(machine.disk)}
    return {
        "schema": SCHEMA_VERSION,
        "machine": described,
        "versions": {"luthier": metadata.version("luthier"), "python": platform.python_version(), **versions},
        "findings": [asdict(one) for one in found],
    }


def _line(label: str, text: str) -> None:
    """One fact; what wraps goes on under the text, not under the label."""
    from rich.table import Table
    from rich.text import Text

    row = Table.grid(padding=(0, 1))
    row.add_column(width=_LABEL)
    row.add_column(overflow="fold")
    row.add_row(Text.from_markup(label, style="bold"), Text.from_markup(text))
    console.output.print(row)


def _show(machine: Machine, versions: dict[str, str | None], found: tuple[Finding, ...]) -> None:
    device, cpu = machine.device, machine.cpu
    _line("machine", escape(machine.system))
    _line(
        "cpu",
        f"{escape(cpu.name)}, {_cores(cpu.cores)}" + (f" [dim]({' '.join(machine.flags)})[/]" if machine.flags else ""),
    )
    limit = "" if machine.limit_gib is None else f"; this container may use {machine.limit_gib:.1f} GiB"
    _line("memory", f"{machine.total_gib:.1f} GiB, {machine.free_gib:.1f} free{limit}")
    _line("disk", f"{machine.disk_gib:.1f} GiB free [dim]at {escape(str(machine.disk))}[/]")
    for index, one in enumerate(machine.accelerators):
        _line(f"card {index}", _card(one, machine.driver))
    _line("trains on", f"[bold]{escape(device.name)}[/], fast in {', '.join(device.fast)}")
    _line("kernels", escape(kernels_line(device)))
    if device.link is not None:
        _line("link", f"{device.link / 1e9:,.0f} GB/s each way between {device.count} cards")
    if device.rates is None:
        _line("rates", "not measured: [bold]luthier doctor --calibrate[/] does it in three seconds")
    else:
        _rates(device.rates)
    console.output.print()
    _versions(versions)
    _findings(found)


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def _card(one: Accelerator, driver: str | None) -> str:
    free = "" if one.free_gib is None else f", {one.free_gib:.1f} free"
    capability = "" if one.capability is None else f", capability {one.capability[0]}.{one.capability[1]}"
    by = f", driver {driver}" if driver is not None and one.platform == "cuda" else ""
    idle = "" if one.trains else ", not used"
    return f"{escape(one.name)}, {one.memory_gib:.1f} GiB{free} [dim]({one.platform}{capability}{escape(by)}{idle})[/]"


def _rates(rates: Rates) -> None:
    widest = {one.precision: one for one in rates.matmul}
    longest = {one.precision: one for one in rates.attention}
    _line("rates", f"[dim]{escape(rates.source)}[/]")
    shown = console.table("", "", *(f">{name}" for name in widest))
    shown.add_row("products, TFLOP/s", *(_tera(one.flops) for one in widest.values()))
    attention = (longest.get(name) for name in widest)
    cells = ("" if one is None else f"{_tera(one.forward)} / {_tera(one.backward)}" for one in attention)
    shown.add_row("attention, forward / backward", *cells)
    console.output.print(shown)
    memory = f"{rates.bandwidth / 1e9:,.1f} GB/s of memory, {rates.dequantize / 1e9:,.2f} billion NF4 weights a second"
    console.output.print(f"{memory}, {rates.operation * 1e6:.1f} µs an operation")


def _tera(flops: float) -> str:
    tera = flops / 1e12
    return f"{tera:,.0f}" if tera >= 100 else f"{tera:.3g}"


def _versions(versions: dict[str, str | None]) -> None:
    shown = console.table("", "library", "version", "for")
    shown.add_row("luthier", metadata.version("luthier"), "")
    shown.add_row("python", platform.python_version(), "")
    for one in LIBRARIES:
        version = versions[one.name]
        if version is not None:
            shown.add_row(one.name, escape(version), f"[dim]{one.use}[/]")
        elif one.extra is None:
            shown.add_row(one.name, "[red]missing[/]", f"[dim]{one.use}[/]")
        else:
            got = escape(f"pip install 'luthier[{one.extra}]'")
            shown.add_row(one.name, "[dim]none[/]", f"[dim]{one.use}: {got}[/]")
    console.output.print(shown)


def _findings(found: tuple[Finding, ...]) -> None:
    console.output.print()
    if not found:
        console.output.print("[green]nothing is missing[/]")
    for one in found:
        remedy = "" if one.remedy is None else f"\n[bold]try:[/] {escape(one.remedy)}"
        _line(_MARKS[one.severity], f"{escape(one.message)}{remedy}")


def _machines(as_json: bool) -> None:
    if as_json:
        console.print_json({"schema": SCHEMA_VERSION, "machines": [asdict(one) for one in MACHINES]})
        return
    shown = console.table("", "name", "device", ">GiB", "trains in", ">TFLOP/s", ">GB/s")
    rows: list[tuple[str, str, tuple[Device, ...]]] = []
    rows += [(one.known_as or "", one.name, (one,)) for one in MACHINES if one.kind == "cuda"]
    for chip in CHIPS:  # one row for all memory sizes
        sizes = tuple(known(f"{chip.name}-{size}g") for size in chip.sold_gb)
        rows.append((f"{sizes[0].known_as} …", f"{chip.title}: {' '.join(map(str, chip.sold_gb))} GB", sizes))
    rows += [(one.known_as or "", one.name, (one,)) for one in MACHINES if one.kind == "cpu"]
    for name, device, sizes in rows:
        shown.add_row(name, _short(device), *_figures(sizes))
    console.output.print(shown)
    console.say(
        "\nmemory as torch sees it, rates as training is taken to reach them (docs/hardware.md has the sources)\n"
        "use one: luthier plan recipe.yaml --hardware t4; several of a card: 4xa100-40g; a Mac by memory: m4-max-64g"
    )


def _short(name: str) -> str:
    """Without the maker, whom everyone knows."""
    for maker in ("NVIDIA GeForce ", "NVIDIA ", "AMD ", "Apple "):
        name = name.removeprefix(maker)
    return escape(name)


def _figures(devices: tuple[Device, ...]) -> tuple[str, str, str, str]:
    """Memory, precision, rate and bandwidth of machines that differ in memory only."""
    first, last, rates = devices[0], devices[-1], devices[0].rates
    memory = f"{first.memory_gib:.1f}" if len(devices) == 1 else f"{first.memory_gib:.0f}–{last.memory_gib:.0f}"
    if rates is None:
        return memory, "", "", ""
    best = max(rates.matmul, key=lambda one: one.flops)
    return memory, best.precision, _tera(best.flops), f"{rates.bandwidth / 1e9:,.0f}"
