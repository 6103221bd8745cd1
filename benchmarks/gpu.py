"""The CUDA table in one command: ours, TRL + PEFT + bitsandbytes and Unsloth, 8b-shaped, on packed GSM8K rows.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.json] [--only PART,PART] [--steps 200]
        [--shared ../shared] [--rows ROWS.npz] [--wheels FOLDER] [--work FOLDER] [--layers 32]

Rank 16 on all projections, dropout 0, AdamW, whole optimizer steps. Each part is a process of its own, and what has
been measured is written after each, so a run that is cut off is gone on with by --only. Parts:

    operations  each operation beside the reference
    bf16        LoRA, 2 x 4,096, --steps of them
    fp8         FP8 base, 2 x 4,096, as many, and the loss beside bf16's
    nf4         QLoRA, 2 x 4,096
    small       QLoRA, 1 x 2,048: every layer recomputed, an 8-bit optimizer
    trl, trl-nf4, unsloth, unsloth-nf4      the peers, 2 x 4,096
    plan        plan_cuda.py, if it has no results yet

What cannot be run here (a library that is missing, memory that is too small) is said in a line and left out; nothing is
taken for measured that was not. ROWS.npz (gpu_rows.py) stands for --shared where that is not at hand; the peers need
both. --wheels: what pip installs beforehand, without a network, all wheels of a folder. --layers: fewer than 32, to try
the command itself: such results are no results of the table, and are marked.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
NEEDED = ("torch", "numpy", "orjson", "safetensors", "psutil")
MACHINE = """
import json, torch
card = torch.cuda.get_device_properties(0)
print(json.dumps({"device": card.name, "memory_gib": round(card.total_memory / 2**30, 1), "torch": torch.__version__,
                  "cuda": torch.version.cuda, "capability": list(torch.cuda.get_device_capability(0))}))
"""


@dataclass(frozen=True)
class Ours:
    """A part of gpu_steps.py: what it is told, and what it needs beyond NEEDED."""

    words: tuple[str, ...]
    goal: str
    library: str | None = None


OURS = {
    "bf16": Ours(("--quantize", "none"), ">= 18,000 tok/s"),
    "fp8": Ours(("--quantize", "fp8"), ">= 24,000 tok/s, loss within 1 %"),
    "nf4": Ours(("--quantize", "nf4"), ">= 16,500 tok/s", "bitsandbytes"),
    "small": Ours(
        ("--quantize", "nf4", "--packs", "1", "--length", "2048", "--optimizer", "adamw-8bit"),
        "<= 6.5 GiB",
        "bitsandbytes",
    ),
}
FEW = 30
"""Steps of the parts whose loss is not compared."""

PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # the peer, its base, what it needs
    "trl": ("trl", "none", ("transformers", "trl", "peft", "datasets")),
    "trl-nf4": ("trl", "nf4", ("transformers", "trl", "peft", "datasets", "bitsandbytes")),
    "unsloth": ("unsloth", "none", ("unsloth", "trl", "datasets")),
    "unsloth-nf4": ("unsloth", "nf4", ("unsloth", "trl", "datasets", "bitsandbytes")),
}
PARTS = ("operations", *OURS, *PEERS, "plan")
AGREES = 0.01
"""By how much the loss with an FP8 base may differ, of bf16's, in the mean of the last twenty steps."""


