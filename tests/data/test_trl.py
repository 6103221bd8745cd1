"""Our labels against those that TRL's SFTTrainer makes of the same rows (assistant_only_loss)."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from luthier.data.conversation import IGNORED, Conversation, Source, Turn
from luthier.data.prepare import prepare
from luthier.data.render import make_template
from luthier.data.sources import read_sources
from luthier.data.tokenizer import load_tokenizer
from luthier.recipe.schema import DataSource, Recipe
from tests.data.chats import GENERATION

ROWS = 60


def chats_of(shared: Path, rows: int | None) -> list[dict[str, object]]:
    with (shared / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        found = [json.loads(line) for line in islice(file, rows)]
    return [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in found
    ]


def trl_of(chats: list[dict[str, object]], model: Path, reference: PreTrainedTokenizerBase, folder: Path) -> SFTTrainer:
    """TRL's trainer with the rows as it has prepared them."""
    return SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, local_files_only=True),
        args=SFTConfig(
            output_dir=str(folder / "trl"), assistant_only_loss=True, max_length=None, report_to="none",
            use_cpu=True, bf16=False,
        ),
        train_dataset=Dataset.from_list(chats),
        processing_class=reference,
    )  # fmt: skip


@pytest.mark.shared
def test_labels_are_those_of_trl_on_real_rows(shared, tiny_llama, tmp_path):
    reference = AutoTokenizer.from_pretrained(tiny_llama, local_files_only=True)
    reference.chat_template = GENERATION
    reference.save_pretrained(tmp_path / "tokenizer")
    chats = chats_of(shared, ROWS)
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    trainer = trl_of(chats, tiny_llama, reference, tmp_path)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    (source,) = read_sources([DataSource(path=str(path))])
    ours = make_template("model", tokenizer).encode_many(source.conversations)
    for number, found in enumerate(ours):
        batch = trainer.data_collator([trainer.train_dataset[number]])
        assert found.ids.tolist() == batch["input_ids"][0].tolist()
        assert found.labels.tolist() == batch["labels"][0].tolist()
    dataset = prepare(Recipe(model="unused", data=[str(path)], split={"train": 1.0, "eval": 0.0}), tokenizer)
    expected = sum(int((found.labels != -100).sum()) for found in ours)
    assert sum(example.labelled for example in dataset.train) == expected


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.ci
def test_labels_are_those_of_trl_on_every_row_of_gsm8k_in_llama_3s_vocabulary(shared, tiny_llama, tmp_path):
    reference = AutoTokenizer.from_pretrained(shared / "tokenizers" / "llama-3", local_files_only=True)
    reference.chat_template = GENERATION
    reference.save_pretrained(tmp_path / "tokenizer")
    chats = chats_of(shared, None)
    theirs = trl_of(chats, tiny_llama, reference, tmp_path).train_dataset
    rows = [
        Conversation(
            tuple(Turn(m["role"], m["content"], m["role"] == "assistant") for m in chat["messages"]), Source("rows", i)
        )
        for i, chat in enumerate(chats, 1)
    ]
    found = make_template("model", load_tokenizer(tmp_path / "tokenizer")).encode_chunk(rows)
    assert len(theirs) == len(rows) == 7473
    assert not found.faults
    assert not found.parted.any()
    ids, labels = (np.array(theirs.data[name].combine_chunks().flatten()) for name in ("input_ids", "labels"))
    lengths = theirs.data["input_ids"].combine_chunks().value_lengths()
    assert found.lengths.tolist() == lengths.to_pylist()
    assert np.array_equal(found.ids, ids)
    assert np.array_equal(np.where(found.labels, found.ids, IGNORED), labels)
    assert found.labels.sum() > 700_000
