"""What speed.py measures: the cases and their targets, and one run of each side."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speed_process import HERE, luthier, watched

RANK, BATCH, PEER_BATCH, MAX_LENGTH, LEARNING_RATE = 16, 8, 2, 1024, 2e-4
COLD_STEPS = 40
"""Over how many steps of a new process the cold rate is taken, or over all where there are fewer."""

FIRST_LOSS_AGREES = 0.02
FALL_AGREES = 0.25
ROWS_DIFFER = 0.01
"""How far apart the two sides may be: their first losses, as a share; how far their losses fall, as a share of the
peer's fall, and beyond that as a share of its first loss, since the rows of a step are not the same on both sides: each
shuffles in its own way (seen: 0.3 % from step to step)."""

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Targets:
    """warm, cold: at least so many times the peer's rate. share: at least, of the matrix products' rate. memory: at
    most, of the peer's peak. first: at most, seconds from the command to the end of the first step."""

    warm: float
    cold: float | None = None
    share: float | None = None
    memory: float | None = None
    first: float | None = None


@dataclass(frozen=True)
class Case:
    """One way to train, the same on both sides; `environment` is ours only. The rows are the same, `BATCH` a step."""

    name: str
    shape: str
    precision: str
    quantize: str
    steps: int
    targets: Targets
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.name.replace("-torch", ", without the C extension").replace("-", " ")


KERNELS = "LUTHIER_KERNELS"
TORCH = {KERNELS: "torch"}
CASES = (
    Case("8m-bf16", "8m", "bf16", "none", 40, Targets(5.5, cold=4.0, share=0.45, memory=0.75, first=3.0)),
    Case("135m-bf16", "135m", "bf16", "none", 16, Targets(5.5, share=0.70, memory=0.65, first=5.0)),
    Case("135m-nf4", "135m", "bf16", "nf4", 8, Targets(4.3, memory=0.60)),
    Case("1b-bf16", "1b", "bf16", "none", 4, Targets(3.0, share=0.70, memory=0.65)),
    Case("135m-fp32", "135m", "fp32", "none", 6, Targets(3.0)),
    Case("8m-bf16-torch", "8m", "bf16", "none", 40, Targets(3.5), TORCH),
    Case("135m-bf16-torch", "135m", "bf16", "none", 8, Targets(3.5), TORCH),
)


@dataclass(frozen=True)
class Bench:
    """Where things are. folder: scratch of one case, whose caches both sides find again in the next round."""

    work: Path
    peer_script: Path
    peer_python: Path
    folder: Path


def recipe(case: Case, work: Path, steps: int) -> dict[str, Any]:
    """Everything said as the peer has it; only micro_batch, checkpointing and attention are left to the plan."""
    return {
        "model": str(work / case.shape),
        "data": [{"path": str(work / "chat.jsonl"), "format": "messages"}],
        "template": "model",
        "train_on": "completions",
        "long_rows": "truncate",
        "quantize": case.quantize,
        "adapter": {"rank": RANK, "alpha": 2.0 * RANK, "dropout": 0.0, "targets": "all-linear", "scale": "standard"},
        "train": {
            "steps": steps,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "schedule": "linear",
            "warmup_steps": 0,
            "optimizer": "adamw",
            "weight_decay": 0.0,
            "clip": 1.0,
            "precision": case.precision,
            "max_length": MAX_LENGTH,
            "packing": False,
            "eval_every": 0,
            "save_every": steps,
        },
        "split": {"train": 1.0, "eval": 0.0, "test": 0.0},
        "seed": 0,
    }


