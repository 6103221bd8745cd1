"""Several decoders over one copy of the weights: a base, and the same base with each of its adapters beside it."""

from __future__ import annotations

import copy

from torch import nn

from luthier.model.decoder import Decoder
from luthier.model.lora import lora_parameters

__all__ = ["share"]


def share(decoder: Decoder) -> Decoder:
    """A second decoder with the same tensors (quantised ones and their scales too) and modules of its own, so that an
    adapter that is added to one does not show in the other. Raises ValueError where `decoder` has an adapter already.
    """
    if lora_parameters(decoder):
        raise ValueError("this decoder has an adapter; share the base before it is added")
    # deepcopy takes what stands in its memo as it is: all that a module holds but the tables of its parts.
    memo: dict[int, object] = {id(parameter): parameter for parameter in decoder.parameters()}
    for module in decoder.modules():
        held = (value for value in vars(module).values() if not isinstance(value, (nn.Module, dict, list, set)))
        memo.update((id(value), value) for value in held)
    return copy.deepcopy(decoder, memo)
