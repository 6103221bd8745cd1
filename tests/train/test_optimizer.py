"""The optimizers: each is what its name says, its state survives a checkpoint exactly, and no device gets another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.errors import TrainingError, UsageError
from luthier.plan.settings import Optimizer as OptimizerName
from luthier.plan.support import OPTIMIZER_DEVICES
from luthier.train.optimizer import load_state, make_optimizer, state_tensors

Parameters = dict[str, torch.nn.Parameter]
WORKING: list[OptimizerName] = ["adamw", "adamw-8bit"]


def parameters(seed: int) -> Parameters:
    """One that bitsandbytes holds in 8 bit (not a multiple of its block of 256), one below its 4,096 elements."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.layers.0.q_proj.lora_A.weight": torch.nn.Parameter(torch.randn(67, 129, generator=generator)),
        "model.layers.0.q_proj.lora_B.weight": torch.nn.Parameter(torch.randn(7, 11, generator=generator)),
    }


def optimizer_of(name: OptimizerName, of: Parameters) -> torch.optim.Optimizer:
    return make_optimizer(name, of, learning_rate=3e-3, weight_decay=0.07)


def update(optimizer: torch.optim.Optimizer, of: Parameters, times: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(times):
        for parameter in of.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_adamw_is_the_formula_of_the_paper() -> None:
    ours = parameters(0)
    optimizer = optimizer_of("adamw", ours)
    name, leaf = next(iter(ours.items()))
    theta, first, second = leaf.detach().double().clone(), torch.zeros(67, 129).double(), torch.zeros(67, 129).double()
    generator = torch.Generator().manual_seed(5)
    for step in range(1, 8):
        for parameter in ours.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradient = ours[name].grad
        assert gradient is not None
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        denominator = (second / (1 - 0.999**step)).sqrt() + 1e-8
        theta = theta - 3e-3 * 0.07 * theta - 3e-3 * (first / (1 - 0.9**step)) / denominator
        optimizer.step()
    # fp32 against float64: 7 updates, each rounding values of up to 4 by at most 2^-24 a few times: below 1e-5
    torch.testing.assert_close(leaf.detach().double(), theta, rtol=0, atol=1e-5)


def test_adamw_is_torchs_bit_for_bit() -> None:
    """With a learning rate that changes, and a parameter that has no gradient for once."""
    ours, theirs = parameters(0), parameters(0)
    optimizer = optimizer_of("adamw", ours)
    peer = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.999), eps=1e-8, weight_decay=0.07, fused=True)
    generator = torch.Generator().manual_seed(5)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = peer.param_groups[0]["lr"] = 1e-3 * (step + 1)
        for name, leaf in ours.items():
            leaf.grad = None if step == 3 and "lora_B" in name else torch.randn(leaf.shape, generator=generator)
            theirs[name].grad = leaf.grad
        optimizer.step()
        peer.step()
    for name, leaf in ours.items():
        assert torch.equal(leaf, theirs[name])
        state, expected = optimizer.state[leaf], peer.state[theirs[name]]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
    assert float(optimizer.state[ours["model.layers.0.q_proj.lora_B.weight"]]["step"]) == 5


def test_gradients_are_dropped_or_set_to_zero() -> None:
    for to_none in (True, False):
        ours = parameters(0)
        optimizer = optimizer_of("adamw", ours)
        first, second = ours.values()
        first.grad = torch.ones_like(first)
        optimizer.zero_grad(set_to_none=to_none)
        assert second.grad is None
        assert (first.grad is None) if to_none else not first.grad.any()


def test_eight_bit_holds_its_moments_in_bytes_and_follows_adamw() -> None:
    plain, eight = parameters(3), parameters(3)
    update(optimizer_of("adamw", plain), plain, 10, seed=1)
    optimizer = optimizer_of("adamw-8bit", eight)
    update(optimizer, eight, 10, seed=1)
    large, small = (state_tensors(optimizer, eight)[f"{name}/state1"].dtype for name in eight)
    assert (large, small) == (torch.uint8, torch.float32)
    for name in plain:
        start = parameters(3)[name]
        moved, apart = (plain[name] - start).norm(), (plain[name] - eight[name]).norm()
        # the dynamic 8-bit code has a relative step of up to 1/20, on the numerator and under the root: well below 1/4
        assert apart < 0.25 * moved


