"""A training process whose files cannot grow for a while: python -m tests.train.full MODEL OUT FULL_AT ROOM_AT.

From step FULL_AT to step ROOM_AT every write fails as on a full disk (EFBIG by the process's own limit). Warnings are
printed on stderr as they are told; the run goes on where it can, and the process ends with the exit code of the error.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from luthier.errors import LuthierError
from luthier.runs import RunDirectory
from luthier.train.events import StepEvent, WarningEvent
from luthier.train.loop import train
from tests.train.world import Recorder, make_rows, make_settings, tiny_decoder


@dataclass
class Fills(Recorder):
    full: int = 0
    room: int = 0

    def on_step(self, event: StepEvent) -> None:
        size = 1 if self.full <= event.step < self.room else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def on_warning(self, event: WarningEvent) -> None:
        sys.stderr.write(f"{event.message}\n")


def main() -> int:
    model, out, full, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    settings, listener = make_settings(dropout=0.1), Fills(full=full, room=room)
    run = RunDirectory(out)
    try:
        train(tiny_decoder(model), make_rows(), settings, run, base="a/model", listener=listener, resume=True)
    except LuthierError as error:
        sys.stderr.write(f"{error.message}\n{error.remedy}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
