"""`luthier export` verifies what it writes, `--verify` later too, and `luthier merge` in all its ways; on sprig."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from luthier.model.locate import locate_model
from tests.cli.command import Command

RECIPE = """\
model: sprig
data: pirate
quantize: {quantize}
adapter: {{rank: 4, alpha: 8}}
train: {{steps: 6, batch_size: 8, learning_rate: 2.0e-3, eval_every: 6}}
evaluate: {{samples: 1}}
export: []
"""


def trained(folder: Path, quantize: str) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.format(quantize=quantize))
    command = [sys.executable, "-m", "luthier", "train", "recipe.yaml", "--out", "run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("plain"), "none")


@pytest.fixture(scope="module")
def qlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("qlora"), "nf4")


def test_an_export_is_verified_in_little_time(run: Path) -> None:
    """Processor time, not a clock's: it holds on a machine that others use too."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "luthier", "export", str(run), "--to", "hf", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"] is True
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 20.0
    found = json.loads((run / "exports/hf/verify.json").read_text())
    assert found["passed"] is True
    assert found["tokens_identical"] is True
    assert found["argmax_agreement"] >= found["threshold"] == 0.995
    assert found["source"] == "held-out rows of the run"
    assert found["runtime"].startswith("transformers ")
    card = (run / "exports/hf/README.md").read_text()
    for said in ("| train | 800 |", "question-answer", "model: sprig", "| adapter.rank | 4 |"):
        assert said in card
    assert str(locate_model("sprig").parent) not in card


def test_what_was_changed_afterwards_is_found(run: Path, luthier: Command) -> None:
    assert luthier("export", run, "--to", "hf").code == 0
    assert luthier("export", run, "--verify").code == 0
    path = run / "exports/hf/model.safetensors"
    whole, weights = path.read_bytes(), load_file(path)
    weights["model.layers.1.self_attn.o_proj.weight"] *= 0.0
    save_file(weights, path, {"format": "pt"})
    ended = luthier("export", run, "--verify", "--json")
    assert ended.code == 6, ended.err
    assert "is not the model that was trained" in json.loads(ended.out)["error"]["message"]
    found = json.loads((run / "exports/hf/verify.json").read_text())
    assert found["passed"] is False
    assert found["first_difference"]["expected"] != found["first_difference"]["found"]
    path.write_bytes(whole)
    assert luthier("export", run, "--to", "hf", "--verify").code == 0


def test_an_adapter_of_another_base_is_refused(run: Path, luthier: Command) -> None:
    path = run / "adapter/base.json"
    noted = path.read_text()
    path.write_text(json.dumps(json.loads(noted) | {"weights": "0" * 64}))
    ended = luthier("merge", run)
    path.write_text(noted)
    assert ended.code == 6, ended.err
    assert "fingerprint" in ended.message


def test_without_verification(run: Path, luthier: Command) -> None:
    ended = luthier("merge", run, "--no-verify", "--json")
    assert ended.code == 0, ended.err
    assert "verified" not in json.loads(ended.out)
    assert not (run / "exports/hf/verify.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export",), "nothing says what to export to"),
        (("export", "--verify", "--to", "cassette"), "no export 'cassette'"),
        (("export", "--verify", "--quantize", "f16"), "--quantize is for an export"),
        (("export", "--verify", "--to", "ollama"), "no export ollama to verify"),
        (("export", "--to", "gguf", "--push", "me/mine"), "--push is for --to hf"),
        (("export", "--to", "hf", "--no-verify", "--push", "me/mine"), "--push is for --to hf, verified"),
        (("export", "--to", "hf", "--push", "mine"), "'mine' is not a name on the hub"),
        (("merge", "--onto-quantised"), "not quantised in training"),
        (("merge", "--undo", "--reversible"), "no other option"),
    ],
)
def test_what_cannot_be_asked(run: Path, luthier: Command, words: tuple[str, ...], said: str) -> None:
    ended = luthier(words[0], run, *words[1:])
    assert (ended.code, said in ended.message) == (2, True), ended.err


