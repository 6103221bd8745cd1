"""Compiles the C kernels when the package is built. Everything else about the package stands in pyproject.toml.

They are plain shared libraries that ctypes opens, one for each instruction set (hardware/compiled.py chooses among
them). Where there is no compiler, or one that does not know an instruction set, that library is left out with a warning
and the package works without it, more slowly.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup

FOLDER = Path("src/luthier/kernels/native")
FLAGS = [
    *("-std=c11", "-O3", "-fvisibility=hidden", "-fopenmp"),
    # What sums in vectors need of -ffast-math; infinities and NaN keep their meaning.
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros", "-freciprocal-math"),
    "-ffp-contract=fast",
]
WIDE = "-mprefer-vector-width=512"
VARIANTS = {
    "avx512_bf16": ["-march=x86-64-v4", "-mavx512bf16", WIDE],
    "avx512": ["-march=x86-64-v4", WIDE],
    "avx2": ["-march=x86-64-v3"],
}


def extension(variant: str, flags: list[str]) -> Extension:
    return Extension(
        f"luthier.kernels.native._{variant}",
        [str(FOLDER / "kernels.c")],
        depends=[str(header) for header in FOLDER.glob("*.h")],
        extra_compile_args=[*FLAGS, *flags],
        extra_link_args=["-fopenmp"],
        libraries=["m"],
        optional=True,
    )


variants = VARIANTS if platform.machine() in ("x86_64", "AMD64") else {}
setup(ext_modules=[extension(name, flags) for name, flags in {**variants, "plain": []}.items()])
