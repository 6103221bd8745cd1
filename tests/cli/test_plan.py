"""`luthier plan` from little: no torch, no weights, perhaps no tokenizer; for a machine that is not this one.

Each test starts a process of its own where what is imported, or the hub's environment, is at stake.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from tests import tiny
from tests.cli.command import Command, Ended

HEAVY = ("torch", "transformers", "bitsandbytes", "pyarrow", "huggingface_hub", "safetensors")
ROWS: list[dict[str, object]] = [
    {"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}, of course."} for i in range(40)
]
NEEDED = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SPY = """
import sys
from luthier.cli.main import main
sys.argv = ["luthier", *sys.argv[2:]]
try:
    main()
finally:
    named = {name.split(".")[0] for name in sys.modules}
    print("imported:", *(name for name in %r if name in named), file=sys.stderr)
"""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "rows.jsonl", ROWS)


def model(folder: Path, tiny_llama: Path, *left_out: str) -> Path:
    """The tiny llama without the files that are named."""
    shutil.copytree(tiny_llama, folder)
    for pattern in left_out:
        for path in folder.glob(pattern):
            path.unlink()
    return folder


def recipe(folder: Path, model: str | Path, more: str = "") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model: {model}\ndata: rows.jsonl\n{more}", encoding="utf-8")
    return path


def document(ended: Ended) -> dict[str, object]:
    """The one JSON document on stdout."""
    assert ended.code == 0, ended.err
    return cast("dict[str, object]", json.loads(ended.out))


def fresh(*words: object, home: Path, spy: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; the home and the hub's cache are in `home`."""
    start = ["-c", SPY % (HEAVY,), "luthier"] if spy else ["-m", "luthier"]
    kept = {name: value for name, value in os.environ.items() if name[:3] != "HF_"}
    ours = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **environment}
    command = [sys.executable, *start, *map(str, words)]
    return subprocess.run(
        command, cwd=home, env={**kept, **ours}, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("more", ["", "evaluate: {tasks: [exact]}\n", "train: {packing: true}\nquantize: nf4\n"])
def test_no_heavy_library_is_imported(tmp_path: Path, tiny_llama: Path, rows: Path, more: str) -> None:
    """Of a model that was read before: then nothing but our own pieces stands between the user and the plan."""
    made = recipe(tmp_path, tiny_llama, more)
    first = fresh("plan", made, home=tmp_path)
    assert first.returncode == 0, first.stderr
    for words in (("plan", made), ("plan", made, "--json")):
        second = fresh(*words, home=tmp_path, spy=True)
        assert second.returncode == 0, second.stderr
        assert second.stderr.splitlines()[-1] == "imported:"
        assert second.stdout


def test_the_plan_needs_no_weights(luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    bare = model(tmp_path / "bare", tiny_llama, "*.safetensors")
    with_weights = document(luthier("plan", recipe(tmp_path, tiny_llama), "--json"))
    without = document(luthier("plan", recipe(tmp_path, bare), "--json"))
    assert without["settings"] == with_weights["settings"]
    assert without["total_parameters"] == with_weights["total_parameters"]
    said = luthier("plan", recipe(tmp_path, bare))
    assert (said.code, "planned from the config alone; training needs the weights" in said.message) == (0, True)
    refused = luthier("train", recipe(tmp_path, bare))
    assert (refused.code, "has no model.safetensors" in refused.message) == (2, True)


def test_a_model_of_which_some_weights_are_missing(
    luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path
) -> None:
    """A download that was not completed, or is still going on."""
    half = model(tmp_path / "half", tiny_llama, "*.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    said = luthier("plan", recipe(tmp_path, half))
    assert (said.code, "model-00001-of-00002.safetensors" in said.message) == (0, True), said.err


@pytest.mark.parametrize("more", ["", "template: llama3\n", 'template: "Q: {question} A: {answer}"\n'])
def test_without_a_tokenizer_a_stand_in_counts(
    luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path, more: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_llama / "config.json", bare)
    made = recipe(tmp_path, bare, more)
    said = luthier("plan", made)
    assert said.code == 0, said.err
    assert "no tokenizer in" in said.message
    assert "upper estimates" in said.message
    found = document(luthier("plan", made, "--json"))
    assert any("no tokenizer in" in note for note in cast("list[str]", found["notes"]))
    decided = {one["setting"]: one["value"] for one in cast("list[dict[str, object]]", found["decisions"])}
    assert decided["model"] == str(bare)
    refused = luthier("train", made)
    assert refused.code == 2, refused.err


def cached(home: Path, name: str, files: dict[str, bytes]) -> Path:
    """The hub's cache as huggingface_hub lays it out, holding these files of one model."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for path, content in files.items():
        (snapshot / path).write_bytes(content)
    return snapshot


def test_a_hub_id_from_its_config_alone(tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    cached(tmp_path, "maker/tiny", {"config.json": (tiny_llama / "config.json").read_bytes()})
    made = recipe(tmp_path, "maker/tiny")
    planned = fresh("plan", made, "--json", home=tmp_path, spy=True)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["total_parameters"] > 0
    assert planned.stderr.splitlines()[-1] == "imported: huggingface_hub"
    trained = fresh("train", made, home=tmp_path)
    assert trained.returncode == 2, trained.stderr
    said = " ".join(trained.stderr.split())
    assert "only a part of the model maker/tiny (a plan fetches no weights), and HF_HUB_OFFLINE is set" in said
    assert "Connect once" in said


def test_a_hub_id_with_its_tokenizer(tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    cached(tmp_path, "maker/tiny", {name: (tiny_llama / name).read_bytes() for name in names})
    planned = fresh("plan", recipe(tmp_path, "maker/tiny"), home=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert "no tokenizer" not in planned.stderr + planned.stdout


def test_a_hub_id_that_is_not_here_and_no_network(tmp_path: Path, rows: Path) -> None:
    planned = fresh("plan", recipe(tmp_path, "maker/nothing"), home=tmp_path)
    assert planned.returncode == 2, planned.stderr
    said = " ".join(planned.stderr.split())
    assert "maker/nothing is neither a folder nor in the hub's cache" in said
    assert "HF_HUB_OFFLINE is set" in said


@pytest.mark.parametrize("key", NEEDED)
def test_a_config_without_a_field_that_is_needed(
    luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path, key: str
) -> None:
    folder = model(tmp_path / "model", tiny_llama)
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    ended = luthier("plan", recipe(tmp_path, folder))
    assert ended.code == 2
    assert f"{folder / 'config.json'}: `{key}` is missing" in ended.message
    assert "try:" in ended.message
    assert ended.out == ""


def test_a_config_without_several_fields_names_them_at_once(luthier: Command, tmp_path: Path, rows: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    ended = luthier("plan", recipe(tmp_path, folder))
    assert ended.code == 2
    assert "`vocab_size`, `intermediate_size`, `num_hidden_layers`, `num_attention_heads` are missing" in ended.message


def test_a_folder_without_a_config(luthier: Command, tmp_path: Path, rows: Path) -> None:
    (tmp_path / "model").mkdir()
    ended = luthier("plan", recipe(tmp_path, tmp_path / "model"))
    assert (ended.code, "has no config.json" in ended.message) == (2, True)


def test_data_are_needed(luthier: Command, tmp_path: Path, tiny_llama: Path) -> None:
    ended = luthier("plan", recipe(tmp_path, tiny_llama))
    assert (ended.code, "rows.jsonl" in ended.message) == (3, True)


def test_a_machine_of_the_catalogue(luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    found = document(luthier("plan", recipe(tmp_path, tiny_llama, "hardware: t4\n"), "--json"))
    device = cast("dict[str, object]", found["device"])
    assert (device["kind"], device["known_as"]) == ("cuda", "t4")
    many = document(luthier("plan", recipe(tmp_path, tiny_llama), "--json", "--hardware", "4xa100-40g"))
    assert cast("dict[str, object]", many["device"])["count"] == 4
    here = document(luthier("plan", recipe(tmp_path, tiny_llama), "--json"))
    assert cast("dict[str, object]", here["device"])["known_as"] is None


def test_a_machine_that_nobody_knows(luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    ended = luthier("plan", recipe(tmp_path, tiny_llama, "hardware: t5\n"))
    assert ended.code == 2
    assert "t5" in ended.message
    assert "t4" in ended.message, "the nearest name"
    assert ended.out == ""
    assert luthier("plan", recipe(tmp_path, tiny_llama), "--hardware", "t5").message == ended.message


@pytest.mark.parametrize("command", ["train", "run"])
def test_nothing_is_trained_for_another_machine(
    luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path, command: str
) -> None:
    ended = luthier(command, recipe(tmp_path, tiny_llama, "hardware: t4\n"))
    assert ended.code == 2
    assert "the recipe plans for t4; this machine trains for itself" in ended.message
    assert "--set hardware=this" in ended.message
    assert not (tmp_path / "runs").exists()


def test_json_is_one_document_of_the_plan(luthier: Command, tmp_path: Path, tiny_llama: Path, rows: Path) -> None:
    found = document(luthier("plan", recipe(tmp_path, tiny_llama), "--json"))
    assert {"schema", "settings", "decisions", "device", "trainable_parameters", "total_parameters"} <= set(found)
    for one in cast("list[dict[str, object]]", found["decisions"]):
        assert {"setting", "value", "reason", "source", "rejected"} <= set(one)
