"""Held-out loss: transformers' own, whatever the packing, and without a trace on the model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.data.batches import Batches
from luthier.data.conversation import Example
from luthier.errors import DataError
from luthier.evaluate.loss import held_out_loss
from luthier.train.making import make_trainee
from luthier.train.step import take_step
from tests.train.world import make_examples, make_settings, tiny_decoder


def reference(folder: Path, examples: list[Example]) -> tuple[float, int]:
    """Mean loss and token count by transformers, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, tokens = 0.0, 0
    for example in examples:
        ids, labels = torch.tensor(example.ids[None], dtype=torch.int64), torch.tensor(example.labels[None]).long()
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * count
        tokens += count
    return total / tokens, tokens


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 4096])
def test_it_is_the_loss_of_transformers_however_packed(tiny_llama: Path, tokens_per_batch: int) -> None:
    examples = make_examples(23, seed=9)
    loss, tokens = reference(tiny_llama, examples)
    found = held_out_loss(tiny_decoder(tiny_llama), examples, tokens_per_batch)
    assert found.tokens == tokens
    # two fp32 forward passes through three layers: 1e-5 is a hundred roundings of 2^-24 of the loss's size
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.perplexity == math.exp(found.loss)


def test_dropout_is_off_and_the_mode_comes_back(tiny_llama: Path) -> None:
    trainee = make_trainee(tiny_decoder(tiny_llama), make_settings(dropout=0.5))
    decoder = trainee.decoder
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(0.05)
    examples = make_examples(6, seed=9)
    before = torch.get_rng_state()
    first, second = held_out_loss(decoder, examples), held_out_loss(decoder, examples)
    assert first == second
    assert decoder.training
    assert all(module.training for module in decoder.modules())
    assert torch.equal(torch.get_rng_state(), before), "an evaluation must not change what dropout draws next"
    assert held_out_loss(decoder.eval(), examples) == first
    assert not decoder.training


def test_training_goes_on_after_an_evaluation(tiny_llama: Path) -> None:
    trainee = make_trainee(tiny_decoder(tiny_llama), make_settings())
    examples = make_examples(6, seed=9, longest=300)  # longer than any table made before
    held_out_loss(trainee.decoder, examples)
    assert all(parameter.grad is None for parameter in trainee.parameters.values())
    take_step(trainee, Batches(examples, 3, 2, seed=0).step(0), clip=1.0)
    assert all(parameter.grad is not None for parameter in trainee.parameters.values())


def test_nothing_labelled_is_said(tiny_llama: Path) -> None:
    unlabelled = Example(np.arange(20, 25, dtype=np.int32), np.full(5, -100, dtype=np.int32), 0)
    with pytest.raises(DataError, match="no held-out row has a labelled token"):
        held_out_loss(tiny_decoder(tiny_llama), [unlabelled])
    with pytest.raises(DataError):
        held_out_loss(tiny_decoder(tiny_llama), [])
