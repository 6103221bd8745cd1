"""A model to talk to, from whatever the user points at: a run directory, an adapter, or a merged model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.cli import console
from luthier.errors import FitError, UsageError
from luthier.guard.documents import read_object
from luthier.plan.support import quantizes
from luthier.recipe.schema import BUNDLED_MODEL
from luthier.runs import RunDirectory

if TYPE_CHECKING:
    from luthier.data.render import Template
    from luthier.hardware.device import Device
    from luthier.model.decoder import Decoder
    from luthier.plan.settings import Quantize

__all__ = ["Voice", "load_base", "open_family", "open_target", "unfinished"]


@dataclass(frozen=True)
class Voice:
    """A model that answers, and the template it was trained with; `parent` names its base where that speaks too."""

    name: str
    decoder: Decoder
    template: Template
    parent: str | None = None


def unfinished(run: Path) -> UsageError:
    """The error for a run without an adapter, with the command that finishes it."""
    return UsageError(
        f"the run in {run} has not ended: it has no adapter yet",
        f"luthier train {RunDirectory(run).recipe} --resume --out {run}",
    )


def load_base(folder: Path, precision: str, device: str, quantize: Quantize) -> Decoder:
    """The base model's weights, frozen, with the fastest kernels for the device: to speak, training chooses again.

    Raises FitError where memory runs out on the way.
    """
    import torch

    from luthier.kernels.choose import kernels_for
    from luthier.model.load import load_decoder
    from luthier.train.memory import out_of_memory, reset_peaks

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    reset_peaks(torch.device(device))  # what was done before (reading rows, measuring speed) is not the loading's peak
    try:
        decoder = load_decoder(folder, dtype=dtype, device=device, quantize=quantize)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise FitError(
            f"the weights of {folder.name} in {precision} do not fit the memory of this {device} device",
            "quantize: nf4 takes a quarter of it (train again with it); or free the memory that others hold",
        ) from error
    decoder.use(kernels_for(decoder.device, decoder.dtype).kernels)
    return decoder


def open_target(target: Path, *, base_only: bool, adapted: bool = False) -> Voice:
    """Load what `target` names; with `base_only` the model under the adapter.

    Raises UsageError where there is no such thing, or, for `base_only` and `adapted`, no adapter.
    """
    from luthier.data.render import make_template
    from luthier.data.tokenizer import load_tokenizer
    from luthier.hardware.probe import this_device
    from luthier.model.adapter import load_adapter
    from luthier.model.locate import locate_model

    adapter = _adapter_of(target)
    if adapter is None and (base_only or adapted):
        remedy = f"leave out {'--base' if base_only else '--compare'}"
        raise UsageError(f"{target} is a whole model: there is no base under it", remedy)
    folder = locate_model(str(target) if adapter is None else _base_of(adapter))
    speaks = folder if adapter is None else _speaks(adapter, folder)
    with console.waiting(f"loading {target}"):
        template = make_template("model", load_tokenizer(speaks))
        device, held = this_device(), _settings(adapter)
        precision = _precision(device, held)
        decoder = load_base(folder, precision, device.kind, _quantize(held, device, precision))
        if adapter is not None and not base_only:
            load_adapter(decoder, adapter)
    return Voice(target.name, decoder, template)


def open_family(target: Path, adapters: Mapping[str, Path], name: str | None) -> list[Voice]:
    """What `target` names, its base where it is an adapter, and more adapters by name: over one copy of the weights.

    `name` is the target's, in place of its folder's. Raises UsageError for an adapter of another base and for a name
    that two have, before any weights are loaded.
    """
    from luthier.data.render import make_template
    from luthier.data.tokenizer import load_tokenizer
    from luthier.hardware.probe import this_device
    from luthier.model.adapter import load_adapter
    from luthier.model.locate import locate_model
    from luthier.model.shared import share

    own = _adapter_of(target)
    base = str(target) if own is None else _base_of(own)
    folder = locate_model(base)
    below = name if own is None and name else Path(base.partition("@")[0]).name
    found = {} if own is None else {name or target.resolve().name: own}
    for called, path in adapters.items():
        if called in found:
            raise _same_name(called)
        found[called] = _on_base(called, path, base, folder)
    if below in found:
        raise _same_name(below)
    with console.waiting(f"loading {target}"):
        device, held = this_device(), _settings(own)
        precision = _precision(device, held)
        decoder = load_base(folder, precision, device.kind, _quantize(held, device, precision))
        voices: list[Voice] = []
        for called, adapter in found.items():
            adapted = share(decoder)
            load_adapter(adapted, adapter)
            template = make_template("model", load_tokenizer(_speaks(adapter, folder)))
            voices.append(Voice(called, adapted.eval(), template, below))
        # The base is spoken to as its adapter is, so that the two can be compared; it may have no template of its own.
        template = make_template("model", load_tokenizer(folder if own is None else _speaks(own, folder)))
        return [*voices, Voice(below, decoder, template)]


def _on_base(called: str, path: Path, base: str, folder: Path) -> Path:
    """The adapter that `path` holds. Raises UsageError where its base is not the one in `folder`."""
    from luthier.model.locate import locate_model

    found = _adapter_of(path)
    if found is None:
        raise UsageError(
            f"--adapter {called}={path}: this is a whole model", "serve it by itself, on a port of its own"
        )
    belongs = _base_of(found)
    # Another name is looked up only where that asks no hub, and fetches no second base.
    near = Path(belongs).exists() or belongs.partition("@")[0] == base.partition("@")[0]
    if belongs != base and not (near and locate_model(belongs) == folder):
        raise UsageError(
            f"--adapter {called}={path}: it belongs to {belongs}, and this server's base is {base}",
            "serve it by itself, on a port of its own",
        )
    return found


def _same_name(called: str) -> UsageError:
    return UsageError(
        f"two models would be called {called}", "--name NAME for the first, --adapter NAME=PATH for the others"
    )


def _speaks(adapter: Path, folder: Path) -> Path:
    """Whose tokenizer and template an adapter has: those it was trained with lie beside it; one that PEFT wrote has
    none, and takes its base's."""
    return adapter if (adapter / "tokenizer_config.json").is_file() else folder


