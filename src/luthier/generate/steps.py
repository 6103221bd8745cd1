"""A decoder as generation needs it: read a prompt into a cache, then one token more of several texts at once.

    read(ids, cache)       logits_V of the last of them     torch, a document of its own
    step(ids, caches)      logits_RV, a row a text          one call into C, or the decoder's own layers

On a CPU with the compiled kernels, and weights that are not quantised, a step of all layers is one call into C
(kernels/decoding.py). There, and in `read`, a text's numbers do not depend on what is decoded with it. In the decoder's
own layers they do by rounding: torch multiplies two rows by other sums than one.

Legend: R texts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luthier.kernels.decoding import Laid, LayerWeights, Matrix, ModelWeights, lay_out
from luthier.kernels.native import DTYPES, Native
from luthier.model.cache import Cache
from luthier.model.decoder import Decoder, Layer
from luthier.model.projection import Projection

__all__ = ["Steps"]


class Steps:
    """`decoder` in eval mode, its adapters as they are now: what is trained later is not seen."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._laid = _laid(decoder)

    @property
    def exact(self) -> bool:
        """Whether a text's numbers are the same to the last bit whatever is decoded with it."""
        return self._laid is not None

    @torch.inference_mode()
    def read(self, ids: Sequence[int], cache: Cache) -> Tensor:
        """Logits (V,) after `ids`, which continue what the cache holds."""
        ids_T = torch.tensor(ids, dtype=torch.long, device=self.decoder.device)
        h_TD = self.decoder.hidden(ids_T, cache=cache, rows_n=ids_T.new_tensor([len(ids) - 1]))
        return self.decoder.logits(h_TD)[0]

    @torch.inference_mode()
    def step(self, ids: Sequence[int], caches: Sequence[Cache]) -> Tensor:
        """Logits (R, V) after one more token of each text."""
        if self._laid is None:
            ids_T = torch.tensor(ids, dtype=torch.long, device=self.decoder.device)
            return self.decoder.logits(self.decoder.hidden(ids_T, (1,) * len(ids), tuple(caches)))
        for cache in caches:
            cache.reserve(1)
        lengths = [cache.length for cache in caches]
        tables = self.decoder.rotary(max(lengths) + 1)
        logits_RV = self._laid.step(ids, lengths, [cache.address for cache in caches], tables)
        for cache in caches:
            cache.length += 1
        return logits_RV


def _laid(decoder: Decoder) -> Laid | None:
    """The decoder's weights for C; None where they are not on a CPU, quantised, or its kernels are others."""
    ops, config = decoder.kernels.by_hand, decoder.config
    plain = all(type(one) is Projection for one in decoder.modules() if isinstance(one, Projection))
    if not isinstance(ops, Native) or not plain or decoder.device.type != "cpu" or decoder.dtype not in DTYPES:
        return None
    body = decoder.model
    weights = ModelWeights(
        body.embed_tokens.weight,
        body.norm.weight,
        decoder.head_weight,
        tuple(_layer(layer, config.layer_window(number)) for number, layer in enumerate(decoder.layers)),
        config.heads,
        config.kv_heads,
        config.head_dim,
        config.norm_eps,
    )
    return lay_out(ops, weights)


def _layer(layer: Layer, window: int | None) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (
        layer.input_layernorm.weight,
        layer.post_attention_layernorm.weight,
        None if attention.q_norm is None else attention.q_norm.weight,
        None if attention.k_norm is None else attention.k_norm.weight,
    )
    projections = (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    )
    return LayerWeights(norms, tuple(map(_matrix, projections)), window)


def _matrix(projection: Projection) -> Matrix:
    adapted, dtype = projection.adapted, projection.weight.dtype
    if adapted is None:
        return Matrix(projection.weight, projection.bias)
    a, b = (leaf.detach().to(dtype).contiguous() for leaf in adapted.leaves)
    return Matrix(projection.weight, projection.bias, a, b, adapted.scaling)
