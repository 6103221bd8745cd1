"""Operations and gradients for CPUs in C (native/*.h), fp32 and bf16, called through ctypes.

The library is compiled when the package is installed, once for each instruction set in hardware/compiled.py; the best
one that this processor runs is loaded here. Every tensor is contiguous and on the CPU; threads are torch's.

Legend: T tokens, H query heads, K key heads, d head size, N rows of logits, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["DTYPES", "Native"]

INTERFACE = 2
"""Of the C functions; the same as in native/kernels.c."""

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}

_ARGUMENTS = {  # p a tensor or None, l an integer, f a number, as the functions in native/*.h take them
    "rms_norm": "pppllf",
    "rms_norm_backward": "pppppllf",
    "rope": "ppplllf",
    "swiglu": "pppl",
    "swiglu_backward": "pppl",
    "attention": "pppppp" + "llllll",
    "attention_backward": "pppppppppp" + "llllll",
    "cross_entropy": "pppplll",
    "decode": "ppp",  # addresses of structures, see decoding.py
}
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}


class Native:
    """See `ByHand`; one loaded library. Raises OSError or AttributeError where it is not what it should be."""

    def __init__(self, file: Path) -> None:
        library = ctypes.CDLL(str(file))
        if library.interface() != INTERFACE:
            raise OSError("was compiled from other sources")
        self._functions: dict[tuple[str, torch.dtype], Callable[..., int]] = {}
        for name, letters in _ARGUMENTS.items():
            for dtype, suffix in DTYPES.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes = [_TYPES[letter] for letter in letters]
                function.restype = ctypes.c_int
                self._functions[name, dtype] = function

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = torch.empty_like(x)
        size = x.shape[-1]
        self._call("rms_norm", x, x, weight, y, x.numel() // size, size, eps)
        return y

    def rms_norm_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, eps: float, onto: Tensor | None = None
    ) -> Tensor:
        out = torch.empty_like(x)
        size = x.shape[-1]
        self._call("rms_norm_backward", x, grad, x, weight, onto, out, x.numel() // size, size, eps)
        return out

    def rope(self, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor, back: bool = False) -> Tensor:
        tokens, heads, size = x_THd.shape
        sign = -1.0 if back else 1.0
        self._call("rope", x_THd, x_THd, cos_Td, sin_Td, tokens, heads, size, sign)
        return x_THd

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        y = torch.empty_like(gate)
        self._call("swiglu", gate, gate, up, y, gate.numel())
        return y

    def swiglu_backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
        self._call("swiglu_backward", gate, grad, gate, up, gate.numel())
        return grad

    def attention(
        self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, lengths: tuple[int, ...], window: int | None
    ) -> tuple[Tensor, Tensor]:
        o_THd = torch.empty_like(q_THd)
        lse_TH = torch.empty(q_THd.shape[:2], dtype=torch.float32)
        shape = _shape(q_THd, k_TKd, lengths, window)
        self._call("attention", q_THd, q_THd, k_TKd, v_TKd, o_THd, lse_TH, *shape)
        return o_THd, lse_TH

    def attention_backward(
        self,
        grad_THd: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        outputs: tuple[Tensor, Tensor],
        lengths: tuple[int, ...],
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq_THd, dk_TKd, dv_TKd = (torch.empty_like(x) for x in inputs)
        o_THd, lse_TH = outputs
        shape = _shape(inputs[0], inputs[1], lengths, window)
        tensors = (*inputs, o_THd, grad_THd, lse_TH, dq_THd, dk_TKd, dv_TKd)
        self._call("attention_backward", inputs[0], *tensors, *shape)
        return dq_THd, dk_TKd, dv_TKd

    def cross_entropy(
        self, logits_NV: Tensor, labels_N: Tensor, weights_N: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """See `loss.cross_entropy`; the gradient takes the place of the logits. `weights_N` is fp32."""
        loss_N = torch.empty(logits_NV.shape[0])
        self._call("cross_entropy", logits_NV, logits_NV, labels_N, weights_N, loss_N, *logits_NV.shape, int(gradient))
        return loss_N, logits_NV

    def decode(self, model: int, rows: int, logits_RV: Tensor) -> None:
        """Fill `logits_RV` after one step; the others are addresses of structures (decoding.py)."""
        self._call("decode", logits_RV, model, rows, logits_RV)

    def _call(self, name: str, like: Tensor, *arguments: Tensor | ctypes.Array[ctypes.c_int64] | float | None) -> None:
        """Call `name` for the dtype of `like`. Raises MemoryError where it says that it found none."""
        pointers = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
        if self._functions[name, like.dtype](*pointers):
            raise MemoryError(f"{name}: no memory for its scratch space")


def _shape(
    q_THd: Tensor, k_TKd: Tensor, lengths: tuple[int, ...], window: int | None
) -> tuple[ctypes.Array[ctypes.c_int64] | int, ...]:
    """The last arguments of attention: documents, heads, window (0: none), threads."""
    heads, size = q_THd.shape[1:]
    return _ends(lengths), len(lengths), heads, k_TKd.shape[1], size, window or 0, torch.get_num_threads()


@lru_cache(maxsize=64)  # the layers of a step ask for the same
def _ends(lengths: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    """Where each document ends, counted from the first."""
    ends: list[int] = []
    for length in lengths:
        ends.append(length + (ends[-1] if ends else 0))
    return (ctypes.c_int64 * len(ends))(*ends)