def _base_of(adapter: Path) -> str:
    """The name of the model that an adapter belongs to."""
    from luthier.model.adapter import read_adapter_config

    _, base = read_adapter_config(adapter)
    if not base:
        raise UsageError(
            f"{adapter / 'adapter_config.json'} does not name a base model",
            "write the base's folder or hub id there as base_model_name_or_path",
        )
    return base


def _settings(adapter: Path | None) -> Mapping[str, object]:
    """What the base was trained with, where the adapter lies in its run."""
    plan = None if adapter is None else RunDirectory(adapter.parent).plan
    if plan is None or not plan.is_file():
        return {}
    found = read_object(plan).get("settings")
    return found if isinstance(found, dict) else {}


def _quantize(held: Mapping[str, object], device: Device, precision: str) -> Quantize:
    """As the base was held in training: what fitted then fits now. Of FP8 where this device has it and computes in
    bf16, else unquantised, which is nearer to it than 4 bits."""
    if held.get("quantize") == "fp8":
        return "fp8" if quantizes("fp8", device) and precision == "bf16" else "none"
    return "nf4" if held.get("quantize") == "nf4" else "none"


def _adapter_of(target: Path) -> Path | None:
    """The adapter that `target` holds or is; None for a whole model."""
    run = RunDirectory(target)
    if str(target) == BUNDLED_MODEL and not target.exists():
        return None
    if (target / "adapter_config.json").is_file():
        return target
    if run.recipe.is_file():
        if not run.adapter.is_dir():
            raise unfinished(target)
        return run.adapter
    if (target / "config.json").is_file():
        return None
    if not target.exists():
        raise UsageError(f"there is no {target}", "give a run directory, an adapter, or a merged model's folder")
    raise UsageError(
        f"{target} is neither a run directory nor an adapter nor a model's folder",
        "luthier train makes a run directory, luthier merge a model's folder",
    )


def _precision(device: Device, held: Mapping[str, object]) -> str:
    """That of training, on the same kind of device; else 16-bit where the hardware is fast in it: what is said is the
    same, and it comes sooner."""
    if held.get("device") == device.kind and held.get("precision") in ("bf16", "fp16", "fp32"):
        return str(held["precision"])
    return next((precision for precision in ("bf16", "fp16") if precision in device.fast), "fp32")
