"""Whether cost grows as the operations do: tokens a second by the length of rows, and at ten times the rows.

    python benchmarks/scaling.py WORK [--shapes 8m,135m] [--rounds 2] [--steps N] [--peer-python .venv-peer/bin/python]
    python benchmarks/scaling.py --plot            results/scaling.svg from results/scaling.json (needs matplotlib)

WORK is what shared/bench/make_workload.py made. Every point is a `luthier train` in bf16 on rows cut to one length, all
of it labelled: 8,192 tokens a step, 4,096 at once whatever the length, nothing recomputed, each row seen once. One more
point has ten times the rows, and so ten times the steps, at one length. A rate is the median of tokens / seconds over
the steps after the first, and is set to one speed of the machine by the matrix products beside it (gemm.py, before and
after): rate * median product rate / its own.

The line is  c / F(length),  F the operations a token needs (speed_flops.py), in which only attention grows with the
length; c, one number for a shape, is the geometric mean of rate * F over the lengths. Points should lie within a fifth
of it. What is not in F is what bends the curve: fixed costs of a document, attention away from the products' rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed import write
from speed_cases import RANK
from speed_flops import Lengths, flops_per_token
from speed_process import HERE, gemm, luthier, machine, watched

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TENFOLD = 512
STEP_TOKENS, ONCE = 8192, 4096
STEPS = {"8m": 8, "135m": 4, "1b": 3}
CHARACTERS = 6
"""At least so many to a token, so that a text is long enough; GSM8K has 3.5."""
BOUND = 0.20
RESULTS = HERE / "results" / "scaling.json"


@dataclass(frozen=True)
class Point:
    """Rows of `length` tokens, as many as `steps` steps take, times `fold`."""

    shape: str
    length: int
    fold: int

    def __str__(self) -> str:
        return f"{self.shape} {self.length}" + (f" x{self.fold}" if self.fold > 1 else "")


def points(shape: str) -> Iterator[Point]:
    for length in LENGTHS:
        yield Point(shape, length, 1)
    yield Point(shape, TENFOLD, 10)


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("work", type=Path, nargs="?")
    args.add_argument("--shapes", default="8m,135m", help="only these")
    args.add_argument("--rounds", type=int, default=2, help="how often all points are measured, one after another")
    args.add_argument("--steps", type=int, help="of every point, instead of its shape's own number")
    args.add_argument("--peer-python", type=Path, help="a Python with matplotlib, to draw the plot at the end")
    args.add_argument("--results", type=Path, default=RESULTS, help="the plot goes beside it")
    args.add_argument("--plot", action="store_true", help="draw it; measure nothing")
    options = args.parse_args()
    if options.plot:
        plot(json.loads(options.results.read_text(encoding="utf-8")), options.results.with_suffix(".svg"))
        return
    if options.work is None or (options.steps or 2) < 2 or options.rounds < 1:
        args.error("wanted: WORK, at least one round, and two steps (the first is not counted)")
    options.work = options.work.absolute()
    document: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        document["machine"] = machine(Path(scratch), None)
        document["shapes"] = {}
        for shape in options.shapes.split(","):
            document["shapes"][shape] = sweep(shape, options, Path(scratch))
            write(document, options.results)
    for shape, found in document["shapes"].items():
        for one in found["points"]:
            rates = f"{one['tokens_per_second']:8,.0f} tokens/s, line {one['line']:8,.0f}"
            print(f"{one['point']:14s} {rates}: {one['off']:+.1%}")
        worst = max(found["points"], key=lambda one: abs(one["off"]))
        print(f"{shape}: at most {worst['off']:+.1%} off ({worst['point']}); {BOUND:.0%} is the bound")
    if options.peer_python:
        words = [str(options.peer_python), str(HERE / "scaling.py"), "--plot", "--results", str(options.results)]
        subprocess.run(words, check=True)


def sweep(shape: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All points of one shape, `rounds` times, and where they lie to the line."""
    steps = options.steps or STEPS[shape]
    taken: dict[Point, list[dict[str, Any]]] = {point: [] for point in points(shape)}
    before = gemm("bf16", folder)
    for _ in range(options.rounds):
        for point, runs in taken.items():
            tokens_per_second = run(point, options.work, steps, folder)
            after = gemm("bf16", folder)
            runs.append({"tokens_per_second": tokens_per_second, "gemm": [before, after]})
            before = after
            print(f"{point!s:14s} {tokens_per_second:8,.0f} tokens/s", flush=True)
    config = json.loads((options.work / shape / "config.json").read_text(encoding="utf-8"))
    flops = {point: flops_per_token(config, RANK, Lengths.fixed(point.length))["total"] for point in taken}
    speed = statistics.median(beside(one) for runs in taken.values() for one in runs)
    rate = {
        point: statistics.median(one["tokens_per_second"] * speed / beside(one) for one in runs)
        for point, runs in taken.items()
    }
    constant = statistics.geometric_mean(rate[point] * flops[point] for point in taken if point.fold == 1)
    found = [
        {
            "point": str(point),
            "length": point.length,
            "fold": point.fold,
            "flops_per_token": flops[point],
            "tokens_per_second": rate[point],
            "line": constant / flops[point],
            "off": rate[point] * flops[point] / constant - 1,
            "runs": runs,
        }
        for point, runs in taken.items()
    ]
    return {"steps": steps, "gemm": speed, "constant": constant, "points": found}


