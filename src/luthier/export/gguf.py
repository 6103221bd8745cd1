"""A model folder in Hugging Face's layout -> one GGUF file, for llama.cpp, Ollama and all that build on them.

    config.json -> <arch>.* keys     tokenizer -> tokenizer.ggml.* keys     *.safetensors -> tensors, some rows at once

gguf_tensors.py says what becomes of each tensor, gguf_vocab.py of the tokenizer. K-quants take two steps: a file that
holds the weights as they are, then llama.cpp's quantiser (gguf_quantize.py).

Llama 3's long-context scaling (Llama 3.1 model card) goes in as a tensor of factors by which each frequency is divided.

All is written in a folder beside the place it is for, and moved there when it is whole (gguf_files.py).
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from luthier.data.conversation import Turn
from luthier.data.render import Template, make_template
from luthier.data.tokenizer import load_tokenizer
from luthier.errors import ExportError
from luthier.export.gguf_files import GB, check_room, folder_beside, place, written
from luthier.export.gguf_quantize import check_quantiser, quantise
from luthier.export.gguf_tensors import (
    ARCHITECTURES,
    BLOCK,
    SUPER_BLOCK,
    Planned,
    TensorBytes,
    final_size,
    plan_tensors,
)
from luthier.export.gguf_types import K_QUANTS, Quantize
from luthier.export.gguf_vocab import Vocabulary, read_vocabulary
from luthier.model.config import ModelConfig, read_config
from luthier.model.locate import weight_files
from luthier.runs import recover_folder

__all__ = ["About", "GGUFFile", "Quantize", "begins_with_bos", "rope_factors", "write_gguf"]

FILE_TYPES: Mapping[Quantize, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}

_KEYS_BYTES = 2**20
"""More than all keys but the vocabulary's take, the chat template among them."""


@dataclass(frozen=True)
class About:
    """What the file says of itself; `license` is an SPDX name where the base's is known."""

    name: str = ""
    base: str = ""
    license: str = ""


@dataclass(frozen=True)
class GGUFFile:
    """A file that was written. `kept_f16` are the tensors whose rows fit no block; `notes` what a user should know.

    `parts` are all files, where there are several; `path` is then the first of them, and `size` that of all.
    """

    path: Path
    size: int
    quantize: Quantize
    tensors: int
    kept_f16: tuple[str, ...]
    notes: tuple[str, ...]
    parts: tuple[Path, ...] = ()


def write_gguf(
    folder: Path,
    path: Path,
    quantize: Quantize = "f16",
    about: About | None = None,
    *,
    template: Template | None = None,
    split: int = 0,
) -> GGUFFile:
    """Write the model in `folder` (merged, with its tokenizer and chat template) to `path`, atomically.

    A few rows of a tensor are in memory at a time. `template`: another one than the folder's own, for a base that an
    adapter goes with. `split`: the most bytes of a file, 0 for all in one.

    Raises:
        ExportError: for what llama.cpp does not compute or tokenise the same way, and a missing quantiser.
        FitError: the disk has too little room; nothing was written.
    """
    check_quantiser(quantize)
    config = read_config(folder)
    _check(config)
    template = template or make_template("model", load_tokenizer(folder))
    vocabulary = read_vocabulary(folder, config.vocab_size)
    planned = plan_tensors(config, weight_files(folder), quantize)
    notes = [*vocabulary.notes]
    context = config.max_positions
    if config.window is not None and config.window < context:
        context = config.window
        notes.append(
            f"llama.cpp has no sliding window for this family: the file's context is {context} tokens, within which "
            "the two are the same"
        )
    keys = _KEYS_BYTES + vocabulary.bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)  # what a kill left of this name
    check_room(path.parent, planned, quantize, keys)
    with folder_beside(path) as beside:
        first = beside / path.name
        with _writer(first, ARCHITECTURES[config.family]) as writer:
            _about(writer, about or About(), folder, quantize)
            _hyperparameters(writer, config, context)
            _tokenizer(writer, vocabulary, template)
            _tensors(writer, config, planned, _Parts(quantize, split, keys))
        if quantize in K_QUANTS:
            _k_quant(first, quantize)
        paths = place(beside, path)
    shapes = _shapes(planned, quantize)
    notes += shapes.notes
    if split and len(paths) == 1:
        notes.append(f"all of it fits into one file of {split / GB:g} GB: it was not split")
    over = [part.name for part in paths if part.stat().st_size > split > 0]
    if over:
        notes.append(f"{', '.join(over)}: larger than {split / GB:g} GB, since a tensor is never divided")
    size = sum(part.stat().st_size for part in paths)
    parts = tuple(paths) if len(paths) > 1 else ()
    return GGUFFile(paths[0], size, quantize, len(planned), shapes.kept, tuple(notes), parts)


