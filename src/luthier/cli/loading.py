"""A model to talk to, from whatever the user points at: a run directory, an adapter, or a merged model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli import console
from luthier.errors import UsageError
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    import torch

    from luthier.data.render import Template
    from luthier.hardware.device import Device
    from luthier.model.decoder import Decoder

__all__ = ["Voice", "dtype_of", "open_target"]


@dataclass(frozen=True)
class Voice:
    """A model that answers, and the template it was trained with."""

    name: str
    decoder: Decoder
    template: Template


def dtype_of(precision: str) -> torch.dtype:
    """The torch dtype of a plan's precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def open_target(target: Path, *, base_only: bool) -> Voice:
    """Load what `target` names; with `base_only` the model under the adapter."""
    from luthier.data.render import make_template
    from luthier.data.tokenizer import load_tokenizer
    from luthier.hardware.probe import this_device
    from luthier.model.adapter import load_adapter, read_adapter_config
    from luthier.model.load import load_decoder
    from luthier.model.locate import locate_model

    adapter = _adapter_of(target)
    if adapter is None and base_only:
        raise UsageError(f"{target} is a whole model: there is no base under it", "leave out --base")
    with console.waiting(f"loading {target}"):
        # The tokenizer and template that were trained with lie in the adapter's folder, and in a merged model's.
        tokenizer = load_tokenizer(adapter if adapter is not None else target)
        template = make_template("model", tokenizer)
        folder = target if adapter is None else locate_model(read_adapter_config(adapter)[1])
        device = this_device()
        decoder = load_decoder(folder, dtype=dtype_of(_precision(device)), device=device.kind)
        if adapter is not None and not base_only:
            load_adapter(decoder, adapter)
    return Voice(target.name, decoder, template)


def _adapter_of(target: Path) -> Path | None:
    """The adapter that `target` holds or is; None for a whole model."""
    run = RunDirectory(target)
    if (target / "adapter_config.json").is_file():
        return target
    if run.recipe.is_file():
        if not run.adapter.is_dir():
            raise UsageError(
                f"the run in {target} has no adapter yet", "let it come to its end: luthier train --resume"
            )
        return run.adapter
    if (target / "config.json").is_file():
        return None
    if not target.exists():
        raise UsageError(f"there is no {target}", "give a run directory, an adapter, or a merged model's folder")
    raise UsageError(
        f"{target} is neither a run directory nor an adapter nor a model's folder",
        "luthier train makes a run directory, luthier merge a model's folder",
    )


def _precision(device: Device) -> str:
    """16-bit where the hardware is fast in it: what is said is the same, and it comes sooner."""
    return next((precision for precision in ("bf16", "fp16") if precision in device.fast), "fp32")
