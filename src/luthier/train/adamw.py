"""AdamW over torch's own update, without torch.optim.Optimizer around it.

The class around it imports torch's compiler when it is made, which takes as long as half of torch: a second in which a
small run is done with its first step. The update is the same call (`torch.optim.adamw.adamw`, fused), so the numbers
are those of torch.optim.AdamW, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypedDict

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["AdamW", "Group", "Optimizer"]


class Group(TypedDict):
    """What torch calls a parameter group; there is one."""

    params: list[torch.nn.Parameter]
    lr: float


class Optimizer(Protocol):
    """What a step needs of an optimizer, ours or bitsandbytes'."""

    param_groups: list[Group]
    state: dict[torch.nn.Parameter, dict[str, Tensor]]

    def step(self) -> object: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...


class AdamW:
    """Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, on fp32 parameters.

    `state[parameter]`, made at the first step, holds `step` (a scalar beside it), `exp_avg` and `exp_avg_sq`.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.param_groups: list[Group] = [{"params": list(parameters), "lr": lr}]
        self.state: dict[torch.nn.Parameter, dict[str, Tensor]] = {}
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def allocate(self) -> None:
        """Make the state of every parameter that has none."""
        for parameter in self.param_groups[0]["params"]:
            if parameter not in self.state:
                moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.state[parameter] = {"step": step, **moments}

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.allocate()
        (group,) = self.param_groups
        trained = [parameter for parameter in group["params"] if parameter.grad is not None]
        states = [self.state[parameter] for parameter in trained]
        adamw(
            list[Tensor](trained),
            [parameter.grad for parameter in trained if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=group["lr"],
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero."""
        for parameter in self.param_groups[0]["params"]:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()
