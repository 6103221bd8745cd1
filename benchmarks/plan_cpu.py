"""The plan against the run, on a CPU: predicted and measured peak memory and time per step of `luthier train` runs.

    python ../shared/bench/make_workload.py WORK --shapes 8m,135m,1b       (random weights of real shapes, once)
    python benchmarks/plan_cpu.py WORK [--shapes 8m,135m] [--again] [--tries 2]

Every configuration is a run of its own, from the recipe to plan.json, whose `memory`, `time` and `measured` are read.
Rows are texts cut to the length, so the largest micro-batch is every micro-batch; time is the median step but the
first. The machine's rates are calibrated before and after each run, since machines like the one this was written on
change their speed for minutes; a run in which the two disagree by more than a tenth is done once more, and the table
has what they disagree by in the end. Prints the table, the largest errors last, and writes results/plan_cpu.json as it
goes; --again measures what is missing or was in doubt, and keeps what was seen before as `earlier`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.cli.allocator import TUNABLES

FORMATS = {"bf16": ("bf16", "none"), "fp32": ("fp32", "none"), "nf4": ("bf16", "nf4")}
AGREE = 0.10
BOUND = 0.25  # of time: what the plan promises
RESULTS = Path(__file__).parent / "results" / "plan_cpu.json"


@dataclass(frozen=True)
class Case:
    """One run: rows of `length` tokens, `micro_batch` of them at once, two micro-batches a step."""

    shape: str
    form: str
    length: int
    micro_batch: int
    checkpointing: bool

    def __str__(self) -> str:
        recomputed = "recomputed" if self.checkpointing else "kept"
        return f"{self.shape:5s} {self.form:5s} {self.micro_batch} x {self.length:<4d} {recomputed:11s}"


CASES = [
    *(Case("8m", form, 128, 8, False) for form in FORMATS),
    *(Case("8m", form, 512, 4, True) for form in FORMATS),
    *(Case("8m", form, 512, 8, False) for form in FORMATS),
    *(Case("135m", form, 128, 4, False) for form in FORMATS),
    *(Case("135m", form, 512, 1, False) for form in FORMATS),
    *(Case("135m", form, 512, 2, True) for form in FORMATS),
    *(Case("135m", form, 512, 4, True) for form in ("bf16",)),
    *(Case("135m", form, 128, 8, True) for form in ("bf16", "nf4")),
    *(Case("1b", form, 128, 1, False) for form in FORMATS),
    *(Case("1b", form, 512, 1, True) for form in FORMATS),
    Case("1b", "bf16", 128, 4, False),
]


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("work", type=Path)
    args.add_argument("--shapes", default="8m,135m,1b", help="only these")
    args.add_argument("--again", action="store_true", help="what is missing, drifted or was off in results/")
    args.add_argument("--tries", type=int, default=2)
    args.add_argument("--steps", type=int, default=5)
    options = args.parse_args()
    chosen = [case for case in CASES if case.shape in options.shapes.split(",")]
    known: dict[str, dict[str, Any]] = {}
    if options.again:
        known = {one["case"]: one for one in json.loads(RESULTS.read_text(encoding="utf-8"))["results"]}
        chosen = [case for case in chosen if str(case) not in known or doubtful(known[str(case)])]
    os.environ["GLIBC_TUNABLES"] = TUNABLES  # as the command sets it; here it saves starting twice
    with tempfile.TemporaryDirectory() as folder:
        rows = write_rows(options.work / "chat.jsonl", Path(folder))
        before = calibrated()
        results = list(known.values())
        for case in chosen:
            result, before = measure(case, rows, Path(folder), options, before)
            if str(case) in known:
                once = known[str(case)]
                result["earlier"] = [*once.get("earlier", []), {key: once[key] for key in ("time_error", "drift")}]
            known[str(case)] = result
            results = [known[str(one)] for one in CASES if str(one) in known]
            write(results)
    steady = [one for one in results if one["drift"] <= AGREE]
    print(f"of the {len(steady)} during which the machine kept its speed: time {largest(steady, 'time_error')}")
    print(f"largest error of all: memory {largest(results, 'memory_error')}, time {largest(results, 'time_error')}")


def doubtful(result: dict[str, Any]) -> bool:
    """Whether the machine changed under it, or its speed is off by so much that it may have, between two looks."""
    return bool(result["drift"] > AGREE or abs(result["time_error"]) > BOUND)


def largest(results: list[dict[str, Any]], error: str) -> str:
    worst = max(results, key=lambda one: abs(one[error]))
    return f"{worst[error]:+.1%} ({' '.join(worst['case'].split())})"


def write_rows(chat: Path, folder: Path) -> Path:
    """48 long texts: 20 conversations each."""
    with chat.open(encoding="utf-8") as lines:
        texts = [" ".join(turn["content"] for turn in json.loads(line)["messages"]) for line in lines]
    path = folder / "rows.jsonl"
    joined = (" ".join(texts[start : start + 20]) for start in range(0, 48 * 20, 20))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in joined), encoding="utf-8")
    return path


def measure(
    case: Case, rows: Path, folder: Path, options: argparse.Namespace, before: float
) -> tuple[dict[str, Any], float]:
    """Run one configuration, again while the machine changes under it; `before` is what it was last calibrated to."""
    attempt, drift, after = 0, 1.0, before
    while attempt < options.tries and drift > AGREE:
        attempt += 1
        plan = run(case, options.work, rows, folder, options.steps if case.shape != "1b" else 3)
        after = calibrated()
        drift, before = abs(before / after - 1), after
    result = {
        "case": str(case),
        "predicted_gib": plan["memory"]["peak_gib"],
        "measured_gib": plan["measured"]["peak_gib"],
        "memory_error": plan["memory"]["peak_gib"] / plan["measured"]["peak_gib"] - 1,
        "predicted_seconds": plan["time"]["step_seconds"],
        "measured_seconds": plan["median"],
        "time_error": plan["time"]["step_seconds"] / plan["median"] - 1,
        "drift": drift,
        "attempts": attempt,
    }
    print(
        f"{case}  memory {result['predicted_gib']:6.3f} predicted {result['measured_gib']:6.3f} GiB measured "
        f"{result['memory_error']:+7.1%}   step {result['predicted_seconds']:7.3f} {result['measured_seconds']:7.3f} s "
        f"{result['time_error']:+7.1%}   drift {drift:.0%}, try {attempt}",
        flush=True,
    )
    return result, after


def luthier(words: Sequence[str]) -> dict[str, Any]:
    ended = subprocess.run([sys.executable, "-m", "luthier", *words, "--json"], capture_output=True, check=False)
    if ended.returncode:
        raise SystemExit(f"luthier {' '.join(words)} ended with {ended.returncode}:\n{ended.stderr.decode()}")
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def calibrated() -> float:
    """FLOP/s of the widest bf16 product, after measuring all rates anew."""
    rates = luthier(["doctor", "--calibrate"])["machine"]["device"]["rates"]
    return float(max((one["width"], one["flops"]) for one in rates["matmul"] if one["precision"] == "bf16")[1])


def run(case: Case, work: Path, rows: Path, folder: Path, steps: int) -> dict[str, Any]:
    precision, quantize = FORMATS[case.form]
    train = {
        "steps": steps,
        "batch_size": 2 * case.micro_batch,
        "micro_batch": case.micro_batch,
        "precision": precision,
        "checkpointing": case.checkpointing,
        "max_length": case.length,
        "optimizer": "adamw",
    }
    recipe = {
        "model": str(work / case.shape),
        "data": str(rows),
        "train_on": "all",
        "quantize": quantize,
        "adapter": {"rank": 16},
        "train": train,
        "split": {"train": 1.0, "eval": 0.0},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    out = tempfile.mkdtemp(dir=folder)
    luthier(["train", str(path), "--out", out + "/run"])
    made = Path(out) / "run"
    plan: dict[str, Any] = json.loads((made / "plan.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (made / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [one["seconds"] for one in events if one["event"] == "step"]
    return {**plan, "median": statistics.median(seconds[1:])}


def write(results: list[dict[str, Any]]) -> None:
    import torch

    from luthier.hardware.probe import this_device

    device = this_device()
    machine = {
        "processor": device.name,
        "cores": device.cores,
        "memory_gib": round(device.memory_gib, 1),
        "system": platform.platform(),
        "torch": torch.__version__,
        "libc": " ".join(platform.libc_ver()),
    }
    RESULTS.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
