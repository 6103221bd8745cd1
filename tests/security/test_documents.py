"""Documents made to take memory or time without end, or to mean two things: YAML, JSON, templates, tokenizers."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path
from typing import cast

import pytest

from luthier.errors import FileError
from luthier.export.huggingface import base_license
from luthier.guard.documents import read_object
from luthier.guard.tokenizer import check_tokenizer, probe
from tests import tiny
from tests.security.conftest import Refused

TRAIN, PLAN = ("train", "recipe.yaml"), ("plan", "recipe.yaml")
BASE = "model: sprig\ndata: pirate\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
BOMBS = {
    "aliases": (LAUGHS, "the anchor `&a` is not allowed in a recipe"),
    "merge keys": (BASE + "x: &x {a: 1}\ntrain:\n  <<: *x\n", "is not allowed in a recipe"),
    "depth, flow": (BASE + "export: " + "[" * 100_000 + "]" * 90_000, "nested deeper than 12 levels"),
    "depth, block": (BASE + "\n".join(" " * n + "a:" for n in range(600)), "nested deeper than 12 levels"),
    "depth, lists": (BASE + "export:\n" + "- " * 50_000 + "a", "nested deeper than 12 levels"),
    "size": (BASE + "x: " + "y" * 10**6, "characters is too much for a recipe"),
    "settings without end": (BASE + "\n".join(f"s{n}: 1" for n in range(15_000)), "more than 5,000 values and names"),
    "a list without end": (BASE + f"export: [{'hf, ' * 49_000}hf]", "name a folder under `data` instead of its files"),
    "a batch without end": (BASE + "train: {batch_size: 100000000007, micro_batch: 99999999977}", "does not divide"),
    "an object of Python's": (BASE + "seed: !!python/object/apply:os.system ['touch marker']", "the tag"),
    "an object by its name": (BASE + "seed: !!python/name:os.system", "the tag"),
    "a number of many digits": (BASE + "seed: " + "9" * 100_000, "`seed` must be a whole number"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_yaml_bombs(refused: Refused, tmp_path: Path, bomb: str) -> None:
    text, said = BOMBS[bomb]
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    began = time.process_time()
    ended = refused(PLAN, said, try_said=False)
    assert time.process_time() - began < 2
    assert len(ended.err) < 20_000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": ' + "[" * 50_000 + "]" * 50_000 + "}", "is not valid JSON|nested deeper"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "is nested deeper than 32 levels"),
        ('{"model_type": "llama", "model_type": "gpt2"}', "gives 'model_type' twice, with two values"),
        ('{"a": true, "a": 1}', "gives 'a' twice"),
        ('{"a": NaN}', "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "too large for what it may say|is not valid JSON"),
        ('{"a": 1e999}', "too large for what it may say|is not valid JSON"),
        ('{"a": "\\ud800"}', "is not valid JSON"),
        ('{"a": [' + "0," * 2_500_000 + "0]}", "more than 2,000,000 entries"),
        ("[]", "does not hold a JSON object"),
        (" " * (2**24 + 1), "a file of this kind has at most 16,777,216"),
    ],
)
def test_json_that_is_more_than_a_document(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(FileError, match=said):
        read_object(tmp_path / "config.json")


def test_the_same_value_twice_is_let_through(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": [1, {"b": 2.5}], "a": [1, {"b": 2.5}]}', encoding="utf-8")
    assert read_object(tmp_path / "config.json") == {"a": [1, {"b": 2.5}]}


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 2**31 - 2, "intermediate_size": 2**20},
        {"vocab_size": 2**31 - 1, "hidden_size": 2**20},
        {"head_dim": 2**30},
    ],
)
def test_a_config_whose_sizes_multiply(refused: Refused, model: Path, changes: dict[str, int]) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    refused(PLAN, "its sizes make a model of", "which no machine holds")


@pytest.mark.parametrize("size", [10**9, 2**40])
def test_a_config_with_more_layers_than_can_be(refused: Refused, model: Path, size: int) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": size}), encoding="utf-8")
    refused(PLAN, "`num_hidden_layers` is", "it must be at most 4,096")


ESCAPES = {
    "subclasses": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for what no template may"),
    "attr": ("{{ (''|attr('__class__')).__base__ }}", "chat template"),
    "globals": ("{{ raise_exception.__globals__['os'].system('touch marker') }}", "reaches for what no template may"),
    "builtins": (
        "{{ cycler.__init__.__globals__.os.popen('touch marker').read() }}",
        "reaches for what no template may",
    ),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", "reaches for what no template may"),
    "changes what it is given": ("{{ messages.append(messages[0]) }}", "reaches for what no template may"),
    "reads a file": ("{% include '/etc/passwd' %}", "chat template"),
    "grows": ("{{ 'a' * 10**10 }}", "the chat template grows without bound"),
    "does not end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "to an end within",
    ),
    "is long": ("{# " + "a" * 300_000 + " #}", "at most 262,144 are compiled"),
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_templates_that_reach_out(refused: Refused, model: Path, escape: str) -> None:
    source, said = ESCAPES[escape]
    (model / "chat_template.jinja").write_text(source, encoding="utf-8")
    refused(PLAN, said, code=3)


FRONTS = {
    "merge keys that multiply": "a: &a {x: 1}\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join([f'*{chr(97 + n)}'] * 9)}]}}\n" for n in range(12)),
    "depth": "a: " + "[" * 100_000,
    "a day that is none": "a: 2024-99-99",
    "an object of Python's": "a: !!python/object/apply:os.system [touch marker]",
    "bytes": "a: \x00\ud800\ufffe",
}  # fmt: skip


@pytest.mark.parametrize("front", FRONTS)
def test_a_readme_is_not_read_as_yaml(tmp_path: Path, front: str) -> None:
    """Its licence is told, whatever else it holds, and at once."""
    text = f'---\n{FRONTS[front]}\nlicense: "apache-2.0"  # as ever\n---\n# Model\n'
    (tmp_path / "README.md").write_bytes(text.encode(errors="surrogatepass"))
    began = time.process_time()
    assert base_license(tmp_path) == "apache-2.0"
    assert time.process_time() - began < 0.1
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense_name: other\nlicense:   'llama3.2'\n---\n", "llama3.2"),
        ("---\nbase:\n  license: mit\n---\n", ""),
        ("---\nlicense: [mit]\n---\n", ""),
        ("---\nlicense: a](http://b) c\n---\n", ""),
        ("---\nlicense: mit", ""),
        ("# no front matter\nlicense: mit\n", ""),
        ("---\n" + "x" * 2**19 + "\nlicense: mit\n---\n", ""),
    ],
)
def test_the_licence_in_a_readme(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert base_license(tmp_path) == said


def bomb(part: str, value: object) -> bytes:
    return json.dumps({**json.loads(tiny._tokenizer_json()), part: value}).encode()


def table(length: int, body: bytes) -> str:
    return base64.b64encode(length.to_bytes(4, "little") + body).decode()


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
TOKENIZERS: dict[str, tuple[bytes, str]] = {
    "each step ten times as long": (
        bomb("normalizer", {"type": "Sequence", "normalizers": [REPLACE] * 9}), "more than 256 times as long"),
    "a prefix of megabytes": (bomb("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}), "a text of 1,000,000"),
    "a prefix of hundreds": (bomb("normalizer", {"type": "Prepend", "prepend": "a" * 500}), "puts in 500 characters"),
    "padding": (bomb("padding", {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}), "pads to 1000000000"),
    "a table that claims gigabytes": (
        bomb("normalizer", {"type": "Precompiled", "precompiled_charsmap": table(2**32 - 4, b"abc")}), "table claims"),
    "a table that is none": (bomb("normalizer", {"type": "Precompiled", "precompiled_charsmap": "?"}), "is not base64"),
    "a table of long texts": (
        bomb("normalizer", {"type": "Precompiled", "precompiled_charsmap": table(0, b"a" * 99)}), "more than 64 bytes"),
    "ids without end": (
        bomb("model", {"type": "BPE", "vocab": {"a": 2**32 - 1}, "merges": []}), "whole number below 4,194,304"),
    "a control token of a megabyte": (
        bomb("added_tokens", [{"id": 1, "content": "a" * 10**6, "special": True}]), "text of 1 to 200 characters"),
    "control tokens without end": (
        bomb("added_tokens", [{"id": n, "content": f"{n:0200d}", "special": True} for n in range(11_000)]),
        "has added tokens of 2,200,000 characters together"),
    "an empty control token": (bomb("added_tokens", [{"id": 1, "content": "", "special": True}]), "1 to 200"),
    "depth": (bomb("decoder", json.loads('{"a":' * 60 + "1" + "}" * 60)), "nested deeper than 12 levels"),
    "depth without end": (b'{"a":' * 50_000 + b"}" * 50_000, "is not valid JSON"),
    "no object": (b"[]", "does not hold a JSON object"),
    "a panic: a pattern that backtracks": (
        bomb("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated",
                               "invert": False}), "makes the library that reads it fail"),
    "a panic: an empty pattern": (
        bomb("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "a"}), "makes the library that"),
    "a panic: pieces of no length": (bomb("pre_tokenizer", {"type": "FixedLength", "length": 0}), "makes the library"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers_that_run_away(refused: Refused, model: Path, kind: str) -> None:
    content, said = TOKENIZERS[kind]
    (model / "tokenizer.json").write_bytes(content)
    ended = refused(PLAN, "tokenizer.json", said, panics=kind.startswith("a panic"))
    assert ended.out == ""


def to_transformers(model: Path, **settings: object) -> None:
    """Let the folder's tokenizer be one that transformers reads: with a setting that we do not know."""
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "unknown_here": 1, **settings}), encoding="utf-8")


