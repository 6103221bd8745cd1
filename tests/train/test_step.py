"""One step: the loss rule, clipping, fp16 scaling, recomputation, and a stop before anything is updated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from luthier.data.batches import Batch, Batches
from luthier.errors import TrainingError
from luthier.kernels import REFERENCE, kernels_with, only_math
from luthier.model.lora import lora_parameters
from luthier.train.making import make_trainee
from luthier.train.optimizer import state_tensors
from luthier.train.step import StepError, Trainee, forward_backward, make_scaler, take_step
from tests.train.world import make_examples, make_settings, tiny_decoder


def micro_batches(micro_batch: int = 2) -> tuple[Batch, ...]:
    return Batches(make_examples(11, seed=1), 6, micro_batch, seed=0).step(0)


def moved(trainee: Trainee) -> Trainee:
    """B away from zero, so that every parameter has a gradient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trainee.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return trainee


def weights(trainee: Trainee) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainee.parameters.items()}


def gradients(trainee: Trainee) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainee.parameters.values() if p.grad is not None])


@pytest.mark.parametrize("clip", [0.0, 0.25, 1e6])
def test_the_update_follows_the_clipped_gradient(tiny_llama: Path, clip: float) -> None:
    trainee = moved(make_trainee(tiny_decoder(tiny_llama), make_settings()))
    plain = replace(trainee, optimizer=torch.optim.SGD(trainee.parameters.values(), lr=1.0))
    loss = forward_backward(trainee.decoder, micro_batches())
    gradient, before = gradients(trainee), weights(trainee)
    norm = float(gradient.norm())
    assert norm > 0.25
    result = take_step(plain, micro_batches(), clip)
    assert result.loss == loss
    # the norm of the norms against the norm of all: two orders of a sum of squares, 1e-6 relative in fp32
    assert result.grad_norm == pytest.approx(norm, rel=1e-6)
    assert result.tokens == sum(len(batch.ids_T) for batch in micro_batches())
    change = torch.cat([(before[name] - p.detach()).flatten() for name, p in trainee.parameters.items()])
    expected = gradient * (min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
    # weights of up to 0.3 are rounded to 2^-26 when they change: 1.5e-8 absolute, doubled by the difference
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=6e-8)


