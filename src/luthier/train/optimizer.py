"""The optimizer of the adapter's parameters, and its state as plain tensors.

AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2), β = (0.9, 0.999), ε = 1e-8, from two libraries:

    adamw               torch's update (adamw.py), fused into one kernel; two fp32 moments, 8 bytes a parameter
    adamw-8bit          bitsandbytes, both moments in blockwise 8 bit (Dettmers et al. 2022, arXiv:2110.02861)
    paged-adamw-8bit    the same, its moments in memory that CUDA may page to the host (QLoRA, arXiv:2305.14314)

bitsandbytes keeps tensors below 4,096 elements in fp32, and on a CPU quietly makes a paged optimizer an ordinary one;
we refuse instead of doing something else than was asked. State goes into checkpoints as named tensors
(`<parameter>/<moment>`), never as a pickled state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from luthier.errors import TrainingError
from luthier.plan.settings import Optimizer as OptimizerName
from luthier.plan.support import check_optimizer
from luthier.train.adamw import AdamW, Optimizer

if TYPE_CHECKING:
    from bitsandbytes.optim.optimizer import Optimizer8bit

__all__ = ["allocate_state", "load_state", "make_optimizer", "state_tensors"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8
_CONSTANT = ("qmap1", "qmap2")  # bitsandbytes' code books: one tensor that all parameters share, made anew on loading


def make_optimizer(
    name: OptimizerName, parameters: Mapping[str, torch.nn.Parameter], *, learning_rate: float, weight_decay: float
) -> Optimizer:
    """An optimizer over `parameters`, in their order. Raises UsageError where their device has no such one."""
    leaves = list(parameters.values())
    check_optimizer(name, leaves[0].device.type)
    if name == "adamw":
        return AdamW(leaves, lr=learning_rate, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
    return _eight_bit(leaves, learning_rate, weight_decay, paged=name == "paged-adamw-8bit")


def _eight_bit(
    leaves: list[torch.nn.Parameter], learning_rate: float, weight_decay: float, *, paged: bool
) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit  # here: it takes a second to import

    kind = PagedAdamW8bit if paged else AdamW8bit
    made: Optimizer = kind(leaves, lr=learning_rate, betas=BETAS, eps=EPSILON, weight_decay=weight_decay)
    return made


def allocate_state(optimizer: Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """Make the state that the first update would make, where there is none yet; the updates after are the same."""
    if isinstance(optimizer, AdamW):
        optimizer.allocate()
        return
    (group,) = optimizer.param_groups
    for index, parameter in enumerate(parameters.values()):
        if optimizer.state.get(parameter):
            continue
        optimizer.init_state(group, parameter, 0, index)  # type: ignore[attr-defined]


def state_tensors(optimizer: Optimizer, parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state as CPU tensors named `<parameter>/<key>`; a plain number becomes an int64 scalar.

    Empty before the first update. On a CPU they are the live tensors, not copies: write them before the next update.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key in _CONSTANT:
                continue
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)
            tensors[f"{name}/{key}"] = tensor.detach().cpu().contiguous()
    return tensors


def load_state(
    optimizer: Optimizer,
    parameters: Mapping[str, torch.nn.Parameter],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Put back what `state_tensors` gave. Raises TrainingError when names or shapes are not this optimizer's."""
    if not tensors:
        return
    by_parameter: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        if parameter not in by_parameter:
            raise _foreign(f"it has {name}, which is no parameter of this adapter")
        by_parameter[parameter][key] = tensor
    for name, state in by_parameter.items():
        if not state:
            raise _foreign(f"it has nothing for {name}")
    if isinstance(optimizer, AdamW):
        _load_torch(optimizer, parameters, by_parameter)
    else:
        _load_eight_bit(optimizer, parameters, by_parameter)


def _foreign(what: str) -> TrainingError:
    return TrainingError(
        f"the checkpoint's optimizer state does not belong to this run: {what}",
        "move the run directory away and train again",
    )


def _load_torch(
    optimizer: AdamW,
    parameters: Mapping[str, torch.nn.Parameter],
    by_parameter: Mapping[str, dict[str, torch.Tensor]],
) -> None:
    for name, parameter in parameters.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in by_parameter[name].items()}
        expected = {"step": (), "exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
        if shapes != expected:
            raise _foreign(f"{name} has {shapes}, expected {expected}")
    for name, parameter in parameters.items():  # copies, lest two optimizers share their moments
        state = {key: tensor.to(parameter.device, copy=True) for key, tensor in by_parameter[name].items()}
        optimizer.state[parameter] = state


def _load_eight_bit(
    optimizer: Optimizer8bit,
    parameters: Mapping[str, torch.nn.Parameter],
    by_parameter: Mapping[str, dict[str, torch.Tensor]],
) -> None:
    # Its own load_state_dict would copy paged moments into ordinary memory; buffers it made itself stay paged.
    (group,) = optimizer.param_groups
    for index, (name, parameter) in enumerate(parameters.items()):
        optimizer.init_state(group, parameter, 0, index)
        state, saved = optimizer.state[parameter], by_parameter[name]
        if set(state) - set(_CONSTANT) != set(saved):
            raise _foreign(f"{name} has {sorted(saved)}, expected {sorted(set(state) - set(_CONSTANT))}")
        for key, tensor in saved.items():
            buffer = state[key]
            if not isinstance(buffer, torch.Tensor):
                state[key] = int(tensor.item())
            elif buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                raise _foreign(f"{name}/{key} is {tensor.dtype} {tuple(tensor.shape)}, not {tuple(buffer.shape)}")
            else:
                buffer.copy_(tensor)
