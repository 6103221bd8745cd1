"""What a sitting is made of, from settings alone: the trainee and the micro-batches."""

from __future__ import annotations

from luthier.data.batches import Batches
from luthier.kernels.choose import kernels_for
from luthier.model.decoder import Decoder
from luthier.model.lora import LoRASpec, add_lora, lora_parameters
from luthier.plan.settings import Settings
from luthier.train.identity import TrainingRows
from luthier.train.optimizer import make_optimizer
from luthier.train.step import Trainee, make_scaler

__all__ = ["make_batches", "make_trainee"]


def make_trainee(decoder: Decoder, settings: Settings) -> Trainee:
    """Add the LoRA that `settings` ask for, seeded, and make its optimizer and loss scaler; the decoder then computes
    as they say."""
    spec = LoRASpec(settings.rank, settings.alpha, settings.dropout, settings.targets, settings.scale)
    add_lora(decoder, spec, settings.seed)
    decoder.checkpointing = settings.checkpointing
    decoder.use(kernels_for(decoder.device, decoder.dtype, settings.attention).kernels)
    decoder.train()
    parameters = lora_parameters(decoder)
    optimizer = make_optimizer(
        settings.optimizer, parameters, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return Trainee(decoder, parameters, optimizer, make_scaler(settings.device, settings.precision))


def make_batches(dataset: TrainingRows, settings: Settings) -> Batches:
    """The micro-batches of every step."""
    return Batches(
        dataset.train,
        settings.batch_size,
        settings.micro_batch,
        settings.seed,
        capacity=settings.max_length if settings.packing else None,
        longest_first=settings.longest_first,
    )
