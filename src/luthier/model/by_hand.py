"""A decoder layer, forward and backward, written by hand: the training step's inner loop.

The numbers are those of `Layer` in decoder.py, which is the specification; what differs is what is kept and how often
memory is gone over. Kept for the backward pass are the layer's input, q, k, v and o of attention, the residual stream
between the two halves, gate and up, and the adapters' low-rank products (joint.py). Norms, and the product
silu(gate) up, are computed again, in the pass over the same rows that their gradients need. The products with frozen
weights add into the residual stream, those of the adapters into theirs, so that no sum is a pass of its own.

A recomputed layer keeps its input (and one low-rank product) and goes forward once more, without its last product, when
its turn comes.

Legend: T tokens, n rows that are wanted of the last layer, D hidden size, I inputs, O outputs, r rank, R the sum of
ranks, H heads, K key heads, d head size, F inner size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.autograd.graph import increment_version

from luthier.kernels.by_hand import ByHand
from luthier.model.joint import Joint, joints
from luthier.model.projection import Projection

if TYPE_CHECKING:
    from luthier.model.decoder import Layer, Positions

__all__ = ["layer_by_hand"]


def layer_by_hand(
    layer: Layer, h_TD: Tensor, positions: Positions, rows_n: Tensor | None, *, recompute: bool
) -> Tensor:
    """What `layer(h_TD, positions, rows_n)` returns, with this file's gradient. The layer's kernels must be by hand."""
    leaves = [leaf for one in _projections(layer).values() if one.adapted is not None for leaf in one.adapted.leaves]
    apply: Callable[..., Tensor] = _LayerByHand.apply
    return apply(layer, positions, rows_n, recompute, h_TD, *leaves)


_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def _projections(layer: Layer) -> dict[str, Projection]:
    """By name, in the order in which the adapters' leaves are handed to autograd."""
    attention, mlp = layer.self_attn, layer.mlp
    return {
        "q_proj": attention.q_proj,
        "k_proj": attention.k_proj,
        "v_proj": attention.v_proj,
        "o_proj": attention.o_proj,
        "gate_proj": mlp.gate_proj,
        "up_proj": mlp.up_proj,
        "down_proj": mlp.down_proj,
    }


class _Context(FunctionCtx):
    layer: Layer
    positions: Positions
    joints: tuple[list[Joint], ...]
    names: tuple[str, ...]
    generator: Tensor | None
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _LayerByHand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        layer: Layer,
        positions: Positions,
        rows_n: Tensor | None,
        recompute: bool,
        h_TD: Tensor,
        *_leaves: Tensor,
    ) -> Tensor:
        kept = {"h": h_TD} if rows_n is None else {"h": h_TD, "rows": rows_n}
        work = _Pass(layer, positions, dict(kept))
        ctx.layer, ctx.positions, ctx.joints = layer, positions, work.joints
        ctx.generator = _generator_state(h_TD.device) if recompute and work.drops else None
        out_nD = work.forward()
        if not recompute:
            kept = work.kept
        elif _LAST in work.kept:
            kept[_LAST] = work.kept[_LAST]  # its input is not made again
        ctx.names = tuple(kept)
        ctx.save_for_backward(*kept.values())
        return out_nD

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad_nD: Tensor) -> tuple[Tensor | None, ...]:
        kept = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        work = _Pass(ctx.layer, ctx.positions, kept, ctx.joints)
        if "gate" not in work.kept:
            with _replayed(grad_nD.device, ctx.generator):
                work.again()
        dh_TD = work.backward(grad_nD.contiguous(), wants_input=ctx.needs_input_grad[4])
        leaves = [leaf for name in work.projections for leaf in work.leaf_gradients.get(name, ())]
        return None, None, None, None, dh_TD, *leaves


_LAST = "low of down_proj"