@pytest.mark.parametrize("name", WORKING)
def test_the_state_survives_a_file_bit_for_bit(name: OptimizerName, tmp_path: Path) -> None:
    through, stopped = parameters(1), parameters(1)
    update(optimizer_of(name, through), through, 3, seed=7)
    first = optimizer_of(name, stopped)
    update(first, stopped, 3, seed=7)
    whole = optimizer_of(name, through)
    load_state(whole, through, state_tensors(first, stopped))

    save_file(state_tensors(first, stopped), tmp_path / "optimizer.safetensors")
    again = {key: torch.nn.Parameter(value.detach().clone()) for key, value in stopped.items()}
    resumed = optimizer_of(name, again)
    load_state(resumed, again, load_file(tmp_path / "optimizer.safetensors"))
    update(first, stopped, 4, seed=8)
    update(resumed, again, 4, seed=8)
    update(whole, through, 4, seed=8)
    for key in stopped:
        assert torch.equal(stopped[key], again[key])
        assert torch.equal(stopped[key], through[key])
    mine, theirs = state_tensors(first, stopped), state_tensors(resumed, again)
    assert sorted(mine) == sorted(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", WORKING)
def test_a_fresh_optimizer_has_no_state_and_takes_none(name: OptimizerName) -> None:
    fresh = parameters(0)
    optimizer = optimizer_of(name, fresh)
    assert state_tensors(optimizer, fresh) == {}
    load_state(optimizer, fresh, {})
    update(optimizer, fresh, 1, seed=0)


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("harm", ["missing", "foreign", "shape", "key"])
def test_state_of_another_adapter_is_refused(name: OptimizerName, harm: str) -> None:
    mine = parameters(0)
    optimizer = optimizer_of(name, mine)
    update(optimizer, mine, 1, seed=0)
    state = state_tensors(optimizer, mine)
    moment = "exp_avg" if name == "adamw" else "state1"
    first = next(iter(mine))
    if harm == "missing":
        state = {key: value for key, value in state.items() if not key.startswith(first)}
    elif harm == "foreign":
        state["model.layers.9.q_proj.lora_A.weight/step"] = torch.zeros(())
    elif harm == "shape":
        state[f"{first}/{moment}"] = state[f"{first}/{moment}"][:-1]
    else:
        del state[f"{first}/{moment}"]
    with pytest.raises(TrainingError, match="does not belong to this run"):
        load_state(optimizer_of(name, mine), mine, state)


def test_a_paged_optimizer_on_a_cpu_is_refused_not_replaced() -> None:
    with pytest.raises(UsageError, match="paged-adamw-8bit needs cuda, and this run is on cpu") as caught:
        optimizer_of("paged-adamw-8bit", parameters(0))
    assert caught.value.remedy == "set train.optimizer to one of: adamw, adamw-8bit"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(OPTIMIZER_DEVICES))
def test_on_cuda_every_optimizer_resumes_from_its_tensors(name: OptimizerName) -> None:
    stopped = {key: torch.nn.Parameter(value.detach().cuda()) for key, value in parameters(1).items()}
    stopped["large"] = torch.nn.Parameter(torch.randn(1000, 300, device="cuda"))  # above 1e5 elements it is paged
    first = optimizer_of(name, stopped)
    for parameter in stopped.values():
        parameter.grad = torch.randn_like(parameter)
    first.step()
    again = {key: torch.nn.Parameter(value.detach().clone()) for key, value in stopped.items()}
    resumed = optimizer_of(name, again)
    load_state(resumed, again, state_tensors(first, stopped))
    for key, parameter in stopped.items():
        again[key].grad = parameter.grad
    first.step()
    resumed.step()
    for key, parameter in stopped.items():
        assert torch.equal(parameter, again[key])
