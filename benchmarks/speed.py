"""Ours beside the peer on real rows: speed, memory, start-up and losses, measured in one run (`make bench`).

    python benchmarks/speed.py WORK --peer-python .venv-peer/bin/python [--shared ../shared]
                               [--cases 8m-bf16,135m-nf4] [--rounds 3] [--steps N] [--again]
    python benchmarks/speed.py --table             the table of results/speed.json, into README.md too

WORK is what shared/bench/make_workload.py made. Ours is `luthier train RECIPE`, the peer shared/bench/peer_trl.py
(TRL's SFTTrainer with PEFT, and bitsandbytes for NF4) under a Python of its own. Case by case they take turns, each in
a new process, as often as there are rounds; before, between and after them gemm.py looks, in processes of its own, what
the machine's matrix products reach, since machines change their speed for minutes.

Both sides have 8 rows a step (the peer 2 x 4), the same rows, LoRA of rank 16 on all seven projections, AdamW, rows cut
at 1,024 tokens, labels on answers only, no packing, nothing held out. Rows come in an order of each side's own.

    tokens/s   real tokens, no padding: median of tokens / seconds over the steps after the first; ours by the events of
               the run, the peer's by its own clock, from the beginning of a step to its end. The peer fetches its rows
               before that; our seconds have this in them.
    cold       sum of tokens / sum of seconds of the first 40 steps of a process (or all, where there are fewer), the
               first among them
    share      of the matrix products' rate (the mean of those before and after, the faster product): tokens/s times the
               operations that a token needs (speed_flops.py), divided by that rate
    memory     largest resident set of the process in its whole life, as the system says when it ends
    first step from the process being made to the end of its first optimizer step: ours by the time in that step's
               event, the peer's by when its log line of that step came out

A case's first round finds nothing prepared (rows to tokens, digests of the model), the others what the rounds before
left, on both sides; seconds to the first step are of the latter, where there are any. A round in which a gradient norm
is not above zero, a loss does not fall, or the two do not begin and fall alike, is in the results and ends the program
with an error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from speed_cases import CASES, KERNELS, MAX_LENGTH, RANK, Bench, Case, run_ours, run_peer, wrong
from speed_flops import Lengths, flops_per_token
from speed_process import HERE, answer, gemm, machine, source
from speed_table import replace_block, table

RESULTS = HERE / "results" / "speed.json"
README = HERE.parent / "README.md"


def parsed() -> argparse.Namespace:
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("work", type=Path, nargs="?")
    args.add_argument("--shared", type=Path, default=HERE.parent.parent / "shared", help="the folder with bench/")
    args.add_argument("--peer-python", type=Path, default=HERE.parent / ".venv-peer" / "bin" / "python")
    args.add_argument("--cases", default=",".join(case.name for case in CASES), help="only these, by name")
    args.add_argument("--rounds", type=int, default=3)
    args.add_argument("--steps", type=int, help="of every case, instead of its own number")
    args.add_argument("--again", action="store_true", help="go on with the results file: only rounds that it lacks")
    args.add_argument("--results", type=Path, default=RESULTS)
    args.add_argument("--table", action="store_true", help="print the table and put it into README.md; measure nothing")
    options = args.parse_args()
    unknown = set(options.cases.split(",")) - {case.name for case in CASES}
    if unknown:
        args.error(f"no such case: {', '.join(sorted(unknown))}")
    if not options.table and options.work is None:
        args.error("WORK is missing: the folder that make_workload.py made")
    if options.rounds < 1 or (options.steps or 2) < 2:
        args.error("at least one round, and two steps: the first is not counted")
    return options


def main() -> None:
    options = parsed()
    if options.table:
        made = table(json.loads(options.results.read_text(encoding="utf-8")))
        print(made)
        README.write_text(replace_block(README.read_text(encoding="utf-8"), made), encoding="utf-8")
        return
    # absolute, not resolved: a virtual environment's Python is a link that must stay one
    options.work, options.peer_python = options.work.absolute(), options.peer_python.absolute()
    options.shared = options.shared.absolute()
    os.environ.pop(KERNELS, None)  # only a case says which, and ours only
    with tempfile.TemporaryDirectory() as scratch:
        document = begin(options, Path(scratch))
        for case in (case for case in CASES if case.name in options.cases.split(",")):
            folder = Path(scratch) / case.name
            folder.mkdir()
            measure(case, document, options, folder)
    print(table(document))
    failed = [
        f"{name}: {what}" for name, one in document["cases"].items() for r in one["rounds"] for what in r["wrong"]
    ]
    if failed:
        raise SystemExit("\n".join(["these figures are of runs that did not train as they should:", *failed]))


def begin(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """The results so far: of the file where it is gone on with, which must be of this machine; else none."""
    here = machine(scratch, options.peer_python)
    if not (options.again and options.results.exists()):
        return {"machine": here, "cases": {}}
    document: dict[str, Any] = json.loads(options.results.read_text(encoding="utf-8"))
    if document["machine"] != here:
        raise SystemExit(f"{options.results} is of another machine or other versions: leave out --again to begin anew")
    return document


def measure(case: Case, document: dict[str, Any], options: argparse.Namespace, folder: Path) -> None:
    """The rounds of one case that `document` lacks; it is written after each."""
    steps = options.steps or case.steps
    known = document["cases"].setdefault(case.name, described(case, options.work, steps, folder))
    if known["steps"] != steps:
        raise SystemExit(
            f"{case.name}: the results file has {known['steps']} steps, not {steps}: begin anew, or --steps"
        )
    bench = Bench(options.work, options.shared / "bench" / "peer_trl.py", options.peer_python, folder)
    while len(known["rounds"]) < options.rounds:
        code, before = source(), gemm(case.precision, folder)
        ours = run_ours(case, bench, steps)
        between = gemm(case.precision, folder)
        peer = run_peer(case, bench, steps)
        after = gemm(case.precision, folder)
        ours["gemm"], peer["gemm"] = [before, between], [between, after]
        known["rounds"].append({"source": code, "ours": ours, "peer": peer, "wrong": wrong(ours, peer)})
        write(document, options.results)
        print(f"{case.name:16s} round {len(known['rounds'])}  {in_short(known['rounds'][-1])}", flush=True)


def in_short(found: dict[str, Any]) -> str:
    ours, peer = found["ours"], found["peer"]
    rate, peer_rate = ours["tokens_per_second"], peer["tokens_per_second"]
    first, peer_first = ours["seconds_to_first_step"], peer["seconds_to_first_step"]
    said = [
        f"{rate:8,.0f} tokens/s, peer {peer_rate:7,.0f}: {rate / peer_rate:5.2f}x",
        f"memory {ours['peak_gib']:5.2f} and {peer['peak_gib']:5.2f} GiB",
        f"first step {first:4.1f} and {peer_first:4.1f} s",
        *found["wrong"],
    ]
    return "   ".join(said)


def described(case: Case, work: Path, steps: int, folder: Path) -> dict[str, Any]:
    """What a case is, and the operations that a token of it needs."""
    words = [sys.executable, str(HERE / "speed_flops.py"), str(work), case.shape, str(MAX_LENGTH)]
    lengths = Lengths(**answer(words, folder))
    config = json.loads((work / case.shape / "config.json").read_text(encoding="utf-8"))
    return {
        "title": case.title,
        "steps": steps,
        "environment": case.environment,
        "targets": asdict(case.targets),
        "lengths": asdict(lengths),
        "flops_per_token": flops_per_token(config, RANK, lengths),
        "rounds": [],
    }


def write(document: dict[str, Any], path: Path) -> None:
    """All of it or nothing: an interruption leaves the rounds before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    main()
