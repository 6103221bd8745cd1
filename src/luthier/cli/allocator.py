"""Makes the C library's allocator reuse what a training step gives back. Only for training on a CPU under glibc.

torch asks for memory aligned to 64 bytes. glibc cuts such a piece out of a larger one, and keeps the splinter before
it in a cache of its thread, where it cannot be joined to its neighbours again: a freed block of three megabytes is then
too small for the next one of three megabytes, and the heap grows (glibc bug 14581). docs/decisions/0009 has what it
comes to without that cache and without the bins that do the same. Both can only be set before a process starts, so the
command starts itself once more, under the same process number.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from luthier.hardware.accelerators import accelerator_signs

__all__ = ["TUNABLES", "settle", "settled_environment"]

TUNABLES = ":".join(
    f"glibc.malloc.{name}"
    for name in ("tcache_count=0", "mxfast=0", "mmap_max=0", "trim_threshold=17179869184", "top_pad=33554432")
)
_VARIABLE = "GLIBC_TUNABLES"
_TRAINING = ("demo", "train", "run", "eval")


def settled_environment(words: Sequence[str], environment: dict[str, str]) -> dict[str, str] | None:
    """The environment to start again with; None where there is no need: not training, or tunables of your own."""
    said = environment.get(_VARIABLE, "")
    if not any(word in _TRAINING for word in words[:1]) or "glibc.malloc." in said:
        return None
    return {**environment, _VARIABLE: f"{said}:{TUNABLES}" if said else TUNABLES}


def settle(words: Sequence[str]) -> None:
    """Start this command again where its allocator should be set first; comes back where it need not."""
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or accelerator_signs(Path("/")):
        return
    environment = settled_environment(words, dict(os.environ))
    if environment is not None:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606  (no shell is wanted)
