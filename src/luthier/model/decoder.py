"""The decoder of the Llama-shaped families (llama, mistral, qwen2, qwen3), in one readable file.

    h = embed(ids)
    per layer:  h = h + attention(norm(h));  h = h + mlp(norm(h))
    logits = norm(h) W_head'

Families differ in flags of ModelConfig (biases, QK-norm, sliding window, RoPE scaling, tied head), never in code
paths of their own. Parameter names are Hugging Face's, so a checkpoint's tensors find their places by name.
Numbers follow transformers: norms and rotary angles in fp32, everything else in the weights' dtype, no autocast.

Legend: T tokens of all documents one after another, S cached tokens, D hidden size, H heads, K key heads, d head size,
V vocabulary. There is no batch dimension and no padding: `lengths` says how T divides into documents, each of which
starts at position 0, or where its cache ends, and sees itself only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from luthier.kernels import REFERENCE, Kernels
from luthier.kernels.products import uses_onednn
from luthier.model.by_hand import layer_by_hand
from luthier.model.cache import Cache
from luthier.model.config import ModelConfig, projection_shapes
from luthier.model.projection import Projection
from luthier.model.rope import RopeTable

__all__ = ["Decoder"]


@dataclass(frozen=True)
class Positions:
    """What all layers share in one forward: the rotary tables of the tokens, the documents, and a cache of each or
    none."""

    cos: Tensor  # (T, d)
    sin: Tensor
    lengths: tuple[int, ...]
    caches: tuple[Cache, ...]


class _Norm(nn.Module):
    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps, self.kernels = eps, kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class _Attention(nn.Module):
    q_proj: Projection
    k_proj: Projection
    v_proj: Projection
    o_proj: Projection

    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels, linear: type[Projection]) -> None:
        super().__init__()
        self.layer, self.kernels, self.head_dim = layer, kernels, config.head_dim
        self.window = config.layer_window(layer)
        shapes = projection_shapes(config)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            bias = config.output_bias if name == "o_proj" else config.attention_bias
            self.add_module(name, linear(shapes[name][1], shapes[name][0], bias))
        self.q_norm = _Norm(config.head_dim, config.norm_eps, kernels) if config.qk_norm else None
        self.k_norm = _Norm(config.head_dim, config.norm_eps, kernels) if config.qk_norm else None

    def forward(self, x_TD: Tensor, positions: Positions) -> Tensor:
        heads = (x_TD.shape[0], -1, self.head_dim)
        q_THd: Tensor = self.q_proj(x_TD).view(heads)
        k_TKd: Tensor = self.k_proj(x_TD).view(heads)
        v_TKd: Tensor = self.v_proj(x_TD).view(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q_THd, k_TKd = self.q_norm(q_THd), self.k_norm(k_TKd)
        kernels = self.kernels
        q_THd = kernels.rope(q_THd, positions.cos, positions.sin)
        k_TKd = kernels.rope(k_TKd, positions.cos, positions.sin)
        if not positions.caches:
            o_THd = kernels.attention(q_THd, k_TKd, v_TKd, positions.lengths, self.window)
        else:
            o_THd = self._cached(q_THd, k_TKd, v_TKd, positions)
        o_TD: Tensor = self.o_proj(o_THd.flatten(1))
        return o_TD

    def _cached(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, positions: Positions) -> Tensor:
        found: list[Tensor] = []
        cuts = [torch.split(x, list(positions.lengths)) for x in (q_THd, k_TKd, v_TKd)]
        for cache, q_tHd, k_tKd, v_tKd in zip(positions.caches, *cuts, strict=True):
            k_SKd, v_SKd = cache.extend(self.layer, k_tKd, v_tKd)
            found.append(self.kernels.cached_attention(q_tHd, k_SKd, v_SKd, self.window))
        return found[0] if len(found) == 1 else torch.cat(found)


class _MLP(nn.Module):
    gate_proj: Projection
    up_proj: Projection
    down_proj: Projection

    def __init__(self, config: ModelConfig, kernels: Kernels, linear: type[Projection]) -> None:
        super().__init__()
        self.kernels = kernels
        shapes = projection_shapes(config)
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, linear(shapes[name][1], shapes[name][0], config.mlp_bias))

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.down_proj(self.kernels.swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))
        return y_TD


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, kernels: Kernels, linear: type[Projection]) -> None:
        super().__init__()
        self.self_attn = _Attention(config, layer, kernels, linear)
        self.mlp = _MLP(config, kernels, linear)
        self.input_layernorm = _Norm(config.hidden_size, config.norm_eps, kernels)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.norm_eps, kernels)

    def forward(self, h_TD: Tensor, positions: Positions, rows_n: Tensor | None = None) -> Tensor:
        """The residual stream after the layer; with `rows_n`, of these tokens only."""
        a_TD = self.self_attn(self.input_layernorm(h_TD), positions)
        h_nD = h_TD + a_TD if rows_n is None else h_TD[rows_n] + a_TD[rows_n]
        out_nD: Tensor = h_nD + self.mlp(self.post_attention_layernorm(h_nD))
        return out_nD


class _Table(nn.Module):
    """A frozen (V, D) matrix: the embedding, or the head where it is not the embedding."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size), requires_grad=False)