class _Pass:
    """One layer, once forward or once backward.

    `kept` is what the backward pass needs of the forward, by name, `together` the forward pass's `joints`.
    """

    def __init__(
        self,
        layer: Layer,
        positions: Positions,
        kept: dict[str, Tensor],
        together: tuple[list[Joint], ...] = (),
    ) -> None:
        if layer.mlp.kernels.by_hand is None:
            raise ValueError(f"the kernels `{layer.mlp.kernels.name}` have no gradients by hand")
        self.ops: ByHand = layer.mlp.kernels.by_hand
        self.layer, self.positions, self.kept = layer, positions, kept
        self.projections = _projections(layer)
        self.joints = together or tuple(
            joints({name: self.projections[name] for name in names}, training=layer.training) for names in _SAME_INPUT
        )
        self.qkv, self.o, self.gate_up, self.down = self.joints
        self.drops = any(joint.dropout for joint in (*self.qkv, *self.o, *self.gate_up, *self.down))
        self.leaf_gradients: dict[str, tuple[Tensor, Tensor]] = {}

    def forward(self) -> Tensor:
        """The layer's output (n, D)."""
        self._upto_product()
        product_nF = self.ops.swiglu(self.kept["gate"], self.kept["up"])
        (out_nD,) = self._project(self.down, product_nF, onto=self.kept["middle"])
        return out_nD

    def again(self) -> None:
        """All that `forward` keeps, from the layer's input; the last product is no part of it."""
        self._upto_product()
        for joint in self.down:
            joint.mask_again(self.kept["gate"], self.kept)

    def _upto_product(self) -> None:
        kept, attention = self.kept, self.layer.self_attn
        q_TO, k_TO, v_TO = self._project(self.qkv, self._normed("h"))
        shape = (q_TO.shape[0], -1, attention.head_dim)
        if attention.q_norm is not None:
            kept["raw q"], kept["raw k"] = q_TO.view(shape), k_TO.view(shape)
        kept["v"] = v_TO.view(shape)
        kept["q"], kept["k"] = self._turned(q_TO.view(shape), k_TO.view(shape))
        kept["o"], kept["lse"] = self.ops.attention(
            kept["q"], kept["k"], kept["v"], self.positions.lengths, attention.window
        )
        o_TO, h_TD = kept["o"].flatten(1), kept["h"]
        if "rows" in kept:
            o_TO, h_TD = o_TO[kept["rows"]], h_TD[kept["rows"]]
        (kept["middle"],) = self._project(self.o, o_TO, onto=h_TD)
        kept["gate"], kept["up"] = self._project(self.gate_up, self._normed("middle"))

    def backward(self, grad_nD: Tensor, *, wants_input: bool) -> Tensor | None:
        """The gradient of the layer's input from that of its output, and `leaf_gradients` on the way.

        What is kept of gate and up is overwritten; autograd is told, so that a second backward pass is refused.
        """
        dmiddle_nD = self._mlp_backward(grad_nD)
        kept, attention = self.kept, self.layer.self_attn
        rows_n = kept.get("rows")
        o_TO = kept["o"].flatten(1)
        if rows_n is None:
            do_TO = self._unproject(self.o, {"o_proj": dmiddle_nD}, o_TO)
        else:
            do_nO = self._unproject(self.o, {"o_proj": dmiddle_nD}, o_TO[rows_n])
            do_TO = torch.zeros_like(o_TO).index_copy_(0, rows_n, do_nO)
            dmiddle_nD = torch.zeros_like(kept["h"]).index_copy_(0, rows_n, dmiddle_nD)
        dq_THd, dk_THd, dv_THd = self.ops.attention_backward(
            do_TO.view_as(kept["o"]),
            (kept["q"], kept["k"], kept["v"]),
            (kept["o"], kept["lse"]),
            self.positions.lengths,
            attention.window,
        )
        del do_TO
        dq_THd, dk_THd = self._turned_back(dq_THd, dk_THd)
        grads = {"q_proj": dq_THd.flatten(1), "k_proj": dk_THd.flatten(1), "v_proj": dv_THd.flatten(1)}
        n_TD = self._normed("h")
        if not wants_input:  # the first layer: nothing below it is trained
            for joint in self.qkv:
                self.leaf_gradients |= joint.leaf_gradients(grads, joint.low_gradient(grads), n_TD, kept)
            return None
        dn_TD = self._unproject(self.qkv, grads, n_TD)
        norm = self.layer.input_layernorm
        return self.ops.rms_norm_backward(dn_TD, kept["h"], norm.weight, norm.eps, onto=dmiddle_nD)

    def _mlp_backward(self, grad_nD: Tensor) -> Tensor:
        """The gradient of the residual stream between the halves of the layer."""
        kept, norm, (down,) = self.kept, self.layer.post_attention_layernorm, self.down
        gate_nF, up_nF, grads = kept["gate"], kept["up"], {"down_proj": grad_nD}
        dlow_nr = down.low_gradient(grads)
        dproduct_nF = down.input_gradient(grads, dlow_nr, kept)
        product_nF = self.ops.swiglu_backward(dproduct_nF, gate_nF, up_nF)  # gate and up are their gradients now
        increment_version((gate_nF, up_nF))
        self.leaf_gradients |= down.leaf_gradients(grads, dlow_nr, product_nF, kept)
        del dproduct_nF, product_nF
        n_nD = self._normed("middle")
        dn_nD = self._unproject(self.gate_up, {"gate_proj": gate_nF, "up_proj": up_nF}, n_nD)
        return self.ops.rms_norm_backward(dn_nD, kept["middle"], norm.weight, norm.eps, onto=grad_nD)

    def _project(self, joined: list[Joint], x_TI: Tensor, onto: Tensor | None = None) -> list[Tensor]:
        return [y_TO for joint in joined for y_TO in joint.forward(x_TI, self.kept, onto)]

    def _unproject(self, joined: list[Joint], grads: dict[str, Tensor], x_TI: Tensor) -> Tensor:
        """dx of projections that share x, and the gradients of their adapters."""
        parts: list[Tensor] = []
        for joint in joined:
            dlow_TR = joint.low_gradient(grads)
            self.leaf_gradients |= joint.leaf_gradients(grads, dlow_TR, x_TI, self.kept)
            parts.append(joint.input_gradient(grads, dlow_TR, self.kept))
        for part in parts[1:]:
            parts[0] += part
        return parts[0]

    def _normed(self, of: Literal["h", "middle"]) -> Tensor:
        """What each half of the layer begins with."""
        norm = self.layer.input_layernorm if of == "h" else self.layer.post_attention_layernorm
        return self.ops.rms_norm(self.kept[of], norm.weight, norm.eps)

    def _turned(self, q_THd: Tensor, k_TKd: Tensor) -> tuple[Tensor, Tensor]:
        """q and k normed, where the family does it, and turned by their positions. May overwrite them otherwise."""
        attention, cos_Td, sin_Td = self.layer.self_attn, self.positions.cos, self.positions.sin
        if attention.q_norm is not None and attention.k_norm is not None:
            q_THd = self.ops.rms_norm(q_THd, attention.q_norm.weight, attention.q_norm.eps)
            k_TKd = self.ops.rms_norm(k_TKd, attention.k_norm.weight, attention.k_norm.eps)
        return self.ops.rope(q_THd, cos_Td, sin_Td), self.ops.rope(k_TKd, cos_Td, sin_Td)

    def _turned_back(self, dq_THd: Tensor, dk_TKd: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients before `_turned`; overwrites those after it."""
        attention, cos_Td, sin_Td = self.layer.self_attn, self.positions.cos, self.positions.sin
        dq_THd = self.ops.rope(dq_THd, cos_Td, sin_Td, back=True)
        dk_TKd = self.ops.rope(dk_TKd, cos_Td, sin_Td, back=True)
        if attention.q_norm is not None and attention.k_norm is not None:
            q_norm, k_norm = attention.q_norm, attention.k_norm
            dq_THd = self.ops.rms_norm_backward(dq_THd, self.kept["raw q"], q_norm.weight, q_norm.eps)
            dk_TKd = self.ops.rms_norm_backward(dk_TKd, self.kept["raw k"], k_norm.weight, k_norm.eps)
        return dq_THd, dk_TKd


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _replayed(device: torch.device, state: Tensor | None) -> Iterator[None]:
    """While the block runs, the generator of dropout goes on from `state`; afterwards it is as it was."""
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
