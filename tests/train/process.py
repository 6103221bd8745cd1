"""A training process of its own, for the tests that send it signals: python -m tests.train.process MODEL OUT WAIT_AT.

After WAIT_AT updates it says so on stdout and waits for a line on stdin, so that the test decides what happens there.
It ends with the exit code of the error, as the command line does.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import LuthierError
from luthier.runs import RunDirectory
from luthier.train.events import StepEvent
from luthier.train.loop import train
from luthier.train.signals import StopNow
from tests.train.world import Recorder, make_rows, make_settings, tiny_decoder


@dataclass
class Waits(Recorder):
    at: int = 0

    def on_step(self, event: StepEvent) -> None:
        if event.step == self.at:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":  # the one before is whole then, and what is told has happened
                    thread.join()
            sys.stdout.write(f"at {event.step}\n")
            sys.stdout.flush()
            sys.stdin.readline()


def main() -> int:
    model, out, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    settings, listener = make_settings(dropout=0.1), Waits(at=at)
    try:
        train(
            tiny_decoder(model),
            make_rows(),
            settings,
            RunDirectory(out),
            base="a/model",
            listener=listener,
            resume=True,
        )
    except LuthierError as error:
        sys.stderr.write(f"{error.message}\n{error.remedy}\n")
        return error.exit_code
    except StopNow as stop:
        return 128 + int(stop.args[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