def beside(one: dict[str, Any]) -> float:
    """FLOP/s of the matrix products around a run."""
    return float(statistics.mean(rates["best"] for rates in one["gemm"]))


def run(point: Point, work: Path, steps: int, folder: Path) -> float:
    """Tokens a second of one `luthier train`, after its first step."""
    batch = STEP_TOKENS // point.length
    rows = write_rows(work / "chat.jsonl", folder / "rows.jsonl", point.length, steps * batch * point.fold)
    recipe = {
        "model": str(work / point.shape),
        "data": [{"path": str(rows), "format": "text"}],
        "train_on": "all",
        "quantize": "none",
        "adapter": {"rank": RANK},
        "train": {
            "steps": steps * point.fold,
            "batch_size": batch,
            "micro_batch": ONCE // point.length,
            "learning_rate": 2e-4,
            "precision": "bf16",
            "checkpointing": False,
            "optimizer": "adamw",
            "max_length": point.length,
            "packing": False,
            "eval_every": 0,
            "save_every": steps * point.fold,
        },
        "split": {"train": 1.0, "eval": 0.0},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    apart = {"LUTHIER_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    watched([str(luthier()), "train", str(path), "--out", str(out), "--json"], folder, apart)
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    done = [event for event in events if event["event"] == "step"]
    if {event["tokens"] for event in done} != {STEP_TOKENS}:
        raise SystemExit(f"{point}: steps of {sorted({event['tokens'] for event in done})} tokens, not {STEP_TOKENS}")
    return float(statistics.median(event["tokens"] / event["seconds"] for event in done[1:]))


def write_rows(chat: Path, path: Path, length: int, count: int) -> Path:
    """`count` texts of at least `length` tokens, each of conversations of its own as long as there are any left."""
    with chat.open(encoding="utf-8") as lines:
        texts = [" ".join(turn["content"] for turn in json.loads(line)["messages"]) for line in lines]
    used = 0
    with path.open("w", encoding="utf-8") as out:
        for _ in range(count):
            parts: list[str] = []
            while sum(map(len, parts)) < CHARACTERS * length:
                parts.append(texts[used % len(texts)])
                used += 1
            out.write(json.dumps({"text": " ".join(parts)}) + "\n")
    return path


def plot(document: dict[str, Any], path: Path) -> None:
    """A panel a shape: the line, a fifth to both sides of it, the points, and the one with ten times the rows."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "luthier"  # the same figures give the same file
    from matplotlib import pyplot

    shapes = document["shapes"]
    figure, panels = pyplot.subplots(1, len(shapes), figsize=(4.8 * len(shapes), 3.6), squeeze=False)
    for panel, (shape, found) in zip(panels[0], shapes.items(), strict=True):
        plain = [one for one in found["points"] if one["fold"] == 1]
        lengths, lines = [one["length"] for one in plain], [one["line"] for one in plain]
        low, high = [(1 - BOUND) * rate for rate in lines], [(1 + BOUND) * rate for rate in lines]
        panel.fill_between(lengths, low, high, alpha=0.15, label=f"within {BOUND:.0%}")
        panel.plot(lengths, lines, label="as the operations predict")
        panel.plot(lengths, [one["tokens_per_second"] for one in plain], "o", color="black", label="measured")
        more = [one for one in found["points"] if one["fold"] > 1]
        rates = [one["tokens_per_second"] for one in more]
        panel.plot([one["length"] for one in more], rates, "D", mfc="none", color="black", label="ten times the rows")
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
        panel.set_ylim(bottom=0)
        panel.set_title(f"{shape}, bf16")
        panel.set_xlabel("tokens in a row")
        panel.set_ylabel("tokens a second")
        panel.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
