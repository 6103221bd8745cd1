"""Our labels against those that TRL's SFTTrainer makes of the same rows (assistant_only_loss)."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from luthier.data.prepare import prepare
from luthier.data.render import make_template
from luthier.data.sources import read_sources
from luthier.data.tokenizer import load_tokenizer
from luthier.recipe.schema import DataSource, Recipe
from tests.data.chats import GENERATION

ROWS = 60


@pytest.mark.shared
def test_labels_are_those_of_trl_on_real_rows(shared, tiny_llama, tmp_path):
    reference = AutoTokenizer.from_pretrained(tiny_llama, local_files_only=True)
    reference.chat_template = GENERATION
    reference.save_pretrained(tmp_path / "tokenizer")
    with (shared / "data" / "gsm8k_train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(ROWS)]
    chats = [
        {"messages": [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats), encoding="utf-8")
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True),
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"), assistant_only_loss=True, max_length=None, report_to="none",
            use_cpu=True, bf16=False,
        ),
        train_dataset=Dataset.from_list(chats),
        processing_class=reference,
    )  # fmt: skip
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
