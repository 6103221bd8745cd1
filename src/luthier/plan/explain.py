"""The plan as a readable argument: a bar of the memory, the time, and a table of what was decided and why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from luthier.hardware.device import GIB
from luthier.plan.decision import YOURS, Decision
from luthier.plan.footprint import Part, Phase
from luthier.plan.plan import Plan
from luthier.plan.show import amount, duration, gib

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["memory_lines", "plan_table", "shown_value", "summary", "time_lines"]

_VALUE_WIDTH = 18
_GLYPHS = "█▓▒░▚▞▤▥"
_COLOURS = ("blue", "cyan", "green", "yellow", "magenta", "red", "white", "bright_black")
_KINDS = len(_GLYPHS)
_USUAL = (
    *("train_on", "prompt_loss_weight", "long_rows", "adapter.dropout", "adapter.scale", "seed"),
    *("train.longest_first", "train.schedule", "train.weight_decay", "train.clip", "train.compile", "train.workers"),
    *("train.keep", "train.on_nonfinite", "train.stop_file"),
)
"""What the short table only names, where the user did not set it."""


def shown_value(value: object) -> str:
    """A value as people write it in a recipe."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        names = [str(item).removesuffix("_proj") for item in value]
        return "all-linear" if names == ["q", "k", "v", "o", "gate", "up", "down"] else ", ".join(names)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _short(text: str) -> str:
    """Without the bibliography in brackets, which `plan --json` and plan.json have."""
    return re.sub(r" \([^)]*(arXiv|doi)[^)]*\)", "", text)


def summary(plan: Plan) -> str:
    """What is trained, on what: one line."""
    share = plan.trainable_parameters / plan.total_parameters
    percent = f"{share:.2%}" if share < 0.1 else f"{share:.0%}"
    where = plan.device.name if plan.devices == 1 else f"{plan.devices} × {plan.device.name}"
    return f"{plan.trainable_parameters:,} of {plan.total_parameters:,} parameters ({percent}) are trained on {where}"


def _shown_parts(phase: Phase) -> list[Part]:
    """Largest first; of many, the smallest together."""
    parts = sorted((part for part in phase.parts if part.bytes), key=lambda part: -part.bytes)
    if len(parts) <= _KINDS:
        return parts
    rest = sum(part.bytes for part in parts[_KINDS - 1 :])
    return [*parts[: _KINDS - 1], Part("other", rest)]


def _cells(sizes: Sequence[int], total: float, width: int) -> list[int]:
    """Cells of a bar for each size, so that every boundary is right to half a cell."""
    ends, filled = [0], 0
    for size in sizes:
        filled += size
        ends.append(round(width * filled / total))
    return [after - before for before, after in pairwise(ends)]


def memory_lines(plan: Plan, width: int) -> list[Text]:
    """The fullest moment as a bar scaled to the device's memory, a line where the margin begins; what each part takes;
    the peak of every phase. No line is wider than `width` but for words that cannot be broken."""
    from rich.text import Text

    device, peak = plan.device, plan.memory.peak
    each = "each device: " if plan.devices > 1 else ""
    limit = device.usable_gib * (1 - plan.margin)
    lines = [
        Text.assemble(
            ("memory  ", "bold"),
            f"{each}{amount(peak.bytes)} at the fullest (in {_phase_name(peak)}), of {gib(device.memory_gib)}",
        )
    ]
    parts, total = _shown_parts(peak), device.memory_gib * GIB
    taken = round(max(0.0, device.memory_gib - device.usable_gib) * GIB)
    cells = _cells([taken, *(part.bytes for part in parts)], total, width - 2)
    bar = Text("/" * cells[0], style="dim")
    for kind, count in enumerate(cells[1:]):
        bar.append(_GLYPHS[kind] * count, style=_COLOURS[kind])
    bar.append("·" * max(0, width - 2 - len(bar)), style="dim")
    mark = min(width - 3, round((width - 2) * (taken + limit * GIB) / total))
    bar = bar[:mark] + Text("│", style="bold") + bar[mark + 1 :]
    lines.append(Text("[") + bar + Text("]"))
    items = [Text.assemble((_GLYPHS[k] * 2, _COLOURS[k]), f" {p.name} {amount(p.bytes)}") for k, p in enumerate(parts)]
    if cells[0]:
        items.append(Text.assemble(("//", "dim"), f" other programs {amount(taken)}"))
    items.append(Text.assemble(("│", "bold"), f" {plan.margin:.0%} stays free"))
    lines += _flowed(items, width)
    phases = [*plan.memory.phases, plan.memory.host, plan.memory.disk]
    peaks = [Text(f"{_phase_name(one)} {amount(one.bytes)}", style="dim") for one in phases if one.bytes]
    return [*lines, *_flowed(peaks, width, " · ")]


