"""A folder that mlx-lm loads: weights in 16 bits or quantised to 8 or 4, a config that it reads right, the tokenizer.

mlx-lm reads Hugging Face's layout, but not every config as transformers does: what is absent has other defaults there
(a llama without `tie_word_embeddings` is tied), and for llama, mistral and qwen2 it does not look into
`rope_parameters`, where transformers 5 puts theta and the scaling: the model would run with theta 10 000, without a
word. So every key that it computes by is written out, and what its graph of a family lacks is refused.

Quantised are the matrices whose rows are a multiple of 64, the embedding too, as `mlx_lm.convert -q` does (affine.py).
Nothing here needs mlx. One weight file is in memory at a time, or none where nothing is quantised.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from luthier.data.render import Template
from luthier.errors import ExportError
from luthier.export.affine import GROUP, Bits, affine_quantized
from luthier.export.merge import write_tokenizer
from luthier.export.room import check_room
from luthier.guard.documents import read_object
from luthier.guard.header import check_safetensors
from luthier.model.config import ModelConfig, read_config
from luthier.model.locate import INDEX, SINGLE, weight_files
from luthier.model.tensor_file import write_tensors
from luthier.runs import atomic_folder, write_json

__all__ = ["MLXExport", "check_mlx_room", "mlx_config", "mlx_settings", "write_mlx", "write_mlx_files"]


@dataclass(frozen=True)
class MLXExport:
    """A folder that was written. `bits` None: the weights as they were; `kept` are the matrices that could not be
    quantised; `notes` what a user should know."""

    folder: Path
    bits: Bits | None
    size: int
    tensors: int
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def command(self) -> str:
        """What to type where mlx-lm is installed."""
        return f"mlx_lm.generate --model {shlex.quote(str(self.folder))} --prompt 'your question'"


@dataclass(frozen=True)
class _Written:
    """What went into the weight files, in bytes and tensors, and which file has which."""

    size: int
    places: Mapping[str, str]
    kept: tuple[str, ...]


def write_mlx(folder: Path, out: Path, template: Template, bits: Bits | None = None) -> MLXExport:
    """Write the model in `folder` to the folder `out`, atomically; `template` is the one that was trained.

    Raises ExportError for what mlx-lm does not compute, and for values that are not finite; FitError for a full disk.
    """
    mlx_settings(read_config(folder))  # refused before anything is written
    check_mlx_room(folder, out, bits)
    with atomic_folder(out) as beside:
        written = write_mlx_files(folder, beside, template, bits)
    return MLXExport(out, bits, written.size, written.tensors, written.kept, written.notes)


def check_mlx_room(folder: Path, out: Path, bits: Bits | None) -> None:
    """Raise FitError where the disk has no room for the model in `folder`, quantised to `bits`, at `out`."""
    size = sum(file.stat().st_size for file in weight_files(folder))
    check_room(out, size if bits is None else size * (bits + 1) // 16, "the model for mlx-lm")


def write_mlx_files(folder: Path, out: Path, template: Template, bits: Bits | None = None) -> MLXExport:
    """The same into a folder of one that the caller makes appear at once."""
    out.mkdir(exist_ok=True)
    config = read_config(folder)
    settings, notes = mlx_config(folder, config, template, bits)
    files = weight_files(folder)
    size, places, kept = 0, dict[str, str](), list[str]()
    for i, file in enumerate(files):
        name = SINGLE if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        one = _weights(file, out / name, config, bits)
        size += one.size
        places |= one.places
        kept += one.kept
    if len(files) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})
    write_json(out / "config.json", settings)
    write_tokenizer(folder, out, template)
    if kept:
        notes += (f"{len(kept)} matrices have rows that are no multiple of {GROUP} and stay as they were",)
    return MLXExport(out, bits, size, len(places), tuple(kept), notes)


def mlx_config(
    folder: Path, config: ModelConfig, template: Template, bits: Bits | None
) -> tuple[dict[str, object], tuple[str, ...]]:
    """(the config.json for mlx-lm, what to know about it). Raises ExportError for what mlx-lm does not compute."""
    settings, notes = mlx_settings(config)
    found = read_object(folder / "config.json")
    for key in (
        "rope_parameters",
        "rope_scaling",
        "torch_dtype",
        "sliding_window",
        "layer_types",
        "use_sliding_window",
    ):
        found.pop(key, None)
    if config.family == "mistral":
        found["sliding_window"] = None  # left out it would be 4,096 for transformers
    found |= settings
    found["eos_token_id"] = list(template.stop_ids)
    if bits is not None:
        scheme = {"group_size": GROUP, "bits": bits, "mode": "affine"}
        found |= {"quantization": scheme, "quantization_config": scheme}  # the second is what the hub's pages read
    return dict(sorted(found.items())), notes


def mlx_settings(config: ModelConfig) -> tuple[dict[str, object], tuple[str, ...]]:
    """(every key that mlx-lm computes this model by, what to know about it).

    Raises ExportError for what its graph of the family does not have.
    """
    _check(config)
    context, notes = config.max_positions, list[str]()
    if config.window is not None:
        context = min(context, config.window)
        notes.append(
            f"mlx-lm has no sliding window for this family: the export's context is {context} tokens, within which "
            "the two are the same"
        )
    settings: dict[str, object] = {
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": context,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tied,
    }
    if config.family != "qwen2":
        settings["head_dim"] = config.head_dim
    if config.family in ("llama", "mistral"):  # one graph there, which has biases where these two say so
        settings |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    if (scaling := _scaling(config)) is not None:
        settings["rope_scaling"] = scaling
    return settings, tuple(notes)


def _check(config: ModelConfig) -> None:
    missing: list[str] = []
    rope = config.rope
    if config.family == "qwen2" and config.head_dim != config.hidden_size // config.heads:
        missing.append(f"heads of another size than {config.hidden_size // config.heads} (hidden size / heads)")
    if config.family == "qwen3" and config.attention_bias:
        missing.append("biases on q, k, v and o")
    if rope.kind == "yarn" and not rope.truncate:
        missing.append("YaRN without rounding (`truncate: false`)")
    if rope.kind == "yarn" and rope.factor <= 1 and rope.attention_factor != 1:
        missing.append("YaRN's attention factor without stretching")
    if missing:
        raise ExportError(
            f"mlx-lm's {config.family} does not have: {', '.join(missing)}",
            "export with --to hf instead; transformers and vLLM compute it",
        )


def _scaling(config: ModelConfig) -> dict[str, object] | None:
    """`rope_scaling` as mlx-lm and transformers 4 name it, None where nothing is stretched."""
    rope = config.rope
    if rope.kind == "default":
        return None
    found: dict[str, object] = {"rope_type": rope.kind, "factor": rope.factor}
    if rope.kind == "linear":
        return found
    found["original_max_position_embeddings"] = rope.original_positions
    if rope.kind == "llama3":
        return found | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    found |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "attention_factor": rope.attention_factor}
    paper = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    if not math.isclose(rope.attention_factor, paper, rel_tol=1e-6):
        # mlx-lm has no attention factor, but a weight in its formula: 0.1 · mscale · ln(factor) + 1.
        found["mscale"] = (rope.attention_factor - 1.0) / (0.1 * math.log(rope.factor))
    return found


def _weights(source: Path, to: Path, config: ModelConfig, bits: Bits | None) -> _Written:
    """One weight file. Raises ExportError where a value is not finite."""
    header = check_safetensors(source)
    names = [name for name in header.tensors if not _unread(name, config)]
    if bits is None and len(names) == len(header.tensors):
        shutil.copyfile(source, to)
        size = sum(stored.stop - stored.start for stored in header.tensors.values())
        return _Written(size, dict.fromkeys(names, to.name), ())
    tensors: dict[str, Tensor] = {}
    kept: list[str] = []
    with safe_open(source, framework="pt") as shard:
        for name in names:
            values = shard.get_tensor(name)
            if bits is not None and values.ndim == 2 and values.shape[1] % GROUP:
                kept.append(name)
            for called, tensor in _stored(name, values, bits):
                tensors[called] = tensor
    write_tensors(to, tensors, {"format": "mlx"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    return _Written(size, dict.fromkeys(tensors, to.name), tuple(kept))


def _unread(name: str, config: ModelConfig) -> bool:
    """Tensors that no family computes by: a tied head's copy of the embedding, and tables that old files hold."""
    return name.endswith("rotary_emb.inv_freq") or (config.tied and name == "lm_head.weight")


def _stored(name: str, values: Tensor, bits: Bits | None) -> Iterator[tuple[str, Tensor]]:
    """What mlx-lm loads for a tensor: itself, or a matrix's packed weights, scales and biases."""
    if bits is None or values.ndim != 2 or values.shape[1] % GROUP:
        yield name, values
        return
    if not bool(torch.isfinite(values).all()):
        raise ExportError(f"{name} holds values that are not finite", "train again with a lower rate")
    made = affine_quantized(values, bits)
    stem = name.removesuffix(".weight")
    yield from ((name, made.packed), (f"{stem}.scales", made.scales), (f"{stem}.biases", made.biases))
