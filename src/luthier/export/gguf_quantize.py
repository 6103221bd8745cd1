"""K-quants: a GGUF file in 16 bits -> one of llama.cpp's super-block types, by llama.cpp's own quantiser.

    python … child:  llama_cpp.llama_model_quantize(16-bit file, new file, type)

It runs in a process of its own: a failed assertion in C++ ends that process and not the export, a signal can end it at
any time, and what it logs is read where it fails. The child ends with its parent, whose end it sees on its standard
input.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import NoReturn

from luthier.errors import ExportError
from luthier.export.gguf_types import K_QUANTS, Quantize

__all__ = ["check_quantiser", "quantise"]

_INSTALL = (
    'pip install "luthier[llama-cpp]" (it compiles llama.cpp, for which it needs a C++ compiler), or --quantize q8_0'
)
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    "from luthier.export.gguf_quantize import child; child()"
)
_LOGGED = 8
"""Of what llama.cpp says: the last lines are shown where it fails."""


def check_quantiser(quantize: Quantize) -> None:
    """Raise ExportError where `quantize` needs llama.cpp's quantiser and it is not installed."""
    if quantize in K_QUANTS and importlib.util.find_spec("llama_cpp") is None:
        raise ExportError(
            f"{quantize} is made by llama.cpp's quantiser, and llama-cpp-python is not installed", _INSTALL
        )


def quantise(source: Path, target: Path, quantize: Quantize, *, parts: bool, threads: int) -> None:
    """Write the GGUF file `source` as the K-quant `quantize` to `target`.

    With `parts`, `source` is the first of several files, and `target` is the beginning of as many names, each ending
    in -00001-of-0000N.gguf. Raises ExportError where llama.cpp refuses, with what it said.
    """
    check_quantiser(quantize)
    # -I, and then this process's own path: a folder of the user's must not stand before the libraries.
    command = [sys.executable, "-I", "-c", _START, json.dumps(sys.path)]
    command += [str(source), str(target), quantize, str(int(parts)), str(threads)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(  # noqa: S603  (this interpreter; no shell)
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said
        )
        try:
            code = process.wait()
        finally:  # a signal: what was written is of no use any more
            process.kill()
            process.communicate()
        said.seek(0)
        log = said.read().decode(errors="replace")
    if code != 0:
        _failed(quantize, code, log)


def _failed(quantize: Quantize, code: int, said: str) -> NoReturn:
    if "iostream error" in said:  # all that C++ says of a write that failed
        raise ExportError(
            f"llama.cpp could not write {quantize}: the disk is full, or fails", "Free some room and export again."
        )
    how = f"was ended by signal {-code}" if code < 0 else "gave up"
    last = [line for line in said.splitlines() if line.strip()][-_LOGGED:]
    raise ExportError(
        "\n  ".join([f"llama.cpp's quantiser {how} while it wrote {quantize}:", *last]),
        "Export with --quantize q8_0, which needs no llama.cpp.",
    )


def child() -> None:
    """The other process: argv is source, target, type, whether in parts, threads."""
    import ctypes

    import llama_cpp

    def watch() -> None:
        sys.stdin.buffer.read()  # returns when the parent is no more
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    source, target, quantize, parts, threads = sys.argv[1:]
    types = {
        "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
        "q5_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
        "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = types[quantize]
    settings.nthread = int(threads)
    settings.keep_split = parts == "1"
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings))
    sys.stderr.flush()
    os._exit(1 if code else 0)
