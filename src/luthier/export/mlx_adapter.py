"""The adapter in mlx-lm's own format, which it puts on the base without merging, on a quantised one too.

    adapters.safetensors   <projection>.lora_a (I, r) = A', <projection>.lora_b (r, O) = B', fp32
    adapter_config.json    num_layers, lora_parameters: rank, scale (s itself, not alpha), dropout, keys
    base/                  the base as mlx-lm has to see it, where its own folder will not do

mlx-lm takes config, chat template and stop tokens from the base's folder. Where it would read the config otherwise than
it was trained by (mlx.py), or the template that was trained is not the base's, the adapter on that folder would talk
gibberish: then, and where a quantised base is asked for, a base is written beside the adapter.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from luthier.data.render import Template
from luthier.data.tokenizer import load_tokenizer
from luthier.export.affine import Bits
from luthier.export.factors import Factors, read_factors
from luthier.export.mlx import check_mlx_room, mlx_settings, write_mlx_files
from luthier.guard.documents import read_object
from luthier.model.config import ModelConfig, read_config
from luthier.model.tensor_file import write_tensors
from luthier.runs import atomic_folder, write_json

__all__ = ["BASE", "MLXAdapter", "write_mlx_adapter"]

BASE = "base"


@dataclass(frozen=True)
class MLXAdapter:
    """A folder that was written; `base` is the folder to load it on."""

    folder: Path
    base: Path
    tensors: int
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """What to type where mlx-lm is installed."""
        base, adapter = shlex.quote(str(self.base)), shlex.quote(str(self.folder))
        return f"mlx_lm.generate --model {base} --adapter-path {adapter} --prompt 'your question'"


def write_mlx_adapter(base: Path, adapter: Path, out: Path, template: Template, bits: Bits | None = None) -> MLXAdapter:
    """Write the PEFT adapter in `adapter` to the folder `out` for mlx-lm, atomically; `template` was trained.

    `bits`: with a base quantised to so many. Raises ExportError where adapter and base do not belong together, listing
    every tensor, and for what mlx-lm does not compute.
    """
    config = read_config(base)
    mlx_settings(config)
    factors = read_factors(adapter, base)
    tensors: dict[str, Tensor] = {}
    for stem, pair in factors.pairs.items():
        tensors |= {f"{stem}.lora_a": pair.A.float().T.contiguous(), f"{stem}.lora_b": pair.B.float().T.contiguous()}
    reasons = _misread(base, config, template)
    notes: tuple[str, ...] = ()
    if bits is not None or reasons:
        check_mlx_room(base, out, bits)
    with atomic_folder(out) as beside:
        write_tensors(beside / "adapters.safetensors", tensors, {"format": "mlx"})
        if bits is not None or reasons:
            notes = write_mlx_files(base, beside / BASE, template, bits).notes
        if reasons:
            notes += (f"{BASE}/ is the base to use with it: mlx-lm reads {base} otherwise ({'; '.join(reasons)})",)
        where = out / BASE if (beside / BASE).is_dir() else base
        write_json(beside / "adapter_config.json", _config(config, factors, str(where.resolve())))
    return MLXAdapter(out, where, len(tensors), notes)


def _config(config: ModelConfig, factors: Factors, model: str) -> dict[str, object]:
    return {
        "fine_tune_type": "lora",
        "model": model,
        "num_layers": config.layers,
        "lora_parameters": {
            "rank": factors.spec.rank,
            "scale": factors.spec.scaling,
            "dropout": factors.spec.dropout,
            # model.layers.0.self_attn.q_proj -> self_attn.q_proj
            "keys": list(dict.fromkeys(stem.split(".", 3)[3] for stem in factors.pairs)),
        },
    }


def _misread(base: Path, config: ModelConfig, template: Template) -> list[str]:
    """Why the base's own folder will not do for mlx-lm, in words; empty where it will."""
    found, (wanted, _) = read_object(base / "config.json"), mlx_settings(config)
    wanted.pop("max_position_embeddings")
    wanted.setdefault("rope_scaling", None)
    other = [key for key, value in wanted.items() if found.get(key) != value]
    reasons = [f"config.json: {', '.join(other)}"] if other else []
    if load_tokenizer(base).chat_template != template.chat_template_source:
        reasons.append("its chat template is not the one that was trained")
    if not set(template.stop_ids) <= _stops(base, found):
        reasons.append("it does not stop at every token that ends an answer")
    return reasons


def _stops(base: Path, config: dict[str, object]) -> set[object]:
    """The end tokens that mlx-lm takes from the folder: generation_config.json's, where it has any."""
    generation = base / "generation_config.json"
    ids = (read_object(generation).get("eos_token_id") if generation.is_file() else None) or config.get("eos_token_id")
    return set(ids) if isinstance(ids, list) else {ids}