BESIDE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"eos_token": "a", "eos_token": "b"}', "gives 'eos_token' twice, with two values"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "is nested deeper than 32 levels"),
        ('{"a": ' + "[" * 90_000 + "]" * 90_000 + "}", "is not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "Fetch it again"),
        ("[]", "does not hold a JSON object"),
    ],
)
def test_the_files_beside_a_tokenizer(refused: Refused, model: Path, name: str, text: str, said: str) -> None:
    """Before transformers reads them."""
    to_transformers(model)
    (model / name).write_text(text, encoding="utf-8")
    refused(PLAN, name, said)


def test_those_of_real_ones_pass(model: Path) -> None:
    """As older versions of transformers wrote them, in a layout without tokenizer.json."""
    from luthier.data.tokenizer import load_tokenizer

    document = json.loads(tiny._tokenizer_json())
    (model / "tokenizer.json").unlink()
    vocabulary = document["model"]["vocab"]
    merges = ["#version: 0.2", *(" ".join(pair) for pair in document["model"]["merges"])]
    (model / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (model / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    (model / "added_tokens.json").write_text('{"<|more|>": 400}', encoding="utf-8")
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eot_id|>"}}', encoding="utf-8")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    made = load_tokenizer(model)
    assert made.token_id("<|eot_id|>") == vocabulary["<|eot_id|>"]
    assert len(made.encode("The quick brown fox")) < 15


@pytest.mark.parametrize("token", ["<" + "a" * 599 + ">", "<" + "ab" * 100 + ">"])
def test_a_control_token_of_the_settings_own(refused: Refused, model: Path, token: str) -> None:
    """It is none of tokenizer.json: transformers adds it."""
    to_transformers(model, bos_token=token)
    refused(PLAN, "an added token that is not a text of 1 to 200 characters")


def test_control_tokens_of_the_settings_own_without_end(refused: Refused, model: Path) -> None:
    to_transformers(model, extra_special_tokens=[f"<{n:0190d}>" for n in range(11_000)])
    refused(PLAN, "has added tokens of 2,112,", "characters together")


def test_an_id_without_end_beside_a_tokenizer(refused: Refused, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text('{"a": 0, "b": 4194304}', encoding="utf-8")
    (model / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}', encoding="utf-8")
    refused(PLAN, "whose id is not a whole number below 4,194,304")


@pytest.mark.parametrize("content", ["<", "<|é"])
def test_control_tokens_of_the_greatest_length_each_in_the_next(model: Path, content: str) -> None:
    """As deep as the expression that finds them can be."""
    from luthier.data.tokenizer import load_tokenizer

    document = json.loads(tiny._tokenizer_json())
    texts = [content + "a" * n for n in range(1, 201 - len(content))]
    first = len(document["model"]["vocab"])
    more = [{**document["added_tokens"][0], "id": first + n, "content": text} for n, text in enumerate(texts)]
    document["added_tokens"] += more
    (model / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    to_transformers(model)
    made = load_tokenizer(model)
    assert made.control_pattern.findall("x" + texts[-1] + texts[3] + " ") == [texts[-1], texts[3]]


class Slow:
    """A tokenizer that waits, or works, before it answers; the real ones do the one only beside other programs."""

    def __init__(self, works: bool) -> None:
        self.works = works

    def encode(self, sequence: str) -> object:
        end = time.monotonic() + 0.05
        while time.monotonic() < end:
            if not self.works:
                time.sleep(0.05)
        return sequence


def test_a_busy_machine_is_not_the_tokenizers_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("luthier.guard.tokenizer._PROBE_SECONDS", 0.02)
    probe(Slow(works=False), tmp_path)
    with pytest.raises(FileError, match=r"takes more than 0\.02 s of processor time"):
        probe(Slow(works=True), tmp_path)


def test_a_tokenizer_larger_than_any(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(FileError, match="has at most 67,108,864"):
        check_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.shared
def test_real_tokenizers_pass(shared: Path) -> None:
    found = sorted(shared.glob("tokenizers/**/tokenizer.json"))
    assert found
    for path in found:
        check_tokenizer(path)


def test_sprigs_tokenizer_passes() -> None:
    import luthier

    check_tokenizer(Path(cast("str", luthier.__file__)).parent / "assets" / "sprig" / "tokenizer.json")
