"""Tokens and passwords are in no message, no traceback and no file of a run; control characters reach no terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from luthier.cli import console
from luthier.errors import Interrupted, UsageError
from luthier.guard.secrets import REDACTED, holds_secret, printable, redact
from luthier.train.display import make_display
from luthier.train.events import Event, EventLog, InterruptEvent, WarningEvent, tell
from tests.cli.command import Command
from tests.security.conftest import Refused

HF = "hf_" + "AbCdEfGhIj" * 3
OWN = "correct-horse-battery-staple"
LOOKS = {
    "Hugging Face": HF,
    "OpenAI": "sk-proj-" + "a1B2c3D4e5" * 4,
    "OpenAI, before projects": "sk-" + "a1B2c3D4e5" * 4,
    "Anthropic": "sk-ant-api03-" + "a1B2c3D4e5" * 4,
    "others of its kind": "sk-" + "0f1e2d3c4b5a6978" * 2,
    "GitHub": "ghp_" + "a1B2c3D4e5" * 3,
    "AWS": "AKIA" + "ABCD1234EFGH5678",
    "a header": "Authorization: Bearer abc.def-ghi_jkl",
    "an address": "https://anna:geheim@host.example/rows.jsonl",
    "a query": "https://host.example/rows?token=abcdef123",
}


@pytest.mark.parametrize("kind", LOOKS)
def test_what_looks_like_a_secret_is_taken_out(kind: str) -> None:
    text = redact(f"before {LOOKS[kind]} after")
    assert REDACTED in text
    assert text.startswith("before ")
    for part in ("AbCdEfGhIj", "a1B2c3D4e5", "ABCD1234EFGH5678", "abc.def-ghi_jkl", "geheim", "abcdef123", "0f1e2d"):
        assert part not in text


@pytest.mark.parametrize(
    "text",
    [
        *("model: meta-llama/Llama-3.1-8B", "/data/sk-learn-datasets-collection/rows.jsonl", "hf_model", "a:b@c"),
        *(
            "https://host.example:8080/path",
            "tokens_per_second 12.5",
            "git@host.example:owner/name",
            "sk-wikipedia_articles_2024_clean.jsonl",
            "sk-Wikipedia_Articles_clean.jsonl",
            "0123456789abcdef" * 4,
        ),
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text
    assert not holds_secret(text)


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"])
def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, OWN)
    assert redact(f"401 for {OWN}!") == f"401 for {REDACTED}!"


def test_settings_with_such_names_are_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").touch()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("TOKEN_SECONDS", "86400000")
    text = f"false {tmp_path / 'token'} 86400000"
    assert redact(text) == text


@pytest.mark.parametrize("value", ["/9j+QmFzZTY0/secret+of/forty+letters/and/ten", "493817264950"])
def test_what_begins_like_a_path_or_is_all_digits_may_be_one(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SOME_SECRET", value)
    assert redact(f"said {value}!") == f"said {REDACTED}!"


def test_an_error_is_shown_without_them(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", OWN)
    console.print_error(
        UsageError(f"the hub refused {OWN} and {HF}\x1b[2J\x1b]0;owned\x07\r\u202e", f"use another than {OWN}")
    )
    shown = capfd.readouterr().err
    assert OWN not in shown
    assert HF not in shown
    assert "\x1b" not in shown.replace("\x1b[1;31m", "").replace("\x1b[0m", "").replace("\x1b[1m", "")
    assert "\\x1b[2J" in shown
    assert "\u202e" not in shown


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_no_command_shows_them(
    luthier: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, debug: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_TOKEN", OWN)
    (tmp_path / f"{OWN}.yaml").write_text(f"model: sprig\ndata: {HF}\n", encoding="utf-8")
    if debug:
        done = subprocess.run(
            [sys.executable, "-m", "luthier", "plan", f"{OWN}.yaml", *debug],
            capture_output=True,
            text=True,
            check=False,
        )
        code, shown = done.returncode, done.stdout + done.stderr
        assert "Traceback" in shown
    else:
        ended = luthier("plan", f"{OWN}.yaml")
        code, shown = ended.code, ended.out + ended.err
    assert code != 0
    assert OWN not in shown
    assert HF not in shown
    assert REDACTED in shown


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (f"model: {HF}\ndata: pirate\n", "`model` holds what looks like a token"),
        ("model: sprig\ndata: https://anna:geheim@host/rows.jsonl\n", "`data.0.path` holds what looks like a token"),
        (f'model: sprig\ndata: pirate\ntemplate: "{{q}} {HF} {{a}}"\n', "`template` holds what looks like a token"),
        (f"model: sprig\ndata: pirate\ntrain: {{stop_file: /x/{HF}}}\n", "`train.stop_file` holds what looks like a"),
        (f"model: sprig\ndata: {{path: pirate, fields: {{question: {HF}}}}}\n", "holds what looks like a token"),
    ],
)
def test_a_recipe_with_one_is_refused(refused: Refused, tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    ended = refused(("train", "recipe.yaml"), where, try_said=False)
    assert HF not in ended.err
    assert "geheim" not in ended.err
    assert not (tmp_path / "runs").exists()


def no_secret_in(text: str) -> None:
    assert REDACTED in text
    for secret in (OWN, HF, "geheim", "\x1b"):
        assert secret not in text


SAYS = f"401 for {OWN} of {HF} at https://anna:geheim@host/x: \x1b[2Jowned"


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """The kinds of event that hold words."""
    monkeypatch.setenv("HF_TOKEN", OWN)
    return [WarningEvent(step=1, message=SAYS), InterruptEvent(step=1, signal="", reason=f"the stop file {SAYS}")]


def test_no_event_holds_them(events: list[Event], tmp_path: Path) -> None:
    """Made without them, so neither the log nor a listener, a tracker say, is told."""
    for event in events:
        no_secret_in(repr(event))
    with EventLog.opened(tmp_path / "events.jsonl") as log:
        for event in events:
            log.write(event)
    for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines():
        no_secret_in(line)


def test_no_display_shows_them(events: list[Event], capfd: pytest.CaptureFixture[str]) -> None:
    display = make_display()
    tell(display, events[0])
    display.close()
    no_secret_in(capfd.readouterr().err)


def test_no_interruption_shows_them(luthier: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor the document of `--json` that tells of it."""
    monkeypatch.setenv("HF_TOKEN", OWN)

    def stop(*_: object) -> None:
        raise Interrupted(SAYS, SAYS)

    monkeypatch.setattr("luthier.cli.commands._load", stop)
    (tmp_path / "recipe.yaml").write_text("model: sprig\ndata: pirate\n", encoding="utf-8")
    ended = luthier("train", "recipe.yaml", "--json")
    assert ended.code == Interrupted.exit_code
    no_secret_in(ended.err)
    no_secret_in(ended.out)


