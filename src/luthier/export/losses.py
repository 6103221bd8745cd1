"""The held-out loss of a QLoRA run's merges: into the 16-bit base, and into the rounded one that it was trained on.

    as trained         NF4(W) x + s B A x          rounded base, adapter beside it
    onto 16-bit        round(W + s B A) x          what is written unless asked otherwise
    onto quantised     round(NF4(W) + s B A) x     `luthier merge --onto-quantised`

The first and the last differ by one rounding to 16 bits. The second has weights that the adapter never saw; they are
nearer to what the base was before it was rounded, and often, not always, the loss says that this counts for more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from luthier.data.conversation import Example
from luthier.evaluate.loss import held_out_loss
from luthier.export.merge import DTYPES, StoredDtype
from luthier.model.adapter import load_adapter
from luthier.model.decoder import Decoder
from luthier.model.load import load_decoder
from luthier.model.lora import LoRA, merge_delta, projections
from luthier.model.projection import Projection

__all__ = ["MergeLosses", "fold", "merge_losses"]


@dataclass(frozen=True)
class MergeLosses:
    """Held-out losses, nats a labelled token, on `rows` rows; `trained` is that of the adapter on the NF4 base."""

    trained: float
    onto_16bit: float
    onto_quantised: float
    rows: int


def merge_losses(
    base: Path, adapter: Path, rows: Sequence[Example], stored: StoredDtype, computed: StoredDtype
) -> MergeLosses:
    """Measure all three on the CPU; `stored` is the merged folder's dtype, `computed` that of training.

    Each is loaded anew: at no time is more than one model in memory. Raises DataError where no row has a label.
    """
    trained = _adapted(base, adapter, "nf4", computed)
    as_trained = held_out_loss(trained, rows).loss
    fold(trained, DTYPES[stored][0])
    quantised = held_out_loss(trained, rows).loss
    del trained
    plain = _adapted(base, adapter, "none", computed)
    fold(plain, DTYPES[stored][0])
    return MergeLosses(as_trained, held_out_loss(plain, rows).loss, quantised, len(rows))


def _adapted(base: Path, adapter: Path, quantize: Literal["none", "nf4"], dtype: StoredDtype) -> Decoder:
    decoder = load_decoder(base, dtype=DTYPES[dtype][0], quantize=quantize)
    load_adapter(decoder, adapter)
    return decoder


@torch.no_grad()
def fold(decoder: Decoder, dtype: torch.dtype) -> None:
    """Put each projection's adapter into its weight as `merge` does, rounded to `dtype`; none stays quantised."""
    for name, held in list(projections(decoder)):
        weight_OI = held.dense().float()
        if isinstance(held.adapter, LoRA):
            weight_OI = weight_OI + merge_delta(held.adapter.A, held.adapter.B, held.adapter.scaling)
        plain = Projection(0, 0, bias=False)
        plain.inputs, plain.outputs = held.inputs, held.outputs
        plain.assign("weight", weight_OI.to(dtype).to(decoder.dtype))
        if held.bias is not None:
            plain.assign("bias", held.bias.data)
        owner, _, attribute = name.rpartition(".")
        setattr(decoder.get_submodule(owner), attribute, plain)
