from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.faults.jobs import Server
from tests.faults.world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server that forks commands, and the runs that nothing happened to (read only)."""
    server = Server({})
    yield make_world(tmp_path_factory.mktemp("faults"), server)
    server.close()


@pytest.fixture
def tell(capfd: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line also where the test passes, and with several test processes (whose stdout is not shown)."""
    import sys

    def say(line: str) -> None:
        with capfd.disabled():
            sys.stderr.write(f"\n{line}\n")
            sys.stderr.flush()

    return say
