"""The whole way: a recipe's files to examples, and the report of what was done."""

from __future__ import annotations

import json
import time

import pytest

from luthier.data.conversation import IGNORED
from luthier.data.prepare import limit_length, prepare
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import DataError
from luthier.recipe.schema import Recipe
from luthier.runs import read_json, write_json
from tests import tiny
from tests.data.chats import make_chat_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> ChatTokenizer:
    return make_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def recipe(path, **settings) -> Recipe:
    return Recipe(model="unused", data=[str(path)] if not isinstance(path, list) else path, **settings)


def questions(count: int) -> list[dict[str, object]]:
    return [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.", "sum": n + 1} for n in range(count)]


def test_every_row_is_on_one_side_with_its_place(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(120))
    calls: list[tuple[int, int]] = []
    cut = recipe(path, split={"train": 0.7, "eval": 0.2, "test": 0.1})
    found = prepare(cut, tokenizer, progress=lambda *at: calls.append(at))
    everything = [*found.train, *found.eval, *found.test]
    assert sorted(example.row for example in everything) == list(range(120))
    assert all(found.places[example.row].line == example.row + 1 for example in everything)
    assert calls == [(120, 120)]
    for example in found.eval:
        text = tokenizer.decode(example.ids[: example.answer_start].tolist())
        assert example.fields["question"] in text
        answer = tokenizer.decode(example.ids[example.answer_start :].tolist())
        assert answer == example.fields["answer"] + "<|eot_id|>"
        assert example.fields["sum"] == str(example.row + 1)
    assert not any(example.fields for example in found.train)
    assert all(example.ids.dtype == example.labels.dtype == "int32" for example in everything)


def test_the_report_counts_what_is_there(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(60))
    found = prepare(recipe(path), tokenizer)
    write_json(tmp_path / "data.json", found.report.as_document())
    document = read_json(tmp_path / "data.json")
    assert isinstance(document, dict)
    assert document["sources"] == [
        {"path": str(path), "rows": 60, "format": "question-answer",
         "recognised": "recognised by question and answer", "split": "all"}
    ]  # fmt: skip
    assert (document["template"], document["end_of_turn"], document["rows"]) == ("model", "<|eot_id|>", 60)
    train = document["splits"]["train"]
    assert train["rows"] == len(found.train)
    assert train["tokens"] == sum(len(example) for example in found.train)
    assert train["labelled_tokens"] == sum(int((example.labels != IGNORED).sum()) for example in found.train)
    assert train["length"]["longest"] == max(map(len, found.train))
    assert found.report.longest == max(map(len, (*found.train, *found.eval)))
    assert document["excluded"] == {"rows": 0, "first": []}


def test_long_rows_are_cut_and_counted_and_rows_without_an_answer_left_are_excluded(tmp_path, tokenizer):
    rows = [
        {"question": "q", "answer": "short", "split": "kept"},
        {"question": "q", "answer": "long " * 60},
        {"question": "why " * 80, "answer": "because"},
    ]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    whole = prepare(recipe(path, split={"train": 1.0, "eval": 0.0}), tokenizer)
    found = limit_length(whole, 40)
    direct = prepare(recipe(path, split={"train": 1.0, "eval": 0.0}), tokenizer, 40)
    assert found.report.as_document() == direct.report.as_document()
    assert [example.row for example in found.train] == [0, 1]
    assert [len(example) for example in found.train] == [len(whole.train[0]), 40]
    assert found.train[1].ids.tolist() == whole.train[1].ids[:40].tolist()
    assert found.template.end_of_turn not in found.train[1].labels.tolist()  # cut away, and counted as such
    assert found.report.truncated == 1
    (excluded,) = found.report.excluded
    assert (excluded.file, excluded.line) == (str(path), 3)
    assert "its prompt alone fills max_length" in excluded.reason
    assert found.train[1].ids.base is None  # a copy: the long array is not kept alive


def test_nothing_left_to_train_on(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(4))
    with pytest.raises(DataError, match="the prompts alone are longer than max_length 8") as caught:
        prepare(recipe(path), tokenizer, 8)
    assert "the longest row has" in str(caught.value.remedy)


def test_split_files_of_their_own(tmp_path, tokenizer):
    for name, rows in (("a", questions(30)), ("b", questions(3))):
        tiny.write_rows(tmp_path / f"{name}.jsonl", rows)
    sources = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "split": "eval"}]
    found = prepare(recipe(sources), tokenizer)
    assert (len(found.train), len(found.eval), len(found.test)) == (30, 3, 0)


def test_without_held_out_rows_the_report_says_so(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(5))
    found = prepare(recipe(path, split={"train": 1.0, "eval": 0.0}), tokenizer)
    assert "no row is held out: the loss on unseen rows cannot be measured" in found.report.notes


def test_plain_text_needs_no_chat_template(tmp_path):
    bare = make_chat_tokenizer(tmp_path / "bare", None)
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"text": f"Once upon a time, {n}."} for n in range(30)])
    found = prepare(recipe(path), bare)
    assert found.report.template == found.template.name == "text"
    assert any("plain text" in note for note in found.report.notes)
    assert bare.decode(found.train[0].ids.tolist()).startswith("<|begin_of_text|>Once upon a time")
    assert (found.train[0].labels[1:] == found.train[0].ids[1:]).all()
    path = tiny.write_rows(tmp_path / "chat.jsonl", questions(5))
    with pytest.raises(DataError, match="has no chat template"):
        prepare(recipe(path), bare)


def test_parted_rows_are_noted(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", [{"question": f"{n}?", "answer": "the sky"} for n in range(9)])
    found = prepare(recipe(path, template="Q: {question}\nA: {answer}"), tokenizer)
    assert found.report.parted == 9
    assert any("reach over the end of the prompt" in note for note in found.report.notes)


def test_a_system_turn_that_is_not_written_is_noted(tmp_path, tokenizer):
    rows = [{"instruction": f"Add {n}.", "output": "3", "system": "Be brief." if n % 2 else ""} for n in range(8)]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    without = prepare(recipe(path, template="{instruction}\n{output}"), tokenizer)
    assert "4 rows have a system turn, which the template does not write: it names no {system}" in without.report.notes
    named = prepare(recipe(path, template="{system}\n{instruction}\n{output}"), tokenizer)
    assert not any("system" in note for note in named.report.notes)


@pytest.mark.shared
def test_real_rows_under_llama_3_take_seconds(shared):
    llama = load_tokenizer(shared / "tokenizers" / "llama-3")
    started = time.process_time()  # of this process alone, so that a busy machine does not fail it
    found = prepare(recipe(shared / "data" / "gsm8k_train.jsonl"), llama)
    assert time.process_time() - started < 12  # 2.5 s when written, of which the tokenizer's own work is 1 s
    assert len(found.train) + len(found.eval) == 7473
    assert found.report.parted == 0
    ends = [int(example.labels[-1]) for example in (*found.train, *found.eval)]
    assert set(ends) == {found.template.end_of_turn}
    answers = {json.loads(line)["answer"] for line in (shared / "data" / "gsm8k_train.jsonl").open(encoding="utf-8")}
    assert all(llama.decode(e.ids[e.answer_start : -1].tolist()) in answers for e in found.eval[:200])