def _phase_name(phase: Phase) -> str:
    names = {"load": "loading", "train": "training", "evaluate": "evaluation", "host": "host memory", "disk": "disk"}
    return names.get(phase.name, phase.name)


def _flowed(items: Sequence[Text], width: int, between: str = "  ") -> list[Text]:
    """Items side by side, as many as a line takes."""
    from rich.text import Text

    lines, line = [], Text()
    for item in items:
        if len(line) and len(line) + len(between) + len(item) > width - 2:
            lines.append(Text("  ") + line)
            line = Text()
        line = line + Text(between) + item if len(line) else item
    return [*lines, Text("  ") + line]


def time_lines(plan: Plan, width: int) -> list[Text]:
    """The whole run, each step, the speed, the cost, and whose rates they rest on."""
    from rich.text import Text

    time = plan.time
    lines = [Text.assemble(("time    ", "bold"), f"{duration(time.total_seconds)} in all")]
    items = [f"{time.steps:,} steps of {duration(time.step_seconds)}"]
    if time.evaluations:
        items.append(f"{time.evaluations} evaluations, {duration(time.evaluation_seconds)} together")
    items.append(f"{time.tokens_per_second:,.0f} tokens a second")
    if time.cost is not None:
        cost = f"{time.cost:,.2f}" if time.cost >= 1 else f"{time.cost:.2g}"
        items.append(f"costs {cost} at {time.price_per_hour:g} an hour")
    return [
        *lines,
        *_flowed([Text(item) for item in items], width, " · "),
        Text(f"  rates: {time.source}", style="dim"),
    ]


def _is_usual(one: Decision[object]) -> bool:
    return one.setting in _USUAL and not one.source.startswith(YOURS)


def _first(one: Decision[object]) -> str:
    """The first sentence; of what the user set, also the one that questions it."""
    sentences = re.split(r"(?<=[.]) (?=[A-Z0-9])", one.reason)
    return " ".join(sentences[: 2 if one.source.startswith(YOURS) and sentences[0].startswith("As you set it") else 1])


def plan_table(plan: Plan, *, why: bool = False) -> Table:
    """The decisions. Short: value and first sentence, of what was decided. `why`: of all, with the full reason, the
    source (shortened to its name) and what was rejected."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", max_width=_VALUE_WIDTH, overflow="fold")
    table.add_column("why", overflow="fold", ratio=1)
    for one in plan.decisions:
        if not why and _is_usual(one):
            continue
        reason = Text(one.reason if why else _first(one))
        if why:
            reason.append(f" [{_short(one.source)}]", style="dim italic")
            if one.rejected:
                reason.append(f" Not {_short('; not '.join(one.rejected))}.", style="dim")
        table.add_row(Text(one.setting), Text(shown_value(one.value), style="bold"), reason)
    if not why:
        usual = [f"{one.setting} {shown_value(one.value)}" for one in plan.decisions if _is_usual(one)]
        table.add_row(Text("as usual", style="dim"), Text(""), Text(", ".join(usual), style="dim"))
    return table
