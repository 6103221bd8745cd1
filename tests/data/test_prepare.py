"""The whole way: a recipe's files to examples, and the report of what was done."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from luthier.data.build import build_store
from luthier.data.conversation import IGNORED
from luthier.data.prepare import limit_length, prepare, rejected_rows
from luthier.data.store import StoreWriter
from luthier.data.tokenizer import ChatTokenizer, load_tokenizer
from luthier.errors import DataError, Interrupted, UsageError
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
    assert calls[-1] == (120, 120)
    assert all(done <= total for done, total in calls)
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
        {"path": str(path), "rows": 60, "rejected": 0, "format": "question-answer",
         "recognised": found.report.sources[0].recognised, "split": "all", "weight": 1.0}
    ]  # fmt: skip
    assert "question and answer" in found.report.sources[0].recognised
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


def test_a_second_start_reads_no_rows_and_gives_the_same(tmp_path, tokenizer, monkeypatch):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(80))
    first = prepare(recipe(path), tokenizer)
    monkeypatch.setattr("luthier.data.prepare.build_store", lambda *_: pytest.fail("built again"))
    again = prepare(recipe(path), tokenizer)
    assert again.digest == first.digest
    assert again.report == first.report
    assert [one.ids.tolist() for one in again.eval] == [one.ids.tolist() for one in first.eval]
    # What only decides how rows are used needs no other store; neither does where the file lies.
    other = prepare(recipe(path, split={"train": 0.5, "eval": 0.5}, long_rows="drop"), tokenizer)
    assert len(other.eval) > len(first.eval)
    moved = prepare(recipe(path.rename(tmp_path / "moved.jsonl")), tokenizer)
    assert moved.places[0].file == str(tmp_path / "moved.jsonl")


@pytest.mark.parametrize(
    "change",
    [
        {"template": "Q: {question}\nA: {answer}"},
        {"train_on": "all"},
        {"split_by": "question"},
        {"data": [{"path": "rows.jsonl", "fields": {"answer": "question", "question": "answer"}}]},
    ],
)
def test_what_changes_the_tokens_makes_another_store(tmp_path, tokenizer, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", questions(20))
    first = prepare(Recipe(model="unused", data=["rows.jsonl"]), tokenizer)
    other = prepare(Recipe(**{"model": "unused", "data": ["rows.jsonl"], **change}), tokenizer)
    assert other.store.folder != first.store.folder


def test_a_changed_file_is_read_again(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(20))
    first = prepare(recipe(path), tokenizer)
    before = path.stat()
    path.write_text(path.read_text(encoding="utf-8").replace("What is 7", "What is 8"), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time: as close as it gets
    assert prepare(recipe(path), tokenizer).digest != first.digest


def test_weights_are_of_the_training_rows(tmp_path, tokenizer):
    for name in ("a", "b"):
        tiny.write_rows(tmp_path / f"{name}.jsonl", [{"question": f"{name}{n}?", "answer": "x"} for n in range(40)])
    sources = [{"path": str(tmp_path / "a.jsonl"), "weight": 2.5}, {"path": str(tmp_path / "b.jsonl")}]
    found = prepare(recipe(sources), tokenizer)
    assert {found.places[row].file[-7]: w for row, w in zip(found.train.rows, found.train.weights, strict=True)} == {
        "a": 2.5,
        "b": 1.0,
    }
    assert set(found.eval.weights.tolist()) == {1.0}


def test_prompt_tokens_count_in_training_only(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(40))
    plain, weighed = prepare(recipe(path), tokenizer), prepare(recipe(path, prompt_loss_weight=0.1), tokenizer)
    one, was = weighed.train[0], plain.train[0]
    assert one.labels.tolist() == one.ids.tolist()
    assert one.weights is not None
    assert ((one.weights == 1.0) == (was.labels != IGNORED)).all()
    assert set(one.weights[was.labels == IGNORED].tolist()) == {np.float32(0.1)}
    assert weighed.eval[0].weights is None
    assert weighed.eval[0].labels.tolist() == plain.eval[0].labels.tolist()
    assert weighed.digest != plain.digest


def test_bad_rows_stop_with_all_of_them_or_are_put_aside(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(30))
    with path.open("a", encoding="utf-8") as file:
        file.write('{"question": "half\n{"question": "no answer"}\n{"question": "a", "answer": " "}\n')
    with pytest.raises(DataError, match="3 of 33 rows cannot be used") as caught:
        prepare(recipe(path), tokenizer)
    assert [problem.line for problem in caught.value.problems] == [31, 32, 33]
    assert "on_bad_row: skip" in str(caught.value.remedy)
    found = prepare(recipe(path, on_bad_row="skip"), tokenizer)
    assert found.report.rejected == 3
    assert found.report.rows == 33
    assert len(found.train) + len(found.eval) == 30
    assert any("3 rows cannot be used and are skipped" in note for note in found.report.notes)
    assert [row.line for row in rejected_rows(found.sources, found.store)] == [31, 32, 33]


def test_all_rows_rejected(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": ""}\n{"question": "b", "answer": ""}\n', encoding="utf-8")
    for policy in ("stop", "skip"):
        with pytest.raises(DataError, match="none of the 2 rows can be used"):
            prepare(recipe(path, on_bad_row=policy), tokenizer)


def test_rows_without_the_key_of_split_by_cannot_be_used(tmp_path, tokenizer):
    rows = [{**row, "user": f"u{n % 5}"} for n, row in enumerate(questions(40))]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    found = prepare(recipe(path, split_by="user", split={"train": 0.5, "eval": 0.5}), tokenizer)
    sides = {}
    for name in ("train", "eval"):
        for row in found.split(name).rows.tolist():
            sides.setdefault(row % 5, set()).add(name)
    assert all(len(names) == 1 for names in sides.values())
    with pytest.raises(DataError, match="the row has no text under 'name', by which `split_by` keeps rows together"):
        prepare(recipe(path, split_by="name"), tokenizer)


def test_held_out_rows_that_are_also_trained_on_are_counted(tmp_path, tokenizer):
    tiny.write_rows(tmp_path / "a.jsonl", questions(30))
    tiny.write_rows(tmp_path / "b.jsonl", [*questions(4), {"question": "Another?", "answer": "Yes."}])
    sources = [{"path": str(tmp_path / "a.jsonl")}, {"path": str(tmp_path / "b.jsonl"), "split": "eval"}]
    found = prepare(recipe(sources), tokenizer)
    assert found.report.duplicates.leaked == 4
    assert any("4 held-out rows say the same as a row that is trained on" in note for note in found.report.notes)


def test_long_rows_refused_or_left_out(tmp_path, tokenizer):
    rows = [*questions(20), {"question": "q", "answer": "long " * 60}]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    everything = {"train": 1.0, "eval": 0.0}
    with pytest.raises(DataError, match="1 row is longer than max_length 40, and `long_rows` is error") as caught:
        prepare(recipe(path, long_rows="error", split=everything), tokenizer, 40)
    assert caught.value.problems[0].line == 21
    found = prepare(recipe(path, long_rows="drop", split=everything), tokenizer, 40)
    assert (found.report.excluded_rows, found.report.excluded[0].line, len(found.train)) == (1, 21, 20)
    with pytest.raises(DataError, match="all are longer than max_length 8"):
        prepare(recipe(path, long_rows="drop", split=everything), tokenizer, 8)


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(5))
    with pytest.raises(UsageError, match="prepared data cannot be kept in") as caught:
        prepare(recipe(path), tokenizer)
    assert "LUTHIER_CACHE" in str(caught.value.remedy)


def test_stores_that_nobody_used_for_a_month_are_removed(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    stores = [
        prepare(recipe(tiny.write_rows(tmp_path / f"{n}.jsonl", questions(n))), tokenizer).store.folder for n in (5, 6)
    ]
    long_ago = time.time() - 40 * 24 * 3600
    for folder in stores:
        os.utime(folder, (long_ago, long_ago))
    prepare(recipe(tmp_path / "6.jsonl"), tokenizer)  # used again
    prepare(recipe(tiny.write_rows(tmp_path / "7.jsonl", questions(7))), tokenizer)
    assert [folder.exists() for folder in stores] == [False, True]


@pytest.mark.parametrize("change", [{"train_on": "all"}, {"train_on": "last"}, {"prompt_loss_weight": 0.5}, {}])
def test_the_prompt_of_a_held_out_row_is_known_whatever_is_trained(tmp_path, tokenizer, change):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(40))
    found = prepare(recipe(path, **change), tokenizer)
    for side in (found.train, found.eval):
        for one in side:
            prompt, answer = one.ids[: one.answer_start].tolist(), one.ids[one.answer_start :].tolist()
            assert tokenizer.decode(prompt).endswith("<|end_header_id|>\n\n")
            assert tokenizer.decode(answer) == f"It is {one.row + 1}.<|eot_id|>"


def test_a_file_that_changes_while_it_is_read_leaves_no_store(tmp_path, tokenizer, monkeypatch):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(50))
    whole = build_store

    def disturbed(*given):
        with path.open("a", encoding="utf-8") as file:
            file.write('{"question": "more", "answer": "rows"}\n')
        whole(*given)

    monkeypatch.setattr("luthier.data.prepare.build_store", disturbed)
    with pytest.raises(DataError, match="a file of the data was changed while it was read"):
        prepare(recipe(path), tokenizer)
    monkeypatch.setattr("luthier.data.prepare.build_store", whole)
    assert prepare(recipe(path), tokenizer).report.rows == 51


def test_an_interrupt_at_any_part_loses_and_doubles_nothing(tmp_path, tokenizer, monkeypatch):
    rows = [*questions(300), *({"question": "bad", "answer": ""} for _ in range(10))]
    path = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    monkeypatch.setattr("luthier.data.build._SAVE_SECONDS", 0.0)
    whole = StoreWriter._append
    for stop in range(1, 18, 3):
        monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / f"cache{stop}"))
        calls = 0

        def interrupted(self, name, content, stop=stop):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise KeyboardInterrupt
            whole(self, name, content)

        monkeypatch.setattr(StoreWriter, "_append", interrupted)
        with pytest.raises(Interrupted, match="stopped while the data was prepared") as caught:
            prepare(recipe(path, on_bad_row="skip"), tokenizer)
        assert "it goes on from there" in str(caught.value.remedy)
        monkeypatch.setattr(StoreWriter, "_append", whole)
        found = prepare(recipe(path, on_bad_row="skip"), tokenizer)
        assert (found.report.rows, found.report.rejected) == (310, 10)
        assert sorted([*found.train.rows.tolist(), *found.eval.rows.tolist()]) == list(range(300))


def test_the_kind_of_file_is_part_of_what_a_store_is_made_from(tmp_path, tokenizer):
    (tmp_path / "rows.csv").write_text("text\none\ntwo\nthree\n", encoding="utf-8")
    (tmp_path / "rows.txt").write_text("text\none\ntwo\nthree\n", encoding="utf-8")
    assert prepare(recipe(tmp_path / "rows.csv"), tokenizer).report.rows == 3
    assert prepare(recipe(tmp_path / "rows.txt"), tokenizer).report.rows == 1


def test_split_by_is_of_the_rows_own_keys(tmp_path, tokenizer):
    def row(number: int, **more: str) -> dict[str, object]:
        turns = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]
        return {"messages": turns, **more}

    path = tiny.write_rows(tmp_path / "chats.jsonl", [row(n, user=f"u{n % 2}") for n in range(40)])
    found = prepare(recipe(path, split_by="user"), tokenizer)
    assert len(set(found.store.rows["group_key"].tolist())) == 2
    bare = tiny.write_rows(tmp_path / "bare.jsonl", [row(n) for n in range(40)])
    with pytest.raises(DataError, match="the row has no text under 'user'"):
        prepare(recipe(bare, split_by="user"), tokenizer)
    asked = tiny.write_rows(tmp_path / "asked.jsonl", [{"ask": f"{n % 5}?", "answer": str(n)} for n in range(40)])
    source = {"path": str(asked), "fields": {"question": "ask"}}
    assert len(set(prepare(recipe([source], split_by="ask"), tokenizer).store.rows["group_key"].tolist())) == 5


def test_a_template_that_leaves_the_answer_out_is_noted(tmp_path, tokenizer):
    path = tiny.write_rows(tmp_path / "rows.jsonl", questions(20))
    found = prepare(recipe(path, template="Q: {question}"), tokenizer)
    assert any("the template does not use `answer`" in note for note in found.report.notes)
    found = prepare(recipe(path, template="Q: {question}\nA: {answer}"), tokenizer)
    assert not any("does not use" in note for note in found.report.notes)
