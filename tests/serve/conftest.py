from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from luthier.serve.models import Served
from tests import tiny
from tests.serve.world import Running, served, serving


@pytest.fixture(scope="session")
def tiny_served(tiny_llama: Path) -> Served:
    """The tiny model, ready to be served."""
    return served(tiny_llama)


@pytest.fixture(scope="session")
def long_served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A tiny model whose context is so long that an answer goes on until it is ended."""
    folder = tiny.make_model(tmp_path_factory.mktemp("serve") / "long", max_position_embeddings=2**17)
    return served(folder, "long")


@pytest.fixture(scope="module")
def running(tiny_served: Served) -> Iterator[Running]:
    """A server of the tiny model with ordinary limits."""
    with serving([tiny_served]) as found:
        yield found
