"""The matrix products of the layer by hand and of the loss: torch's, and in fp32 on some CPUs oneDNN's instead.

torch multiplies fp32 matrices on x86 by Intel's MKL, which leaves the 512-bit registers of other makers' processors
unused. oneDNN, which torch brings along for bf16 and whose products torch's own compiler calls by this name, uses them
(docs/decisions/0012 has by how much). Like the bf16 ones it builds a kernel for each number of rows.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["add_product", "linear", "product", "uses_onednn", "weighted_sum"]


@cache
def _onednn_in_fp32() -> bool:
    """Whether this processor has AVX-512, is not Intel's, and torch can be asked for oneDNN's product."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # built without oneDNN
        return False
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.11 has it not
    found: dict[str, object] = {} if ask is None else ask()
    return bool(found.get("avx512_f")) and "intel" not in str(found.get("cpu_name", "intel")).lower()


def uses_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products on `device` in `dtype` are oneDNN's, which wait for a kernel at each new number of rows."""
    return device.type == "cpu" and (dtype.itemsize == 2 or (dtype == torch.float32 and _onednn_in_fp32()))


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W' + b."""
    if x_TI.dtype != torch.float32 or not uses_onednn(x_TI.device, x_TI.dtype) or x_TI.numel() == 0:
        return functional.linear(x_TI, weight_OI, bias_O)
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
    return y_TO


def product(a_TK: Tensor, b_KN: Tensor) -> Tensor:
    """a b."""
    if a_TK.dtype != torch.float32 or not uses_onednn(a_TK.device, a_TK.dtype):
        return a_TK @ b_KN
    return linear(a_TK, b_KN.t())


def add_product(onto_TN: Tensor, a_TK: Tensor, b_KN: Tensor) -> Tensor:
    """onto + a b, in the place of onto."""
    if a_TK.dtype != torch.float32 or not uses_onednn(a_TK.device, a_TK.dtype):
        return onto_TN.addmm_(a_TK, b_KN)
    return onto_TN.add_(linear(a_TK, b_KN.t()))


def weighted_sum(a_TM: Tensor, b_TN: Tensor) -> Tensor:
    """a' b (M, N), the sum over rows of their outer products. One of M and N is a rank, so the smaller is turned."""
    if a_TM.dtype != torch.float32 or not uses_onednn(a_TM.device, a_TM.dtype):
        return a_TM.t() @ b_TN
    if a_TM.shape[1] > b_TN.shape[1]:  # oneDNN is slow where a large operand lies across
        return linear(b_TN.t(), a_TM.t()).t()
    return linear(a_TM.t(), b_TN.t())