@dataclass(frozen=True)
class _Shapes:
    """The tensors that no block fits, and what to say of shapes."""

    kept: tuple[str, ...]
    notes: tuple[str, ...]


def _shapes(planned: Sequence[Planned], quantize: Quantize) -> _Shapes:
    if quantize in ("f32", "f16", "bf16"):
        return _Shapes((), ())
    matrices = [tensor for tensor in planned if len(tensor.shape) > 1]
    kept = tuple(tensor.name for tensor in matrices if tensor.shape[-1] % BLOCK)
    notes: list[str] = []
    if kept:
        notes.append(f"{len(kept)} of {len(planned)} tensors have rows that are no multiple of {BLOCK} and stay F16")
    if quantize in K_QUANTS:
        other = sum(1 for tensor in matrices if tensor.shape[-1] % SUPER_BLOCK) - len(kept)
        if other:
            notes.append(
                f"{other} of {len(planned)} tensors have rows that are no multiple of {SUPER_BLOCK}: llama.cpp "
                f"gave them a larger type in blocks of {BLOCK}"
            )
    return _Shapes(kept, tuple(notes))


@contextmanager
def _writer(path: Path, architecture: gguf.MODEL_ARCH) -> Iterator[gguf.GGUFWriter]:
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    try:
        yield writer
    finally:
        writer.close()


def _k_quant(path: Path, quantize: Quantize) -> None:
    """Put the K-quant in the place of the file, or of the parts, at `path`."""
    sources = written(path)
    wanted = path.with_name(f"k-{path.name}")
    name = wanted.with_suffix("") if len(sources) > 1 else wanted
    quantise(sources[0], name, quantize, parts=len(sources) > 1, threads=torch.get_num_threads())
    for source, made in zip(sources, written(wanted), strict=True):
        made.replace(source)


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
    writer.add_type("model")
    writer.add_name(about.name or folder.name)
    writer.add_license(about.license)
    if about.base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, about.base.rsplit("/", 1)[-1])
        if "/" in about.base and not Path(about.base).exists():
            writer.add_base_model_organization(0, about.base.split("/")[0])
    writer.add_file_type(int(FILE_TYPES[quantize]))
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


@dataclass(frozen=True)
class _Parts:
    """Where one file ends and the next begins: at `most` bytes of what it becomes, the keys in the first counted."""

    quantize: Quantize
    most: int
    keys: int

    def begin(self, writer: gguf.GGUFWriter, planned: Sequence[Planned]) -> None:
        """Tell the writer of each tensor, and in which part it is.

        The writer counts its own bytes where it splits; a K-quant's parts are to be measured in what they become.
        """
        used = self.keys
        for tensor in planned:
            final = final_size(tensor, self.quantize)
            if self.most and used + final > self.most and writer.tensors[-1]:
                writer.tensors.append({})
                used = _KEYS_BYTES
            used += final
            nbytes = TensorBytes(tensor).nbytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=tensor.kind)


def _tensors(writer: gguf.GGUFWriter, config: ModelConfig, planned: Sequence[Planned], parts: _Parts) -> None:
    factors = rope_factors(config) if config.rope.kind == "llama3" else None
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    parts.begin(writer, planned)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
        _check_written(writer)
    for tensor in planned:
        writer.write_tensor_data(TensorBytes(tensor))
        _check_written(writer)


def _check_written(writer: gguf.GGUFWriter) -> None:
    """Raise OSError where a tensor is not all in the file, also where a library writes one and says nothing."""
    writer.flush()
    for file in writer.fout:
        if os.fstat(file.fileno()).st_size < file.tell():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
