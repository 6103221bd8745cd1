"""Data sets of the hub, through the real library: a folder laid out as on the hub, and what is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.data.hub import is_hub_id

CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
- config_name: extra
  data_files: extra/*.jsonl
---
"""
READ = """
import json, sys
from luthier.data.sources import open_sources
from luthier.errors import DataError
from luthier.recipe.schema import DataSource
for settings in json.loads(sys.argv[1]):
    try:
        (found,) = open_sources([DataSource(**settings)])
        texts = [[row.source.line, row.turns[0].content] for row in found.rows(1)]
        print(json.dumps([found.format, found.recognised, found.digest(), texts]))
    except DataError as error:
        print(json.dumps([error.message, error.remedy]))
"""


def read(home: Path, *settings: dict[str, object]) -> list[list[object]]:
    """What comes of each, in one process of its own: the library reads HF_HUB_OFFLINE once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    command = [sys.executable, "-c", READ, json.dumps(settings)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "set"
    (made / "extra").mkdir(parents=True)
    for name in ("train", "test"):
        chats = [
            {"messages": [{"role": "user", "content": f"{name} {i}"}, {"role": "assistant", "content": "a"}]}
            for i in range(3)
        ]
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (made / "extra" / "rows.jsonl").write_text('{"question": "q", "answer": "a"}\n' * 2)
    (made / "README.md").write_text(CARD)
    return made


def test_configurations_and_splits(tmp_path, folder):
    path = f"hf://{folder}"
    whole, streamed, test, extra = read(
        tmp_path / "home",
        {"path": path},
        {"path": path, "stream": True},
        {"path": path, "hub_split": "test"},
        {"path": path, "subset": "extra"},
    )
    assert whole[0] == "messages"
    assert whole[1] == "a data set of the hub, main, split train, recognised by messages"
    assert whole[3] == streamed[3] == [[2, "train 1"], [3, "train 2"]]
    assert "streamed" in streamed[1]
    assert test[3] == [[2, "test 1"], [3, "test 2"]]
    assert (extra[0], extra[3]) == ("question-answer", [[2, "q"]])
    assert whole[2] == streamed[2]
    assert len({whole[2], test[2], extra[2]}) == 3


def test_the_digest_changes_with_the_files(tmp_path, folder):
    settings = {"path": f"hf://{folder}"}
    (before,) = read(tmp_path / "home", settings)
    assert read(tmp_path / "home", settings)[0][2] == before[2]
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "new"}, {"role": "assistant", "content": "a"}]}\n')
    (after,) = read(tmp_path / "home", settings)
    assert after[3][-1] == [4, "new"]
    assert after[2] != before[2]


def test_what_is_not_there_has_its_own_message(tmp_path, folder):
    path = f"hf://{folder}"
    cases = {
        "the data set has no split 'nope'": ({"path": path, "hub_split": "nope"}, "`hub_split`; it has train, test"),
        "has no split 'never'": ({"path": path, "hub_split": "never", "stream": True}, "it has train, test"),
        "the data set has no subset 'nope'": ({"path": path, "subset": "nope"}, "set `subset`; it has main, extra"),
        "there is no folder": ({"path": f"hf://{tmp_path}/none"}, "hf://owner/name"),
        "someone/nothing: the data set is not on this computer, and HF_HUB_OFFLINE forbids to ask for it; and here is "
        "no file or folder": ({"path": "someone/nothing"}, "hf download someone/nothing --repo-type dataset"),
        "hf://someone/nothing: the data set is": ({"path": "hf://someone/nothing", "stream": True}, "data: hf:///"),
    }  # fmt: skip
    found = read(tmp_path / "home", *(settings for settings, _ in cases.values()))
    for (words, (_, remedy)), (message, said) in zip(cases.items(), found, strict=True):
        assert words in str(message)
        assert remedy in str(said)


def test_configurations_must_be_chosen_where_none_is_the_default(tmp_path, folder):
    (folder / "README.md").write_text(CARD.replace("  default: true\n", ""))
    (found,) = read(tmp_path / "home", {"path": f"hf://{folder}"})
    assert "several subsets, and none is named" in str(found[0])
    assert "main, extra" in str(found[1])


def test_a_data_set_that_is_a_program_is_refused(tmp_path, folder):
    (folder / "set.py").write_text("raise SystemExit('it ran')\n")
    (found,) = read(tmp_path / "home", {"path": f"hf://{folder}"})
    assert "no foreign code is run" in str(found[0])
    assert "Parquet" in str(found[1])


def test_a_library_that_would_run_it_is_refused(folder):
    code = READ.replace("import json, sys\n", "import json, sys, datasets; datasets.__version__ = '3.6.0'\n")
    command = [sys.executable, "-c", code, json.dumps([{"path": f"hf://{folder}"}])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "version 3.6.0, which runs foreign code" in done.stdout
    assert "luthier[data]" in done.stdout


def test_files_that_are_not_what_they_say(tmp_path, folder):
    (folder / "train.jsonl").write_text("{not json\n")
    (found,) = read(tmp_path / "home", {"path": f"hf://{folder}"})
    assert "its files cannot be read" in str(found[0])
    assert "JSONL" in str(found[1])


def test_the_library_that_is_missing_is_named():
    code = READ.replace("import json, sys\n", "import json, sys; sys.modules['datasets'] = None\n")
    command = [sys.executable, "-c", code, '[{"path": "owner/name"}]']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "need the library datasets" in done.stdout
    assert "luthier[data]" in done.stdout


def test_which_paths_are_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows").mkdir()
    assert is_hub_id("openai/gsm8k")
    assert is_hub_id("hf://openai/gsm8k")
    assert is_hub_id("owner/name.v2")
    for path in ("here/rows", "data/rows.jsonl", "data/rows.csv.gz", "./owner/name", "/owner/name", "a/b/c", "name"):
        assert not is_hub_id(path)
