"""Where the `luthier` command begins: sets the allocator first, which may start the process again, and then imports."""

from __future__ import annotations

import sys

from luthier.cli import allocator

__all__ = ["main"]


def main() -> None:
    """Run the command of `sys.argv`."""
    try:
        allocator.settle([word for word in sys.argv[1:] if word != "--debug"])
        from luthier.cli.main import main as run  # here: what is imported before the new start is imported twice
    except KeyboardInterrupt:
        sys.exit(130)
    run()
