"""The plan as a readable argument: a table of what was decided, why, on whose word, and what was not taken."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luthier.plan.plan import Plan

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["plan_table", "shown_value"]

_VALUE_WIDTH = 18


def shown_value(value: object) -> str:
    """A value as people write it in a recipe."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ", ".join(str(item).removesuffix("_proj") for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _short(text: str) -> str:
    """Without the bibliography in brackets, which `plan --json` and plan.json have."""
    return re.sub(r" \([^)]*(arXiv|doi)[^)]*\)", "", text)


def plan_table(plan: Plan) -> Table:
    """A table for a terminal of 100 columns or more; sources are shortened to their names."""
    from rich.table import Table
    from rich.text import Text

    share = plan.trainable_parameters / plan.total_parameters
    title = f"The plan: {plan.trainable_parameters:,} of {plan.total_parameters:,} parameters are trained ({share:.2%})"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("value", max_width=_VALUE_WIDTH, overflow="fold")
    table.add_column("why", overflow="fold", ratio=1)
    for one in plan.decisions:
        why = Text(one.reason)
        why.append(f" [{_short(one.source)}]", style="dim italic")
        if one.rejected:
            why.append(f" Not {_short('; not '.join(one.rejected))}.", style="dim")
        table.add_row(Text(one.setting), Text(shown_value(one.value), style="bold"), why)
    return table
