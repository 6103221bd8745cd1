"""The peer's script, run unchanged, and after it the seconds, real tokens and loss of every step as one line of JSON.

    python benchmarks/peer_steps.py .../peer_trl.py WORK [its options]

The script itself prints medians only; what it measured lies in its globals when it has ended.
"""

from __future__ import annotations

import json
import runpy
import sys


def main() -> None:
    del sys.argv[0]
    found = runpy.run_path(sys.argv[0], run_name="__main__")
    clock = found["clock"]
    print(json.dumps({"tokens": found["real"], "seconds": clock.seconds, "losses": clock.losses}))


if __name__ == "__main__":
    main()
