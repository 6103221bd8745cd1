"""A model folder in Hugging Face's layout -> one GGUF file, for llama.cpp, Ollama and all that build on them.

    config.json -> <arch>.* keys     tokenizer -> tokenizer.ggml.* keys     *.safetensors -> tensors, one at a time

Matrices are F16 or Q8_0, norms and biases F32. Q8_0 (Dettmers et al. 2022's block absmax in ggml's form) takes rows in
blocks of 32; a matrix whose rows are no multiple of that stays F16, and the result names it.

llama.cpp's `llama` rotates pairs (2i, 2i+1) where transformers rotates (i, i + d/2), so the rows of q and k are put
into its order:  new row 2i + s of a head = old row i + s d/2. Its `qwen2` and `qwen3` rotate as transformers does.

Llama 3's long-context scaling (Llama 3.1 model card) goes in as a tensor of factors by which each frequency is divided.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf_vocab import Vocabulary, read_vocabulary
from luthier.guard.header import check_safetensors
from luthier.model.config import ModelConfig, read_config
from luthier.model.locate import weight_files

__all__ = ["About", "GGUFFile", "Quantize", "begins_with_bos", "rope_factors", "write_gguf"]

Quantize = Literal["f16", "q8_0"]
Array = NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint8]

ARCHITECTURES: Mapping[str, gguf.MODEL_ARCH] = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
"""Family -> llama.cpp's graph."""

BLOCK = 32
"""Q8_0: values that share one scale."""

FP16_MAX = 65504.0


@dataclass(frozen=True)
class About:
    """What the file says of itself; `license` is an SPDX name where the base's is known."""

    name: str = ""
    base: str = ""
    license: str = ""


@dataclass(frozen=True)
class GGUFFile:
    """A file that was written. `kept_f16` are the tensors that Q8_0 could not take; `notes` what a user should know."""

    path: Path
    size: int
    quantize: Quantize
    tensors: int
    kept_f16: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Planned:
    """One tensor to write: where it is, what it will be."""

    file: Path
    source: str
    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    heads: int | None  # q and k of the llama graph: how many heads the rows are reordered in


def write_gguf(folder: Path, path: Path, quantize: Quantize = "f16", about: About | None = None) -> GGUFFile:
    """Write the model in `folder` (merged, with its tokenizer and chat template) to `path`, atomically.

    One tensor is in memory at a time. Raises ExportError for what llama.cpp does not compute or tokenise the same way.
    """
    config = read_config(folder)
    _check(config)
    template = make_template("model", load_tokenizer(folder))
    vocabulary = read_vocabulary(folder, config.vocab_size)
    planned = _plan(config, weight_files(folder), quantize)
    notes = [*vocabulary.notes]
    context = config.max_positions
    if config.window is not None and config.window < context:
        context = config.window
        notes.append(
            f"llama.cpp has no sliding window for this family: the file's context is {context} tokens, within which "
            "the two are the same"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writer(beside, ARCHITECTURES[config.family]) as writer:
        _about(writer, about or About(), folder, quantize)
        _hyperparameters(writer, config, context)
        _tokenizer(writer, vocabulary, template)
        _tensors(writer, config, planned)
        _flush(beside)
        beside.replace(path)
    kept = tuple(t.name for t in planned if t.kind == gguf.GGMLQuantizationType.F16) if quantize == "q8_0" else ()
    if kept:
        notes.append(f"{len(kept)} of {len(planned)} tensors have rows that are no multiple of {BLOCK} and stay F16")
    return GGUFFile(path, path.stat().st_size, quantize, len(planned), kept, tuple(notes))


@contextmanager
def _writer(path: Path, architecture: gguf.MODEL_ARCH) -> Iterator[gguf.GGUFWriter]:
    """The library's writer on a file that is removed again unless it was moved to its place."""
    path.unlink(missing_ok=True)  # the library would write through a link
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        yield writer
    finally:
        writer.close()
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check(config: ModelConfig) -> None:
    """Refuse what llama.cpp's graph of the family leaves out."""
    llama = ARCHITECTURES[config.family] is gguf.MODEL_ARCH.LLAMA
    missing: list[str] = []
    if not llama and config.rope.kind == "llama3":
        missing.append("RoPE scaling of the kind llama3")
    if not llama and config.output_bias:
        missing.append("a bias on o_proj")
    if config.rope.kind == "yarn" and not config.rope.truncate:
        missing.append("YaRN without rounding (`truncate: false`)")
    if missing:
        raise ExportError(
            f"llama.cpp's {config.family} does not have: {', '.join(missing)}",
            "export with --to hf instead; transformers and vLLM compute it",
        )


def _about(writer: gguf.GGUFWriter, about: About, folder: Path, quantize: Quantize) -> None:
    kinds = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_type("model")
    writer.add_name(about.name or folder.name)
    writer.add_license(about.license)
    if about.base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about.base.rsplit("/", 1)[-1])
        if "/" in about.base and not Path(about.base).exists():
            writer.add_base_model_organization(0, about.base.split("/")[0])
    writer.add_file_type(int(kinds[quantize]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _hyperparameters(writer: gguf.GGUFWriter, config: ModelConfig, context: int) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    rope = config.rope
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    elif rope.kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_positions)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        # llama.cpp multiplies by the paper's factor (equation 22) by itself; the key holds what comes on top.
        paper = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
        if not math.isclose(rope.attention_factor, paper, rel_tol=1e-6):
            writer.add_rope_scaling_attn_factors(rope.attention_factor / paper)


def _tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary, template: Template) -> None:
    tokenizer = template.tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)
    # Every end token of these is one that generation stops at. A template may write `eos_token`, so that one keeps its
    # name; the end of turn stands beside it.
    eos = tokenizer.token_id(tokenizer.eos_token) if tokenizer.eos_token is not None else None
    writer.add_eos_token_id(template.end_of_turn if eos is None else eos)
    writer.add_eot_token_id(template.end_of_turn)
    others = [number for number in template.stop_ids if number not in (eos, template.end_of_turn)]
    if others:
        writer.add_eom_token_id(others[0])
    pad = tokenizer.special.get("pad_token")
    if isinstance(pad, str) and (pad_id := tokenizer.token_id(pad)) is not None:
        writer.add_pad_token_id(pad_id)
    unknown = tokenizer.special.get("unk_token")
    if isinstance(unknown, str) and (unknown_id := tokenizer.token_id(unknown)) is not None:
        writer.add_unk_token_id(unknown_id)
    if tokenizer.bos_id is not None:
        writer.add_bos_token_id(tokenizer.bos_id)
    # True where the model was trained with BOS first. Runtimes then put it before plain text, and take care themselves
    # that a rendered chat which begins with it does not get a second one.
    writer.add_add_bos_token(begins_with_bos(template))
    writer.add_add_eos_token(False)
    writer.add_chat_template(template.chat_template_source)


