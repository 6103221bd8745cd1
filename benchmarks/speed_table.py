"""The table of results/speed.json, in Markdown, and its place in README.md."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable
from typing import Any

from speed_cases import COLD_STEPS

BEGIN, END = "<!-- speed -->", "<!-- /speed -->"
TITLE = "## Speed"
HEAD = """\
| | tokens/s | TRL's | times TRL | share of GEMM rate | memory, of TRL's | first step after | TRL's |
| --- | --- | --- | --- | --- | --- | --- | --- |"""


def newest(case: dict[str, Any]) -> list[dict[str, Any]]:
    """The rounds of the source that was measured last: a median over two programs would be of neither."""
    return [one for one in case["rounds"] if one["source"] == case["rounds"][-1]["source"]]


def summary(case: dict[str, Any]) -> dict[str, float]:
    """Medians over the newest rounds of one case, which has some. A ratio is the median of the rounds' ratios, not a
    ratio of medians."""
    rounds = newest(case)
    prepared = [one for one in rounds if one["ours"]["prepared"] and one["peer"]["prepared"]] or rounds

    def median(value: Callable[[dict[str, Any]], float], of: list[dict[str, Any]] = rounds) -> float:
        return statistics.median(value(one) for one in of)

    def ratio(name: str) -> float:
        return median(lambda one: one["ours"][name] / one["peer"][name])

    return {
        "ours": median(lambda one: one["ours"]["tokens_per_second"]),
        "peer": median(lambda one: one["peer"]["tokens_per_second"]),
        "ours_cold": median(lambda one: one["ours"]["cold_tokens_per_second"]),
        "peer_cold": median(lambda one: one["peer"]["cold_tokens_per_second"]),
        "warm": ratio("tokens_per_second"),
        "cold": ratio("cold_tokens_per_second"),
        "memory": ratio("peak_gib"),
        "share": median(lambda one: share(one["ours"], case["flops_per_token"]["total"])),
        "first": median(lambda one: one["ours"]["seconds_to_first_step"], prepared),
        "peer_first": median(lambda one: one["peer"]["seconds_to_first_step"], prepared),
    }


def share(run: dict[str, Any], flops_per_token: float) -> float:
    """Of what the matrix products reached before and after the run, on average."""
    return float(run["tokens_per_second"] * flops_per_token / statistics.mean(one["best"] for one in run["gemm"]))


def table(document: dict[str, Any]) -> str:
    """A line for each measured case, a second where the first steps of a cold process have a target of their own."""
    lines = [HEAD]
    for case in document["cases"].values():
        if not case["rounds"]:
            continue
        found, targets = summary(case), case["targets"]
        cells = [
            case["title"],
            f"{found['ours']:,.0f}",
            f"{found['peer']:,.0f}",
            at_least(found["warm"], targets["warm"], "×"),
            at_least(found["share"], targets["share"]),
            at_most(found["memory"], targets["memory"]),
            at_most(found["first"], targets["first"], " s", ".1f"),
            f"{found['peer_first']:.1f} s",
        ]
        lines.append(line(cells))
        if targets["cold"] is not None:
            cold = [
                f"{found['ours_cold']:,.0f}",
                f"{found['peer_cold']:,.0f}",
                at_least(found["cold"], targets["cold"], "×"),
            ]
            count = len(newest(case)[0]["ours"]["step_tokens"][:COLD_STEPS])
            lines.append(line([f"{case['title']}, first {count} steps of a process", *cold, "", "", "", ""]))
    return "\n".join([*lines, "", footnote(document)])


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def at_least(value: float, target: float | None, unit: str = "", form: str = ".2f") -> str:
    return judged(value, target, "≥", target is None or value >= target, unit, form)


def at_most(value: float, target: float | None, unit: str = "", form: str = ".2f") -> str:
    return judged(value, target, "≤", target is None or value <= target, unit, form)


def judged(value: float, target: float | None, sign: str, holds: bool, unit: str, form: str) -> str:
    """The figure, and in brackets its target and, where it is missed, that it is."""
    said = f"{value:{form}}{unit}"
    if target is None:
        return said
    return f"{said} ({sign} {target:g}{unit}{'' if holds else ', **missed**'})"


def footnote(document: dict[str, Any]) -> str:
    machine = document["machine"]
    counted = [newest(case) for case in document["cases"].values()]
    rounds = sorted({len(of_case) for of_case in counted if of_case})
    each = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else str(rounds[0])
    states = len({one["source"] for of_case in counted for one in of_case})
    mixed = f" Rows are of {states} states of the source, each row of one." if states > 1 else ""
    peer = machine["peer"]
    said = (
        f"Medians of {each} interleaved rounds on {machine['cores']} cores of {machine['processor']}, "
        f"{machine['memory_gib']:g} GiB, torch {machine['ours']['torch']}; the peer is TRL {peer['trl']} with PEFT "
        f"{peer['peft']} and bitsandbytes {peer['bitsandbytes']}. Targets in brackets. `make bench` repeats it; "
        "what each figure is stands at the top of benchmarks/speed.py."
        f"{mixed}"
    )
    return textwrap.fill(said, 120, break_on_hyphens=False)


def replace_block(readme: str, made: str) -> str:
    """`readme` with a title and `made` between its two markers.

    Raises SystemExit where they are not there once each, in this order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise SystemExit(f"README.md must have {BEGIN} and {END} once each, in this order")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{TITLE}\n\n{made}\n{END}{rest.split(END)[1]}"