def ran(words: Sequence[str | Path], folder: Path | None = None) -> dict[str, Any]:
    """The JSON object on the last line of what Python prints for these words, an empty one if that is none; where it
    fails, {"left out": the end of what it said}."""
    path = os.pathsep.join([str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Segments that grow: blocks of many sizes come and go in a step, and none of them should strand memory.
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ, "PYTHONPATH": path}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return {"left out": said[-1] if said else f"it ended with {done.returncode}", "said": "\n".join(said[-30:])}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    found: dict[str, Any] = json.loads(last) if last.startswith("{") else {}
    return found


def ours(name: str, options: argparse.Namespace) -> dict[str, Any]:
    part = OURS[name]
    if part.library is not None and find_spec(part.library) is None:
        return {"left out": f"{part.library} is not installed"}
    steps = options.steps if name in ("bf16", "fp8") else min(FEW, options.steps)
    words = [*part.words, "--steps", str(steps), "--layers", str(options.layers), "--shared", str(options.shared)]
    if name == "small":
        words += ["--checkpointing", str(options.layers)]
    return ran([HERE / "gpu_steps.py", options.rows, *words])


def peer(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Without recomputation where memory allows, else with it, which the result says."""
    who, base, libraries = PEERS[name]
    lacking = [library for library in libraries if find_spec(library) is None]
    if lacking:
        return {"left out": f"{', '.join(lacking)} not installed"}
    if not (options.shared / "bench" / "peer_trl.py").is_file():
        return {"left out": f"{options.shared} is not there"}
    options.work.mkdir(parents=True, exist_ok=True)  # where they write what they like
    script, shared = HERE / "gpu_peers.py", ("--shared", options.shared)
    if not (options.work / "chat.jsonl").is_file() or not (options.work / "8b" / "config.json").is_file():
        made = ran([script, "make", options.work, *shared], options.work)
        if "left out" in made:
            return made
    words = [script, who, options.work, "--quantize", base, "--steps", str(FEW), "--rows", options.rows, *shared]
    found = ran(words, options.work)
    if "out of memory" in found.get("said", "").lower():
        found = ran([*words, "--checkpointing"], options.work)
    return found


def plan(options: argparse.Namespace) -> dict[str, Any]:
    out = options.out.parent / "plan_cuda.json"
    if out.is_file():
        return {"left out": f"{out.name} is there already"}
    done = ran([HERE / "plan_cuda.py", "--out", out])
    return done if "left out" in done else {"written to": out.name}


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    if part == "operations":
        return ran([HERE / "gpu_operations.py", options.rows, "--shared", options.shared])
    if part == "plan":
        return plan(options)
    return ours(part, options) if part in OURS else peer(part, options)


def line(name: str, found: dict[str, Any]) -> str:
    """One row of the table."""
    goal = OURS[name].goal if name in OURS else ""
    if "left out" in found:
        return f"| {name} | left out: {found['left out']} | | | | {goal} |"
    share = f"{found['share_of_gemm']:.2f}" if "share_of_gemm" in found else ""
    rate, peak = f"{found['tokens_per_second']:,.0f}", f"{found['peak_gib']:.1f} ({found['peak_reserved_gib']:.1f})"
    fall = f"{found['first_loss']:.3f} to {found['last_loss']:.3f} in {found['steps']}"
    again = ", recomputed" if found.get("checkpointing") else ""
    return f"| {name}{again} | {rate} | {share} | {peak} | {fall} | {goal} |"


def compared(parts: dict[str, dict[str, Any]]) -> list[str]:
    """Ratios to the peers and the difference of the losses, of what was measured."""

    def measured(name: str) -> dict[str, Any] | None:
        found = parts.get(name, {})
        return found if "tokens_per_second" in found else None

    said = []
    for mine, theirs, goal in (
        ("bf16", "unsloth", 1.25),
        ("nf4", "unsloth-nf4", 1.25),
        ("bf16", "trl", 2.0),
        ("nf4", "trl-nf4", 2.0),
    ):
        a, b = measured(mine), measured(theirs)
        if a and b:
            rate, memory = a["tokens_per_second"] / b["tokens_per_second"], a["peak_gib"] / b["peak_gib"]
            said.append(f"{mine} over {theirs}: {rate:.2f} of its rate (goal {goal}), {memory:.2f} of its memory")
    a, b = measured("bf16"), measured("fp8")
    if a and b:
        last = [sum(one["losses"][-20:]) / len(one["losses"][-20:]) for one in (a, b)]
        apart = abs(last[1] / last[0] - 1)
        verdict = "within" if apart <= AGREES else "NOT within"
        said.append(f"fp8's loss after {b['steps']} steps: {apart:.2%} from bf16's, {verdict} {AGREES:.0%}")
    return said


def table(document: dict[str, Any]) -> str:
    parts = document["parts"]
    lines = ["| | tok/s | of GEMM | peak GiB (reserved) | loss | goal |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [line(name, parts[name]) for name in (*OURS, *PEERS) if name in parts]
    operations = parts.get("operations", {})
    if "rows" in operations:
        lines += ["", "| operation | reference, ms | ours, ms | times |", "| --- | --- | --- | --- |"]
        for row in operations["rows"]:
            plain, fast = row["reference_ms"], row["ours_ms"]
            lines.append(f"| {row['operation']} | {plain:.3f} | {fast:.3f} | {plain / fast:.1f} |")
    elif "left out" in operations:
        lines.append(f"operations left out: {operations['left out']}")
    return "\n".join([*lines, "", *compared(parts)])


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """Install, look at the machine, and take up what was measured on it before."""
    if options.wheels is not None:
        wheels = sorted(str(wheel) for wheel in options.wheels.glob("*.whl"))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels]
        subprocess.run(pip, check=True)
        importlib.invalidate_caches()
    lacking = [name for name in NEEDED if find_spec(name) is None]
    if lacking:
        raise SystemExit(f"{', '.join(lacking)} not installed: put the wheels in a folder and name it with --wheels")
    machine = ran(["-c", MACHINE])
    if "left out" in machine:
        raise SystemExit(f"no CUDA card here: {machine['left out']}")
    document = {"machine": machine, "layers": options.layers, "parts": {}}
    if options.out.is_file():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        if all(before.get(key) == document[key] for key in ("machine", "layers")):
            document = before
    return document


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    args.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    args.add_argument("--steps", type=int, default=200)
    args.add_argument("--layers", type=int, default=32)
    args.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared")
    args.add_argument("--rows", type=Path, default=Path("gpu_rows.npz"))
    args.add_argument("--work", type=Path, default=Path("gpu_work"))
    args.add_argument("--wheels", type=Path)
    options = args.parse_args()
    for name in ("out", "shared", "rows", "work"):
        setattr(options, name, getattr(options, name).resolve())
    parts = options.only.split(",")
    unknown = set(parts) - set(PARTS)
    if unknown:
        args.error(f"there is no part {', '.join(sorted(unknown))}: {', '.join(PARTS)}")
    document = begin(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for part in parts:
        found = measure(part, options)
        document["parts"][part] = found
        said = {key: value for key, value in found.items() if key not in ("losses", "said", "rows")}
        print(f"{part}: {json.dumps(said)}", flush=True)
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if options.layers != 32:
        print(f"{options.layers} layers instead of 32: a trial of the command, no result of the table")
    print(table(document))


if __name__ == "__main__":
    main()