class _Body(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels, linear: type[Projection]) -> None:
        super().__init__()
        self.embed_tokens = _Table(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer, kernels, linear) for layer in range(config.layers))
        self.norm = _Norm(config.hidden_size, config.norm_eps, kernels)


class Decoder(nn.Module):
    """A causal language model with frozen weights. Made empty (see load_decoder for one with weights).

    The first `checkpointing` layers are recomputed in the backward pass, which keeps their inputs only. It is the first
    because their turn comes last, when the later layers' activations are free again. 0: none.
    """

    def __init__(
        self, config: ModelConfig, kernels: Kernels = REFERENCE, linear: type[Projection] = Projection
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.checkpointing = 0
        self.model = _Body(config, kernels, linear)
        self.lm_head = None if config.tied else _Table(config.vocab_size, config.hidden_size)
        self._rope = RopeTable(config)

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the matrix that makes logits; the embedding itself where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.embed_tokens.weight.device

    @property
    def rounds(self) -> bool:
        """Whether products are faster with a number of rows that was there before (see Batch.rounded)."""
        return self.kernels.by_hand is not None and uses_onednn(self.device, self.dtype)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """From the first to the last."""
        return tuple(layer for layer in self.model.layers if isinstance(layer, Layer))

    def use(self, kernels: Kernels) -> None:
        """Compute with these kernels from now on."""
        for module in self.modules():
            if isinstance(module, (Decoder, _Attention, _MLP, _Norm)):
                module.kernels = kernels

    def hidden(
        self,
        ids_T: Tensor,
        lengths: tuple[int, ...] | None = None,
        cache: Cache | tuple[Cache, ...] | None = None,
        rows_n: Tensor | None = None,
    ) -> Tensor:
        """h_TD after the final norm; with `rows_n` (int64), of these tokens only, which spares the last layer the rest.

        `lengths` are the documents' token counts (None: one document). With a `cache` of each, ids_T continues the
        documents that they hold, and the caches then hold these tokens too. Raises ValueError where lengths, caches and
        ids disagree, or a cache has no room.
        """
        caches = () if cache is None else cache if isinstance(cache, tuple) else (cache,)
        positions = self._positions(ids_T, lengths, caches)
        h_TD = functional.embedding(ids_T, self.model.embed_tokens.weight)
        trains = not caches and torch.is_grad_enabled()
        last = self.config.layers - 1
        for number, layer in enumerate(self.layers):
            rows = rows_n if number == last else None
            again = trains and number < self.checkpointing
            if trains and self.kernels.by_hand is not None:
                h_TD = layer_by_hand(layer, h_TD, positions, rows, recompute=again)
            elif again:
                h_TD = checkpoint(layer, h_TD, positions, rows, use_reentrant=False)
            else:
                h_TD = layer(h_TD, positions, rows)
        for one, tokens in zip(caches, positions.lengths, strict=False):  # without caches there are none
            one.length += tokens
        out_nD: Tensor = self.model.norm(h_TD)
        return out_nD

    def logits(self, h_TD: Tensor) -> Tensor:
        """l_TV in the compute dtype."""
        return functional.linear(h_TD, self.head_weight)

    def forward(self, ids_T: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
        """l_TV, the logits of the token after each."""
        return self.logits(self.hidden(ids_T, lengths))

    def _positions(self, ids_T: Tensor, lengths: tuple[int, ...] | None, caches: tuple[Cache, ...]) -> Positions:
        total = ids_T.shape[0]
        lengths = (total,) if lengths is None else lengths
        if ids_T.ndim != 1 or sum(lengths) != total or min(lengths, default=0) < 1:
            raise ValueError(f"documents of {lengths} tokens do not make up ids of the shape {tuple(ids_T.shape)}")
        if caches and len(caches) != len(lengths):
            raise ValueError(f"{len(caches)} caches for {len(lengths)} documents")
        for cache, length in zip(caches, lengths, strict=False):
            cache.reserve(length)
        starts = tuple(cache.length for cache in caches) or (0,) * len(lengths)
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        cos_Pd, sin_Pd = self._rope.get(max(ends), ids_T.device, self.dtype)
        if len(lengths) == 1:
            return Positions(cos_Pd[starts[0] : ends[0]], sin_Pd[starts[0] : ends[0]], lengths, caches)
        position_T = torch.cat([torch.arange(*ends_of) for ends_of in zip(starts, ends, strict=True)]).to(ids_T.device)
        return Positions(cos_Pd[position_T], sin_Pd[position_T], lengths, caches)

    def rotary(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin (P, d) of at least that many positions, in the compute dtype."""
        return self._rope.get(positions, self.device, self.dtype)