def begins_with_bos(template: Template) -> bool:
    """Whether the model was trained with the beginning-of-text token first."""
    bos = template.tokenizer.special.get("bos_token")
    return isinstance(bos, str) and template.render([Turn("user", "a")], generation_prompt=True).startswith(bos)


def rope_factors(config: ModelConfig) -> NDArray[np.float32]:
    """Llama 3's scaling as divisors of the head_dim/2 frequencies: 1 for short waves, `factor` for long ones, between
    them interpolated, as the Llama 3.1 model card gives it."""
    rope = config.rope
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    wavelengths = 2 * math.pi * config.rope_theta**exponents
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = ((rope.original_positions / wavelengths - low) / (high - low)).clip(0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1.0 - smooth) / rope.factor + smooth)).astype(np.float32)
    return factors


def _plan(config: ModelConfig, files: tuple[Path, ...], quantize: Quantize) -> list[_Planned]:
    architecture = ARCHITECTURES[config.family]
    names = gguf.get_tensor_name_map(architecture, config.layers)
    reorder = architecture is gguf.MODEL_ARCH.LLAMA
    planned: list[_Planned] = []
    for file in files:
        for source, stored in check_safetensors(file).tensors.items():
            if source.endswith("rotary_emb.inv_freq") or (config.tied and source == "lm_head.weight"):
                continue
            name = names.get_name(source, try_suffixes=(".weight", ".bias"))
            if name is None:
                raise ExportError(f"{source} in {file.name} has no place in GGUF", "Merge the model again.")
            part = source.split(".")[-2]
            heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(part) if reorder else None
            planned.append(_Planned(file, source, name, stored.shape, _kind(stored.shape, quantize), heads))
    return planned


def _kind(shape: tuple[int, ...], quantize: Quantize) -> gguf.GGMLQuantizationType:
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    fits = shape[-1] % BLOCK == 0
    return gguf.GGMLQuantizationType.Q8_0 if quantize == "q8_0" and fits else gguf.GGMLQuantizationType.F16


def _tensors(writer: gguf.GGUFWriter, config: ModelConfig, planned: list[_Planned]) -> None:
    factors = rope_factors(config) if config.rope.kind == "llama3" else None
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for tensor in planned:
        block, size = gguf.GGML_QUANT_SIZES[tensor.kind]
        nbytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
        _check_written(writer)
    for tensor in planned:
        with safe_open(tensor.file, framework="pt") as shard:
            stored = shard.get_tensor(tensor.source)
        writer.write_tensor_data(_converted(tensor, stored.to(torch.float32).numpy()))
        _check_written(writer)


def _check_written(writer: gguf.GGUFWriter) -> None:
    """Raise OSError where a tensor is not all in the file. numpy's tofile says nothing where its last few KiB find no
    room: it ignores what closing its own copy of the file comes to."""
    writer.flush()
    for file in writer.fout:
        if os.fstat(file.fileno()).st_size < file.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)


def _converted(tensor: _Planned, values: NDArray[np.float32]) -> Array:
    if tensor.heads is not None:
        halves = values.reshape(tensor.heads, 2, -1, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    if tensor.kind == gguf.GGMLQuantizationType.F32:
        return np.ascontiguousarray(values)
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        raise ExportError(f"{tensor.source} holds values that are not finite", "train again with a lower rate")
    if tensor.kind == gguf.GGMLQuantizationType.F16:
        if largest > FP16_MAX:
            reason = f"{tensor.source} holds {largest:g}, and fp16 ends at {FP16_MAX:g}"
            raise ExportError(reason, "export with --quantize q8_0")
        return values.astype(np.float16)
    quantised: NDArray[np.uint8] = gguf.quants.quantize(np.ascontiguousarray(values), tensor.kind)
    return quantised