def run_ours(case: Case, bench: Bench, steps: int) -> dict[str, Any]:
    """`luthier train` in a process of its own; the rates are those of its events.jsonl."""
    run, cache = bench.folder / "run", bench.folder / "cache-ours"
    shutil.rmtree(run, ignore_errors=True)
    prepared = cache.exists()
    path = bench.folder / "recipe.yaml"
    path.write_text(json.dumps(recipe(case, bench.work, steps), indent=1), encoding="utf-8")  # JSON is YAML too
    words = [str(luthier()), "train", str(path), "--out", str(run), "--json"]
    ended = watched(words, bench.folder, {**case.environment, "LUTHIER_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})
    events = [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    done = [event for event in events if event["event"] == "step"]
    plan = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    return {
        **rates([event["tokens"] for event in done], [event["seconds"] for event in done], steps),
        "peak_gib": ended.peak_gib,
        "seconds_to_first_step": done[0]["time"] - ended.started,
        "seconds": ended.seconds,
        "losses": [event["loss"] for event in done],
        "least_grad_norm": min(event["grad_norm"] for event in done),
        "micro_batch": plan["settings"]["micro_batch"],
        "checkpointing": plan["settings"]["checkpointing"],
        "kernels": {one["setting"]: one["value"] for one in plan["decisions"] if "kernel" in one["setting"]},
        "warnings": [event["message"] for event in events if event["event"] == "warning"],
        "prepared": prepared,
    }


def run_peer(case: Case, bench: Bench, steps: int) -> dict[str, Any]:
    """The peer's script in a process of its own. It logs at the end of every step: the first log line, as it comes out,
    says when the first step had ended."""
    cache = bench.folder / "cache-peer"
    prepared = cache.exists()
    words = [str(bench.peer_python), str(HERE / "peer_steps.py"), str(bench.peer_script), str(bench.work)]
    words += ["--shape", case.shape, "--quantize", case.quantize, "--dtype", DTYPES[case.precision]]
    words += ["--batch", str(PEER_BATCH), "--accumulate", str(BATCH // PEER_BATCH), "--steps", str(steps)]
    words += ["--max-length", str(MAX_LENGTH), "--rank", str(RANK)]
    ended = watched(words, bench.folder, {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"})
    said, each = (json.loads(line) for _, line in ended.lines[-2:])
    found = rates(each["tokens"], each["seconds"], steps)
    if abs(found["tokens_per_second"] - said["tokens_per_second"]) > 0.1:
        raise SystemExit(f"the peer says {said['tokens_per_second']} tokens/s, its steps {found['tokens_per_second']}")
    return {
        **found,
        "peak_gib": ended.peak_gib,
        "seconds_to_first_step": next(at for at, line in ended.lines if "'loss':" in line),
        "setup_seconds": said["setup_seconds"],
        "seconds": ended.seconds,
        "losses": each["losses"],
        "padding": said["padding"],
        "prepared": prepared,
    }


def rates(tokens: list[int], seconds: list[float], steps: int) -> dict[str, Any]:
    """Real tokens a second: the median of the steps after the first, and all of a cold process's first steps."""
    if len(tokens) != steps or len(seconds) != steps:
        raise SystemExit(f"{steps} steps were asked for, {len(tokens)} and {len(seconds)} were measured")
    each = [count / taken for count, taken in zip(tokens, seconds, strict=True)]
    return {
        "tokens_per_second": statistics.median(each[1:]),
        "cold_tokens_per_second": sum(tokens[:COLD_STEPS]) / sum(seconds[:COLD_STEPS]),
        "step_tokens": tokens,
        "step_seconds": [round(taken, 5) for taken in seconds],
    }


def wrong(ours: dict[str, Any], peer: dict[str, Any]) -> list[str]:
    """What shows that one side did not train, or not as the other did; nothing where all is well."""
    (first, *_, last), (peer_first, *_, peer_last) = ours["losses"], peer["losses"]
    found: list[str] = []
    if not all(math.isfinite(loss) for loss in (*ours["losses"], *peer["losses"])):
        found.append("a loss is not finite")
    if not ours["least_grad_norm"] > 0:
        found.append(f"the norm of the gradient fell to {ours['least_grad_norm']}")
    if not last < first:
        found.append(f"our loss did not fall: {first:.4f} to {last:.4f}")
    if not peer_last < peer_first:
        found.append(f"the peer's loss did not fall: {peer_first:.4f} to {peer_last:.4f}")
    if not abs(first - peer_first) <= FIRST_LOSS_AGREES * peer_first:
        found.append(f"the first losses differ: {first:.4f} and {peer_first:.4f}")
    fall, peer_fall = first - last, peer_first - peer_last
    if not abs(fall - peer_fall) <= FALL_AGREES * peer_fall + ROWS_DIFFER * peer_first:
        found.append(f"the losses do not fall alike: by {fall:.4f} and {peer_fall:.4f}")
    return found
