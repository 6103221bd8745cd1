"""The layer that is written by hand against the readable one under autograd: losses, gradients, masks, memory.

Every gradient of a LoRA is compared by itself, relative to its norm, so that a small one counts like a large one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from luthier.kernels import IGNORED, REFERENCE, Kernels
from luthier.kernels.choose import TORCH, kernels_for
from luthier.model import lora as lora_module
from luthier.model.config import PROJECTIONS
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters, projections, set_lora_enabled
from tests import tiny

TOLERANCE = 1e-5
"""Asked for. fp32 rounds by 6e-8, and both sides sum a hundred terms some ten times in a row: about 1e-6 apart."""

NOTHING = 1e-6
"""Of the norm of all gradients: where a token sees itself alone, those of query and key are zero but for rounding."""

FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {},  # with biases
    "qwen3": {"tie_word_embeddings": True},  # with norms of queries and keys
}
LENGTHS = (1, 23, 7, 40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("families")
    return {family: tiny.make_model(made / family, family, **changes) for family, changes in FAMILIES.items()}


@pytest.fixture(scope="module", params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Both kinds that have gradients by hand; that of C where it is compiled and the processor runs it."""
    if request.param == "torch":
        return TORCH
    choice = kernels_for(torch.device("cpu"), torch.float32)
    if not choice.kernels.name.startswith("native"):
        pytest.skip(choice.notice)
    return choice.kernels


@dataclass(frozen=True)
class Case:
    """One packed batch: random tokens, a label where `labelled` says so, and whether the last layer is shortened."""

    lengths: tuple[int, ...] = LENGTHS
    labelled: float | int = 0.5  # a share, or the position of the only label
    shortened: bool = True
    seed: int = 5

    def tensors(self) -> tuple[Tensor, Tensor]:
        """ids_T and labels_T."""
        generator = torch.Generator().manual_seed(self.seed)
        ids_T, labels_T = torch.randint(0, 400, (2, sum(self.lengths)), generator=generator)
        if isinstance(self.labelled, int):
            trained_T = torch.arange(sum(self.lengths)) == self.labelled
        else:
            trained_T = torch.rand(len(ids_T), generator=generator) < self.labelled
            trained_T[0] = True
        return ids_T, labels_T.masked_fill(~trained_T, IGNORED)