class NoFloat64(TorchDispatchMode):
    """A device without float64, as MPS: what is computed on it stays in other formats until it is copied away."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device == self.device:
                assert tensor.dtype != torch.float64, f"{func} makes float64 on {self.device}"
        return out


def sum_of_logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    """In place of the cross-entropy, which picks rows by their values, and meta tensors have none."""
    return (hidden_ND @ weight_VD.T).sum()


def test_nothing_on_the_device_is_float64(tiny_llama: Path) -> None:
    """On torch's meta device, which has no values: so all is done but the last, the copy of the sums."""
    trainee = make_trainee(tiny_decoder(tiny_llama), make_settings())
    decoder = trainee.decoder.to("meta")
    decoder.use(replace(REFERENCE, linear_cross_entropy=sum_of_logits))
    with NoFloat64("meta"), pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        forward_backward(decoder, micro_batches())
    assert all(leaf.grad is not None for leaf in lora_parameters(decoder).values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_changes_nothing(tiny_llama: Path, dropout: float) -> None:
    found = []
    for checkpointing in (0, 1, 3):
        trainee = moved(
            make_trainee(tiny_decoder(tiny_llama), make_settings(dropout=dropout, checkpointing=checkpointing))
        )
        torch.manual_seed(17)
        found.append((forward_backward(trainee.decoder, micro_batches()), gradients(trainee), torch.get_rng_state()))
    kept, *others = found
    for again in others:
        assert kept[0] == again[0]
        assert torch.equal(kept[1], again[1])
        assert torch.equal(kept[2], again[2])


def refused_step(trainee: Trainee, batches: tuple[Batch, ...]) -> StepError:
    """The error of a step that must not be applied; asserts that nothing has changed."""
    before, state = (
        weights(trainee),
        {k: v.clone() for k, v in state_tensors(trainee.optimizer, trainee.parameters).items()},
    )
    with pytest.raises(StepError) as caught:
        take_step(trainee, batches, clip=1.0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainee.parameters.items())
    after = state_tensors(trainee.optimizer, trainee.parameters)
    assert sorted(after) == sorted(state)
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert isinstance(caught.value, TrainingError)
    return caught.value


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_its_rows(tiny_llama: Path) -> None:
    trainee = moved(make_trainee(tiny_decoder(tiny_llama), make_settings()))
    batches = micro_batches(1)
    take_step(trainee, batches, clip=1.0)  # so that there is a state to keep
    only = set(batches[2].ids_T.tolist()).difference(*(b.ids_T.tolist() for i, b in enumerate(batches) if i != 2))
    if not only:  # a token that this micro-batch alone has
        batches[2].ids_T[0], only = 399, {399}
    with torch.no_grad():
        trainee.decoder.model.embed_tokens.weight[only.pop()] = float("nan")
    error = refused_step(trainee, batches)
    assert "the loss is not finite" in error.message
    assert error.rows == batches[2].rows
    assert error.exit_code == 5


def test_a_gradient_that_is_not_finite_stops_before_the_update(tiny_llama: Path) -> None:
    # with B at zero the loss is the base model's; its gradient, times a scale of 1e37, does not fit fp32
    trainee = make_trainee(tiny_decoder(tiny_llama), make_settings(alpha=3e37))
    error = refused_step(trainee, micro_batches())
    assert "the gradient is not finite" in error.message
    assert sorted(error.rows) == sorted(row for batch in micro_batches() for row in batch.rows)


def with_weights(batches: tuple[Batch, ...], factor: float = 1.0) -> tuple[Batch, ...]:
    """Every second micro-batch with weights; all of them where `factor` is not 1."""
    generator = torch.Generator().manual_seed(9)
    return tuple(
        replace(batch, weights_T=factor * torch.rand(batch.tokens, generator=generator))
        if i % 2 == 0 or factor != 1.0
        else batch
        for i, batch in enumerate(batches)
    )


def test_a_weighted_loss_is_divided_once_by_the_weights_of_the_step(tiny_llama: Path) -> None:
    """Against torch's cross-entropy on full logits; micro-batches with weights and without in one step."""
    trainee = moved(make_trainee(tiny_decoder(tiny_llama), make_settings()))
    batches = with_weights(micro_batches())
    loss, ours = forward_backward(trainee.decoder, batches), gradients(trainee).clone()
    trainee.optimizer.zero_grad(set_to_none=True)
    summed, weight = torch.zeros(()), torch.zeros(())
    for batch in batches:
        logits = trainee.decoder.hidden(batch.ids_T, batch.lengths) @ trainee.decoder.head_weight.T
        each = torch.nn.functional.cross_entropy(logits, batch.labels_T, ignore_index=-100, reduction="none")
        counts = torch.ones(batch.tokens) if batch.weights_T is None else batch.weights_T
        summed = summed + (each * counts).sum()
        weight = weight + counts[batch.labels_T != -100].sum()
    (summed / weight).backward()
    # fp32 sums of at most 100 terms in another order: 1e-6 relative
    assert loss == pytest.approx(float((summed / weight).detach()), rel=1e-6)
    assert float((ours - gradients(trainee)).norm()) <= 2e-6 * float(ours.norm())


def test_only_the_ratios_of_the_weights_count(tiny_llama: Path) -> None:
    trainee = moved(make_trainee(tiny_decoder(tiny_llama), make_settings()))
    found = []
    for factor in (0.5, 0.125):  # powers of two: exact but for what is summed in another magnitude
        trainee.optimizer.zero_grad(set_to_none=True)
        found.append((forward_backward(trainee.decoder, with_weights(micro_batches(), factor)), gradients(trainee)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_fp16_scales_a_weighted_loss_as_any(tiny_llama: Path) -> None:
    exact = moved(make_trainee(tiny_decoder(tiny_llama), make_settings()))
    loss = forward_backward(exact.decoder, with_weights(micro_batches()))
    trainee = fp16_trainee(tiny_llama, GradScaler("cpu", init_scale=2.0**10))
    result = take_step(trainee, with_weights(micro_batches()), clip=0.0)
    assert result.loss == pytest.approx(loss, rel=1e-2)  # as below
    assert float((gradients(trainee) - gradients(exact)).norm() / gradients(exact).norm()) < 0.01


def test_a_batch_whose_labels_all_weigh_nothing_is_named(tiny_llama: Path) -> None:
    trainee = make_trainee(tiny_decoder(tiny_llama), make_settings())
    error = refused_step(trainee, with_weights(micro_batches(), 0.0))
    assert "no token of the batch has a label" in error.message


def test_a_batch_without_labels_is_named(tiny_llama: Path) -> None:
    trainee = make_trainee(tiny_decoder(tiny_llama), make_settings())
    batches = micro_batches()
    for batch in batches:
        batch.labels_T.fill_(-100)
    assert "no token of the batch has a label" in refused_step(trainee, batches).message


def fp16_trainee(folder: Path, scaler: GradScaler | None) -> Trainee:
    settings = make_settings(precision="fp16")
    return replace(moved(make_trainee(tiny_decoder(folder, torch.float16), settings)), scaler=scaler)


def test_only_fp16_has_a_scaler() -> None:
    assert make_scaler("cpu", "bf16") is None
    assert make_scaler("cpu", "fp32") is None
    scaler = make_scaler("cpu", "fp16")
    assert scaler is not None
    assert scaler.is_enabled()


@pytest.mark.parametrize(("power", "halvings"), [(10, range(1)), (60, range(20, 60))])
def test_fp16_gives_the_gradient_of_fp32_whatever_scale_it_starts_from(
    tiny_llama: Path, power: int, halvings: range
) -> None:
    exact = moved(make_trainee(tiny_decoder(tiny_llama), make_settings()))
    loss = forward_backward(exact.decoder, micro_batches())
    scaler = GradScaler("cpu", init_scale=2.0**power)
    trainee = fp16_trainee(tiny_llama, scaler)
    before = weights(trainee)
    result = take_step(trainee, micro_batches(), clip=0.0)
    assert result.halvings in halvings
    # fp16 rounds by 2^-11 = 5e-4 at each of some dozen operations in a row, in part at random: within 1 %
    assert result.loss == pytest.approx(loss, rel=1e-2)
    error = (gradients(trainee) - gradients(exact)).norm() / gradients(exact).norm()
    assert float(error) < 0.01
    assert any(not torch.equal(parameter, before[name]) for name, parameter in trainee.parameters.items())
    assert scaler.get_scale() == 2.0 ** (power - result.halvings)


def test_fp16_that_overflows_at_every_scale_stops(tiny_llama: Path) -> None:
    trainee = fp16_trainee(tiny_llama, GradScaler("cpu", init_scale=4.0))
    decoder = trainee.decoder
    with torch.no_grad():  # the loss is finite in fp32; the gradient at the head's input, 1e3 times 60000, is not fp16
        decoder.head_weight.copy_(decoder.head_weight.sign() * 6e4)
        decoder.model.norm.weight.mul_(1e-3)
    error = refused_step(trainee, micro_batches())
    assert "the gradient is not finite" in error.message


@pytest.mark.parametrize("attention", ["efficient", "math"])
def test_the_attention_that_is_planned_is_the_one_that_computes(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, attention: str
) -> None:
    """Among torch's own; attention by hand, on CPUs, is another (kernels/batched.py) and holds no more scores."""
    monkeypatch.setenv("LUTHIER_KERNELS", "reference")
    trainees = [make_trainee(tiny_decoder(tiny_llama), make_settings(attention=kind)) for kind in ("flash", attention)]
    used = {layer.self_attn.kernels.attention for layer in trainees[1].decoder.model.layers}  # type: ignore[union-attr]
    assert used == {kernels_with(attention).attention}  # type: ignore[arg-type]
    with only_math("math" if attention == "math" else "flash"):
        one, other = (forward_backward(trainee.decoder, micro_batches()) for trainee in trainees)
    assert one == pytest.approx(other, rel=1e-5)  # fp32, in another order
