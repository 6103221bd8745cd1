"""The implementation of attention that a run has settled on, for what computes beside its loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from luthier.kernels import only_math
from luthier.kernels.choose import kernels_for
from luthier.model.decoder import Decoder
from luthier.plan.settings import Attention

__all__ = ["attention_of"]


@contextmanager
def attention_of(decoder: Decoder, name: Attention) -> Iterator[None]:
    """While the block runs, `decoder` computes attention as the training loop does with the setting `name`."""
    decoder.use(kernels_for(decoder.device, decoder.dtype, name).kernels)
    with only_math(name):
        yield