def test_a_run_without_rows_is_verified_on_other_texts(run: Path, luthier: Command, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    recipe = tmp_path / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("pirate", "gone.jsonl"))
    assert luthier("export", tmp_path / "run", "--to", "hf").code == 0
    found = json.loads((tmp_path / "run/exports/hf/verify.json").read_text())
    assert (found["passed"], found["source"]) == (True, "questions of our own")


@pytest.mark.parametrize(
    ("token", "code", "said"), [(None, 2, "needs a login"), ("hf_x", 6, "pushing to me/mine failed")]
)
def test_a_push_that_cannot_be(
    run: Path,
    luthier: Command,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    token: str | None,
    code: int,
    said: str,
) -> None:
    """Without a login, and without a network (tests are offline): the export is whole all the same."""
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    ended = luthier("export", run, "--to", "hf", "--push", "me/mine")
    assert (ended.code, said in ended.message) == (code, True), ended.err
    assert json.loads((run / "exports/hf/verify.json").read_text())["passed"] is True


def test_both_merges_of_a_qlora_run_with_their_losses(qlora: Path, luthier: Command) -> None:
    ended = luthier("merge", qlora, "--json")
    assert ended.code == 0, ended.err
    made = json.loads(ended.out)
    assert made["onto"] == "16-bit"
    losses = made["held_out_loss"]
    assert set(losses) == {"trained", "onto_16bit", "onto_quantised", "rows"}
    # One rounding to bf16 apart; the other merge has other weights.
    assert abs(losses["onto_quantised"] - losses["trained"]) < 0.02
    assert losses["onto_16bit"] != losses["trained"]
    weights = load_file(qlora / "exports/hf/model.safetensors")
    ended = luthier("merge", qlora, "--onto-quantised", "--reversible", "--json")
    assert ended.code == 0, ended.err
    again = json.loads(ended.out)
    assert (again["onto"], again["verified"]) == ("nf4", True)
    assert again["held_out_loss"] == losses
    other = load_file(qlora / "exports/hf/model.safetensors")
    assert all(bool((weights[name] != other[name]).any()) == ("_proj" in name) for name in weights)
    assert "as NF4 rounds them" in (qlora / "exports/hf/README.md").read_text()
    assert luthier("merge", qlora, "--undo").code == 0
    base, back = locate_model("sprig") / "model.safetensors", qlora / "exports/base/model.safetensors"
    assert hashlib.sha256(back.read_bytes()).digest() == hashlib.sha256(base.read_bytes()).digest()


PROGRAMS = {"gguf": "llama_cpp", "ollama": "llama_cpp", "ollama-adapter": "llama_cpp", "mlx": "mlx_lm"}
WEIGHTS = {"mlx": {"": "BF16", "4": "4-bit", "8": "8-bit"}, "mlx-adapter": {"": "BF16", "8": "8-bit"}}