def test_no_file_of_a_run_holds_them(
    luthier: Command, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor the cache: with tokens in the environment, where libraries look for them."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, f"{OWN}-{name}")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    for words in (("train", "recipe.yaml", "--out", "run"), ("merge", "run"), ("verify", "run", "--json")):
        ended = luthier(*words)
        assert ended.code == 0, ended.err
        assert OWN not in ended.out + ended.err
    written = [path for place in ("run", "cache") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert len(written) > 20
    for path in written:
        assert OWN.encode() not in path.read_bytes(), path


def test_no_table_moves_the_cursor(luthier: Command, tmp_path: Path) -> None:
    """Names of files, of columns, and what stands in rows."""
    name = "rows\x1b[2J\u202e.jsonl"
    rows = [{"question": f"What is {n}?\x1b[2J", "answer": f"It is\x07 {n}."} for n in range(8)]
    rows.append({"question": "", "answer": "\x1b]0;owned\x07"})
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for words in (("data", "check", name), ("data", "show", name, "--model", "sprig")):
        ended = luthier(*words)
        shown = ended.out + ended.err
        assert "x1b[2J" in shown, shown
        assert not set("\x1b\x07\u202e") & set(shown)


def test_no_answer_moves_the_cursor(luthier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to a terminal; in a file stands what the model said."""
    from luthier.generate.generate import Completion, answer_all

    def said(*arguments: object, on_text: Callable[[int, str], None], **more: object) -> list[Completion]:
        on_text(0, "a\x1b[2Jb")
        return answer_all(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("luthier.cli.talk.answer_all", said)
    for terminal, expected in ((True, "a\\x1b[2Jb"), (False, "a\x1b[2Jb")):
        monkeypatch.setattr("sys.stdout.isatty", lambda terminal=terminal: terminal)
        ended = luthier("generate", "sprig", "--prompt", "hello", "--max-tokens", "1")
        assert ended.code == 0, ended.err
        assert expected in ended.out


def test_line_breaks_and_tabs_stay() -> None:
    assert printable("a\n\tb é 你好 🦙 \x1b[31m\x00") == "a\n\tb é 你好 🦙 \\x1b[31m\\x00"


NOT_UTF8 = os.fsdecode(b"caf\xe9.yaml")


def test_names_that_are_not_in_utf8(luthier: Command, tmp_path: Path) -> None:
    """Such as other systems, or older ones, give; Python has halves of surrogate pairs for their bytes."""
    ended = luthier("plan", NOT_UTF8, "--json")
    assert ended.code == 2, ended.err
    assert "caf\\udce9.yaml: there is no such recipe file" in json.loads(ended.out)["error"]["message"]
    with EventLog.opened(tmp_path / "events.jsonl") as log:
        log.write(WarningEvent(step=1, message=f"cannot read {NOT_UTF8}"))
    (line,) = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["message"] == "cannot read caf\\udce9.yaml"


def test_a_recipe_of_such_a_name_is_planned(luthier: Command, tmp_path: Path) -> None:
    (tmp_path / NOT_UTF8).write_text("model: sprig\ndata: pirate\n", encoding="utf-8")
    for words in ((), ("--json",)):
        ended = luthier("plan", NOT_UTF8, *words)
        assert ended.code == 0, ended.err
    assert json.loads(ended.out)


def test_no_traceback_moves_the_cursor(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "luthier", "plan", "a\x1b[2J\u202e.yaml", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "\n    " in done.stderr, "line breaks stay"
    assert "a\\x1b[2J\\u202e.yaml" in done.stderr
    assert not {"\x1b", "\u202e"} & set(done.stderr)