def fresh_decoder(
    folder: Path, spec: LoRASpec, dtype: torch.dtype = torch.float32, *, quantize: str = "none", rounded: bool = False
) -> Decoder:
    """In training, with a LoRA whose B is not zero. `rounded`: every number is one of bf16, for a fair comparison."""
    decoder = load_decoder(folder, dtype=dtype, quantize="nf4" if quantize == "nf4" else None)
    add_lora(decoder, spec, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, leaf in lora_parameters(decoder).items():
            if name.endswith("lora_B.weight"):
                leaf.normal_(0, 0.1, generator=generator)
        for parameter in decoder.parameters():
            if rounded:
                parameter.copy_(parameter.bfloat16())
    return decoder.train()


make_decoder = cache(fresh_decoder)  # for tests that leave it as it is


@dataclass(frozen=True)
class Result:
    loss: float
    gradients: dict[str, Tensor]

    def distance(self, other: Result) -> float:
        """The largest relative error of any gradient, and of the loss. What is nothing must be nothing in both."""
        assert self.gradients.keys() == other.gradients.keys()
        nothing = NOTHING * float(torch.stack([gradient.norm() for gradient in other.gradients.values()]).norm())
        errors = [abs(self.loss / other.loss - 1)]
        for mine, theirs in zip(self.gradients.values(), other.gradients.values(), strict=True):
            if float(theirs.norm()) > nothing:
                errors.append(float((mine.double() - theirs.double()).norm() / theirs.double().norm()))
            else:
                assert float(mine.norm()) <= nothing
        return max(errors)

    def whole_distance(self, other: Result) -> float:
        """The relative error of all gradients together."""
        mine, theirs = (torch.cat([g.double().flatten() for g in one.gradients.values()]) for one in (self, other))
        return float((mine - theirs).norm() / theirs.norm())

    def is_exactly(self, other: Result) -> bool:
        same = (torch.equal(one, other.gradients[name]) for name, one in self.gradients.items())
        return self.loss == other.loss and self.gradients.keys() == other.gradients.keys() and all(same)


def summed_loss(decoder: Decoder, case: Case) -> Tensor:
    ids_T, labels_T = case.tensors()
    rows_n = (labels_T != IGNORED).nonzero().squeeze(1) if case.shortened else torch.arange(len(ids_T))
    hidden_nD = decoder.hidden(ids_T, case.lengths, rows_n=rows_n if case.shortened else None)
    return decoder.kernels.linear_cross_entropy(hidden_nD, decoder.head_weight, labels_T[rows_n])


def trained(decoder: Decoder, kernels: Kernels, case: Case, checkpointing: int = 0) -> Result:
    decoder.use(kernels)
    decoder.checkpointing = checkpointing
    leaves = lora_parameters(decoder)
    for leaf in leaves.values():
        leaf.grad = None
    torch.manual_seed(17)  # of dropout
    loss = summed_loss(decoder, case)
    loss.backward()  # type: ignore[no-untyped-call]
    return Result(
        float(loss.detach()), {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    )


def check(decoder: Decoder, kernels: Kernels, case: Case, checkpointing: int = 0) -> Result:
    """The gradients are the reference's, all of them and no other; returns them."""
    wanted = trained(decoder, REFERENCE, case)
    ours = trained(decoder, kernels, case, checkpointing)
    assert ours.gradients.keys() == wanted.gradients.keys()
    assert ours.distance(wanted) < TOLERANCE
    return ours


@pytest.mark.parametrize("checkpointing", [0, 1, 3])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_are_the_references(
    folders: dict[str, Path], kernels: Kernels, family: str, checkpointing: int
) -> None:
    decoder = make_decoder(folders[family], LoRASpec(3, 7.0))
    ours = check(decoder, kernels, Case(), checkpointing)
    assert len(ours.gradients) == 3 * 7 * 2
    assert ours.is_exactly(trained(decoder, kernels, Case(), 0))  # what is recomputed is what would have been kept


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shortened", [False, True])
def test_tied_or_not_and_with_or_without_a_shortened_last_layer(
    tmp_path: Path, kernels: Kernels, tied: bool, shortened: bool
) -> None:
    folder = tiny.make_model(tmp_path, "mistral", sliding_window=7, tie_word_embeddings=tied)
    check(fresh_decoder(folder, LoRASpec(3, 7.0)), kernels, Case(shortened=shortened), checkpointing=2)


@pytest.mark.parametrize("rank", [1, 3, 16])
@pytest.mark.parametrize("scale", ["standard", "rslora"])
def test_any_rank_and_scale(folders: dict[str, Path], kernels: Kernels, rank: int, scale: str) -> None:
    spec = LoRASpec(rank, 7.0, 0.0, PROJECTIONS, "rslora" if scale == "rslora" else "standard")
    check(make_decoder(folders["llama"], spec), kernels, Case())


SUBSETS = [(name,) for name in PROJECTIONS] + [("q_proj", "down_proj"), ("k_proj", "v_proj", "up_proj"), ("attention",)]


@pytest.mark.parametrize("checkpointing", [0, 2])
@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_any_targets(folders: dict[str, Path], kernels: Kernels, targets: tuple[str, ...], checkpointing: int) -> None:
    check(make_decoder(folders["qwen2"], LoRASpec(3, 7.0, 0.0, targets)), kernels, Case(), checkpointing)


CASES = {
    "one token": Case(lengths=(1,), labelled=0),
    "one token beside others": Case(lengths=(9, 1, 12), labelled=9),
    "one label, the first": Case(labelled=0),
    "one label, the last": Case(labelled=sum(LENGTHS) - 1),
    "every label": Case(labelled=1.0),
    "documents of one token": Case(lengths=(1,) * 19),
    "a long document": Case(lengths=(300,), labelled=0.3),
}


@pytest.mark.parametrize("checkpointing", [0, 3])
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_any_batch(folders: dict[str, Path], kernels: Kernels, family: str, case: str, checkpointing: int) -> None:
    decoder, batch = make_decoder(folders[family], LoRASpec(3, 7.0)), CASES[case]
    check(decoder, kernels, batch, checkpointing)


@pytest.mark.parametrize("checkpointing", [0, 2])
def test_a_base_in_four_bits(folders: dict[str, Path], kernels: Kernels, checkpointing: int) -> None:
    check(make_decoder(folders["qwen2"], LoRASpec(3, 7.0), quantize="nf4"), kernels, Case(), checkpointing)


def test_adapters_that_are_switched_off_are_left_out(folders: dict[str, Path], kernels: Kernels) -> None:
    decoder = fresh_decoder(folders["qwen3"], LoRASpec(3, 7.0))
    for name, projection in projections(decoder):
        if projection.adapter is not None and "layers.1" in name:
            projection.adapter.enabled = "v_proj" in name or "up_proj" in name
    ours = check(decoder, kernels, Case(), checkpointing=2)
    assert len(ours.gradients) == (7 + 2 + 7) * 2
    set_lora_enabled(decoder, False)
    decoder.use(kernels)
    off = summed_loss(decoder, Case())
    decoder.use(REFERENCE)
    assert float(off.detach()) == pytest.approx(float(summed_loss(decoder, Case()).detach()), rel=1e-6)
    with pytest.raises(RuntimeError, match="does not require grad"):
        off.backward()  # type: ignore[no-untyped-call]


def test_without_gradients_the_numbers_are_the_same(folders: dict[str, Path], kernels: Kernels) -> None:
    decoder = make_decoder(folders["qwen3"], LoRASpec(3, 7.0))
    decoder.use(kernels)
    with torch.no_grad():
        evaluated = summed_loss(decoder, Case())
    assert float(evaluated) == pytest.approx(float(summed_loss(decoder, Case()).detach()), rel=1e-6)


def test_cutting_a_batch_changes_no_gradient(folders: dict[str, Path], kernels: Kernels) -> None:
    """The gradients of documents one by one sum to those of all together."""
    decoder = make_decoder(folders["llama"], LoRASpec(3, 7.0))
    ids_T, labels_T = Case().tensors()
    labels_T[0] = 3
    whole = trained(decoder, kernels, Case())
    for leaf in lora_parameters(decoder).values():
        leaf.grad = None
    decoder.checkpointing = 1
    total = 0.0
    for ids, labels in zip(ids_T.split(list(LENGTHS)), Case().tensors()[1].split(list(LENGTHS)), strict=True):
        rows = (labels != IGNORED).nonzero().squeeze(1)
        loss = decoder.kernels.linear_cross_entropy(decoder.hidden(ids, rows_n=rows), decoder.head_weight, labels[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    summed = {name: leaf.grad for name, leaf in lora_parameters(decoder).items() if leaf.grad is not None}
    assert Result(total, summed).distance(whole) < TOLERANCE


def test_a_micro_batch_without_a_label_adds_nothing(folders: dict[str, Path], kernels: Kernels) -> None:
    """Its last layer has no row at all."""
    decoder = make_decoder(folders["llama"], LoRASpec(3, 7.0))
    for checkpointing in (0, 3):
        ours = trained(decoder, kernels, Case(labelled=1000), checkpointing)
        assert ours.loss == 0.0
        assert not any(gradient.any() for gradient in ours.gradients.values())


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every mask that is drawn, the reference's included, which then draws as the layer by hand does."""
    drawn: list[Tensor] = []
    real: Callable[..., tuple[Tensor, Tensor]] = torch.native_dropout

    def noting(x: Tensor, share: float, train: bool) -> tuple[Tensor, Tensor]:
        out, mask = real(x, share, train)
        drawn.append(mask.clone())
        return out, mask

    monkeypatch.setattr(torch, "native_dropout", noting)
    monkeypatch.setattr(lora_module.functional, "dropout", lambda x, share: torch.native_dropout(x, share, True)[0])
    return drawn  # type: ignore[return-value]


DROPOUT = LoRASpec(3, 7.0, 0.3)


@pytest.mark.parametrize("checkpointing", [0, 1, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_with_the_same_masks_dropout_has_the_references_gradients(
    folders: dict[str, Path], kernels: Kernels, masks: list[Tensor], family: str, checkpointing: int
) -> None:
    decoder, whole = make_decoder(folders[family], DROPOUT), Case(shortened=False)
    wanted = trained(decoder, REFERENCE, whole)
    theirs = [mask.clone() for mask in masks]
    masks.clear()
    ours = trained(decoder, kernels, whole, checkpointing)
    assert len(theirs) == 3 * 7
    assert all(torch.equal(mine, other) for mine, other in zip(masks, theirs, strict=False))
    assert ours.distance(wanted) < TOLERANCE


@pytest.mark.parametrize("shortened", [False, True])
@pytest.mark.parametrize("checkpointing", [1, 2, 3])
def test_a_recomputed_layer_drops_what_it_dropped(
    folders: dict[str, Path], kernels: Kernels, checkpointing: int, shortened: bool
) -> None:
    """Bit for bit, and the next step draws as it would have."""
    decoder, case = fresh_decoder(folders["llama"], DROPOUT), Case(shortened=shortened)
    kept, after_kept = trained(decoder, kernels, case, 0), torch.get_rng_state()
    again, after_again = trained(decoder, kernels, case, checkpointing), torch.get_rng_state()
    assert again.is_exactly(kept)
    assert torch.equal(after_kept, after_again)
    decoder.eval()
    assert not trained(decoder, kernels, case, checkpointing).is_exactly(kept)


def test_masks_keep_their_share_and_are_all_different(
    folders: dict[str, Path], kernels: Kernels, masks: list[Tensor]
) -> None:
    trained(make_decoder(folders["llama"], DROPOUT), kernels, Case(lengths=(300,), shortened=False))
    assert len(masks) == 3 * 7
    for mask in masks:
        sigma = (0.3 * 0.7 / mask.numel()) ** 0.5
        assert abs(float(mask.float().mean()) - 0.7) < 5 * sigma  # one in 10^6, and the seed is fixed
    alike = [mask for mask in masks if mask.shape == masks[0].shape]
    assert len(alike) == 3 * 5  # not those of o_proj and down_proj, which have other inputs
    agreement = [float((one == other).float().mean()) for one, other in itertools.pairwise(alike)]
    assert all(abs(share - (0.7**2 + 0.3**2)) < 0.03 for share in agreement)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bf16_is_no_worse_than_the_references(folders: dict[str, Path], kernels: Kernels, family: str) -> None:
    """Both against fp32 with the same numbers. The ratio of their errors varies by 10 % from batch to batch, so that of
    24 batches together by 2 %, and 5 % is two and a half times that."""
    spec = LoRASpec(3, 7.0)
    single = make_decoder(folders[family], spec, rounded=True)
    half = make_decoder(folders[family], spec, torch.bfloat16, rounded=True)
    ours, theirs = [], []
    for seed in range(24):
        case = Case(lengths=(*LENGTHS, 90), seed=seed)
        exact = trained(single, REFERENCE, case)
        theirs.append(trained(half, REFERENCE, case).whole_distance(exact))
        ours.append(trained(half, kernels, case, checkpointing=seed % 4).whole_distance(exact))
    assert min(ours) > 1e-3, "bf16 that is not rounded"
    assert sum(error**2 for error in ours) < 1.05**2 * sum(error**2 for error in theirs)


def test_what_is_overwritten_is_announced(folders: dict[str, Path], kernels: Kernels) -> None:
    """A second backward pass over memory that the first has used again would give a wrong gradient, silently."""
    decoder = make_decoder(folders["llama"], LoRASpec(3, 7.0))
    decoder.use(kernels)
    decoder.checkpointing = 1  # of three
    loss = summed_loss(decoder, Case())
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


def test_recomputed_layers_can_go_backward_twice(folders: dict[str, Path], kernels: Kernels) -> None:
    decoder = make_decoder(folders["llama"], LoRASpec(3, 7.0))
    once = trained(decoder, kernels, Case(), 3)
    for leaf in lora_parameters(decoder).values():
        leaf.grad = None
    loss = summed_loss(decoder, Case())
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    loss.backward()  # type: ignore[no-untyped-call]
    for name, leaf in lora_parameters(decoder).items():
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, 2 * once.gradients[name])


def test_kernels_without_gradients_by_hand_are_refused(folders: dict[str, Path]) -> None:
    from luthier.model.by_hand import layer_by_hand

    decoder = make_decoder(folders["llama"], LoRASpec(3, 7.0))
    decoder.use(replace(TORCH, by_hand=None, name="none"))
    ids = torch.arange(5)
    positions = decoder._positions(ids, None, ())
    with pytest.raises(ValueError, match="`none` have no gradients by hand"):
        layer_by_hand(decoder.layers[0], torch.zeros(5, 48), positions, None, recompute=False)