@pytest.mark.llama_cpp
@pytest.mark.mlx
@pytest.mark.parametrize(
    ("kind", "quantize"),
    [
        *(
            ("gguf", "f16"),
            ("gguf", "q4_k_m"),
            ("ollama", "q8_0"),
            ("ollama-adapter", "f16"),
            ("mlx", ""),
            ("mlx", "8"),
        ),
        *(("mlx", "4"), ("mlx-adapter", ""), ("mlx-adapter", "8")),
    ],
)
def test_each_kind_in_its_own_program(run: Path, luthier: Command, kind: str, quantize: str) -> None:
    _needs(PROGRAMS.get(kind, "mlx_lm"))
    ended = luthier("export", run, "--to", kind, *(("--quantize", quantize) if quantize else ()), "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["verified"] is True
    found = json.loads((run / "exports" / kind / "verify.json").read_text())
    weights = WEIGHTS.get(kind, {}).get(quantize, quantize.upper())
    assert (found["passed"], found["weights"].replace("MOSTLY_", "")) == (True, weights)
    assert found["tokens_identical"] is True
    assert found["argmax_agreement"] >= (0.9 if quantize in ("4", "q4_k_m") else 0.98)
    assert ("adapter" in found["against"]) == ("adapter" in kind)
    if kind.startswith("ollama"):
        assert found["modelfile"]["identical"] is (True if shutil.which("go") else None)


@pytest.mark.llama_cpp
def test_another_template_in_the_modelfile_is_found(run: Path, luthier: Command) -> None:
    _needs("llama_cpp")
    _needs("go")
    assert luthier("export", run, "--to", "ollama").code == 0
    path = run / "exports/ollama/Modelfile"
    text = path.read_text()
    changed = text.replace("<|start_header_id|>user", "<|start_header_id|>man")
    assert changed != text
    path.write_text(changed)
    ended = luthier("export", run, "--verify", "--to", "ollama")
    path.write_text(text)
    assert (ended.code, "template in Go: expected 'user<|end_header_id|>" in ended.message) == (6, True), ended.err


def _needs(program: str) -> None:
    there = shutil.which(program) if program == "go" else importlib.util.find_spec(program)
    if not there and os.environ.get("CI", "").lower() == "true":
        raise RuntimeError(f"{program} is not installed, and in CI it must be")
    if not there:
        pytest.skip(f"{program} is not installed")


@pytest.mark.llama_cpp
def test_each_file_is_asked_and_what_was_found_belongs_to_the_file_that_is_there(run: Path, luthier: Command) -> None:
    _needs("llama_cpp")
    shutil.rmtree(run / "exports/gguf", ignore_errors=True)
    for kind in ("f16", "q4_0"):
        assert luthier("export", run, "--to", "gguf", "--quantize", kind).code == 0
    small, document = run / "exports/gguf/model-q4_0.gguf", run / "exports/gguf/verify.json"
    whole = small.read_bytes()
    small.write_bytes(whole[: len(whole) // 2])
    ended = luthier("export", run, "--verify", "--to", "gguf")
    assert (ended.code, "cannot open it" in ended.message) == (6, True), ended.err
    found = {one["file"]: one["passed"] for one in json.loads(document.read_text())["models"]}
    assert found == {"model-f16.gguf": True, "model-q4_0.gguf": False}
    # Another file that fails says nothing of the one that was asked.
    again = luthier("export", run, "--to", "gguf", "--quantize", "f16", "--json")
    assert (again.code, json.loads(again.out)["verified"]) == (0, True)
    # A file that is written anew without being asked has no result any more.
    assert luthier("export", run, "--to", "gguf", "--quantize", "f16", "--no-verify").code == 0
    assert [one["file"] for one in json.loads(document.read_text())["models"]] == ["model-q4_0.gguf"]
    shutil.rmtree(run / "exports/gguf")


def test_exports_of_an_older_adapter_are_not_verified(run: Path, luthier: Command, tmp_path: Path) -> None:
    assert luthier("export", run, "--to", "hf").code == 0
    copied = shutil.copytree(run, tmp_path / "run")
    path = copied / "adapter/adapter_model.safetensors"
    save_file({name: one * 1.5 for name, one in load_file(path).items()}, path, {"format": "pt"})
    ended = luthier("export", copied, "--verify")
    assert (ended.code, "made of another adapter" in ended.message) == (6, True), ended.err


@pytest.mark.parametrize("words", [("--install", "--to", "ollama"), ("--split", "--to", "gguf"), ("--push", "me/mine")])
def test_verify_writes_nothing(run: Path, luthier: Command, words: tuple[str, ...]) -> None:
    ended = luthier("export", run, "--verify", *words)
    assert (ended.code, "--verify writes nothing" in ended.message) == (2, True), ended.err
