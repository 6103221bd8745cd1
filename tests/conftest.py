"""Fixtures shared by all tests, and where the real data and vocabulary lie."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before any import of the Hugging Face libraries: tests never go to the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors on busy cores: threads that wait for one another cost twenty times what they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As the training commands set it for themselves by starting once more (cli/allocator.py), which no test process may do.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0")

import pytest

from luthier.hardware.calibrate import calibrate, estimate_rates
from luthier.hardware.probe import this_device
from tests import tiny

# Begun by nohup, or in the background of a shell, they are ignored here and in every process that a test starts.
for _number, _usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _usual)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data goes to a folder of this test session, never to the user's cache. This machine's speed is there
    already, estimated: training commands would measure it for three seconds first."""
    os.environ["LUTHIER_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("luthier.hardware.measure.measure", lambda device, *_: estimate_rates(device))
        calibrate(this_device())


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and Llama 3's vocabulary; the test skips, and says so, where it is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"the folder {SHARED.name}/ with real data is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random untied llama in transformers' layout (read only: share it, do not write into it)."""
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "llama")
