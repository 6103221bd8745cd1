"""Which part may import which: DESIGN's directions, read from the source, so a forbidden import fails by name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "luthier"

# Part -> the parts of ours it may import. errors, runs, lock (beside runs), guard (what stands before every file from
# elsewhere: whoever reads one needs it) and the package's own version are open to all; guard imports errors and nothing
# else.
OPEN = {"errors", "runs", "lock", "guard", ""}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "guard": set(),
    "runs": set(),
    "lock": set(),  # beside runs: whoever writes into a run directory may hold it
    "recipe": set(),
    "hardware": set(),
    "model.config": set(),
    "plan": {"recipe", "hardware", "model.config"},
    "kernels": {"hardware", "recipe"},  # the compiled ones that this processor runs; how far rows are filled up
    "data": {"recipe"},
    "model": {"recipe", "kernels", "model.config"},
    "train": {"plan", "data", "model", "model.config", "kernels", "recipe", "hardware", "evaluate.loss"},
    "generate": {"data", "model", "model.config", "kernels"},
    "evaluate": {"data", "model", "model.config", "kernels", "generate", "recipe", "evaluate.loss"},
    "evaluate.loss": {"data", "model", "model.config", "kernels"},
    "serve": {"data", "model", "model.config", "generate"},
    # An export is verified by what it says (generate) and by its loss (evaluate.loss); neither imports export.
    "export": {"data", "model", "model.config", "recipe", "generate", "evaluate.loss"},
    "__main__": {"cli"},
    "cli": {
        "recipe",
        "hardware",
        "plan",
        "data",
        "model",
        "model.config",
        "train",
        "generate",
        "evaluate",
        "evaluate.loss",
        "export",
        "serve",
        "kernels",
    },
}
TORCH_FREE = ("recipe", "hardware", "plan", "cli", "guard")
HEAVY = ("torch", "transformers", "bitsandbytes", "gguf", "safetensors", "huggingface_hub", "tokenizers")

FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """`luthier.model.config` -> `model.config` (a part of its own), `luthier.model.lora` -> `model`."""
    inner = module.removeprefix("luthier").removeprefix(".")
    for special in ("model.config", "evaluate.loss"):
        if inner == special or inner.startswith(special + "."):
            return special
    return inner.split(".")[0]


def module_of(file: Path) -> str:
    parts = ("luthier", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> list[tuple[str, int, bool]]:
    """(module, line, at import time) of every import; those under `if TYPE_CHECKING` cost nothing and are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: list[tuple[str, int, bool]] = []

    def visit(node: ast.AST, eager: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in child.orelse:
                    visit(other, eager)
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{file}:{child.lineno}: relative imports hide the direction"
                found.append((child.module or "", child.lineno, eager))
                # `from luthier import runs` names a part, not a value
                if child.module == "luthier":
                    found.extend((f"luthier.{alias.name}", child.lineno, eager) for alias in child.names)
            visit(child, eager and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(tree, True)
    return found


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_go_one_way(file: Path) -> None:
    mine = part_of(module_of(file))
    if mine == "":
        return
    assert mine in ALLOWED, f"{mine} has no line in ALLOWED: say what it may import"
    for module, line, _ in imports(file):
        if module.split(".")[0] == "luthier":
            other = part_of(module)
            assert other in ALLOWED[mine] | OPEN | {mine}, f"{file.name}:{line}: {mine} must not import {other}"


@pytest.mark.parametrize(
    "file", [f for f in FILES if part_of(module_of(f)) in {*TORCH_FREE, "model.config"}], ids=module_of
)
def test_torch_free_parts_import_nothing_heavy(file: Path) -> None:
    for module, line, eager in imports(file):
        assert not (eager and module.split(".")[0] in HEAVY), f"{file.name}:{line}: {module} makes `--help` slow"


def test_help_starts_without_torch() -> None:
    code = (
        "import sys; from luthier.cli.main import app\n"
        "import luthier.recipe.load, luthier.plan.choose, luthier.hardware.probe, luthier.model.config\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_guard_imports_nothing_of_ours_but_errors() -> None:
    for file in (PACKAGE / "guard").glob("*.py"):
        for module, line, _ in imports(file):
            if module.split(".")[0] == "luthier":
                assert part_of(module) in {"errors", "guard"}, f"{file.name}:{line}: guard must not import {module}"
