"""Our training against the peer most people would pick: TRL's SFTTrainer with PEFT, on the same rows, labels and seed.

Both start from the same files, the same LoRA (A copied over, B not zero) and see the same rows in the same order, cut
into different micro-batches: ours by tokens, TRL's by rows, padded. Warm-up, cosine, clipping, weight decay and
accumulation over very unequal rows are all on.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset as HubDataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from luthier.data.batches import Batches
from luthier.data.conversation import Example
from luthier.model.lora import LoRASpec
from luthier.train.making import make_trainee
from luthier.train.schedule import learning_rate
from luthier.train.step import StepResult, Trainee, take_step
from tests import tiny
from tests.train.world import make_examples, make_settings, tiny_decoder

pytestmark = [pytest.mark.slow, pytest.mark.ci]

STEPS = 20
ROWS, PEER_MICRO = 6, 2  # rows of a step; TRL takes them two at a time, three times
SETTINGS = make_settings(
    steps=STEPS,
    batch_size=ROWS,
    micro_batch=3,
    rank=5,
    alpha=13.0,
    learning_rate=5e-3,
    warmup_steps=3,
    weight_decay=0.05,
    clip=0.5,
)


class Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, *_: object, logs: dict[str, float] | None = None, **__: object) -> None:
        if logs and "loss" in logs:
            self.logs.append(logs)


def starting_point(trainee: Trainee) -> dict[str, torch.Tensor]:
    """Give B values, so that the first step trains A too; returns the LoRA's tensors by name."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in trainee.parameters.items():
            if name.endswith("lora_B.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return {name: parameter.detach().clone() for name, parameter in trainee.parameters.items()}


def our_steps(trainee: Trainee, batches: Batches) -> list[tuple[StepResult, float]]:
    done: list[tuple[StepResult, float]] = []
    for step in range(STEPS):
        rate = learning_rate(
            SETTINGS.schedule, done=step, peak=SETTINGS.learning_rate, warmup_steps=SETTINGS.warmup_steps, steps=STEPS
        )
        trainee.optimizer.param_groups[0]["lr"] = rate
        done.append((take_step(trainee, batches.step(step), SETTINGS.clip), rate))
    return done


def peer_trainer(
    folder: Path, rows: list[Example], start: dict[str, torch.Tensor], recorder: Recorder, out: Path
) -> SFTTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    data = HubDataset.from_dict(
        {"input_ids": [row.ids.tolist() for row in rows], "labels": [row.labels.tolist() for row in rows]}
    )
    config = SFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=PEER_MICRO,
        gradient_accumulation_steps=ROWS // PEER_MICRO,
        max_steps=STEPS,
        learning_rate=SETTINGS.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=SETTINGS.warmup_steps,
        weight_decay=SETTINGS.weight_decay,
        max_grad_norm=SETTINGS.clip,
        optim="adamw_torch",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=None,
        packing=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=SETTINGS.seed,
    )
    lora = LoraConfig(
        r=SETTINGS.rank,
        lora_alpha=int(SETTINGS.alpha),
        lora_dropout=0.0,
        target_modules=list(SETTINGS.targets),
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=data,
        processing_class=tiny.make_tokenizer(),
        peft_config=lora,
        callbacks=[recorder],
    )
    theirs = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, tensor in start.items():
            theirs["base_model.model." + name.replace(".weight", ".default.weight")].copy_(tensor)
    return trainer


def test_the_first_twenty_losses_are_those_of_trl(tiny_llama: Path, tmp_path: Path) -> None:
    examples = make_examples(48, seed=4, shortest=3, longest=90)
    batches = Batches(examples, SETTINGS.batch_size, SETTINGS.micro_batch, SETTINGS.seed)
    by_row = {example.row: example for example in examples}
    rows = [by_row[row] for step in range(STEPS) for batch in batches.step(step) for row in batch.rows]
    assert len(rows) == STEPS * ROWS

    trainee = make_trainee(tiny_decoder(tiny_llama), SETTINGS)
    recorder = Recorder()
    trainer = peer_trainer(tiny_llama, rows, starting_point(trainee), recorder, tmp_path)
    ours = our_steps(trainee, batches)
    trainer.train()

    assert len(recorder.logs) == STEPS
    losses = torch.tensor([result.loss for result, _ in ours])
    peer = torch.tensor([log["loss"] for log in recorder.logs])
    assert losses[0] - losses[-1] > 0.5, "twenty steps that learn nothing would compare nothing"
    # The promise is 1 %. Both compute in fp32, whose rounding (2^-24, over some hundred tokens) the updates carry on:
    # 1e-4 leaves room for another order of sums, and none for another formula.
    torch.testing.assert_close(losses, peer, rtol=1e-4, atol=0.0)
    norms = torch.tensor([result.grad_norm for result, _ in ours])
    torch.testing.assert_close(norms, torch.tensor([log["grad_norm"] for log in recorder.logs]), rtol=1e-3, atol=0.0)
    assert [rate for _, rate in ours] == pytest.approx([log["learning_rate"] for log in recorder.logs], rel=1e-6)


def test_the_rule_of_the_scale_is_the_peers() -> None:
    assert LoRASpec(SETTINGS.rank, SETTINGS.alpha, 0.0, SETTINGS.targets, "standard").scaling == 13 / 5
