"""What stands in a GGUF file, read back by the gguf library: types, bytes, parts; and what is refused first."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from luthier.errors import ExportError, FitError, UsageError
from luthier.export import gguf_tensors
from luthier.export.gguf import write_gguf
from luthier.export.gguf_quantize import quantise
from luthier.export.gguf_tensors import final_size, plan_tensors
from luthier.export.gguf_types import K_QUANTS, QUANTIZE, Quantize, quantize_named
from luthier.model.config import read_config
from luthier.model.locate import locate_model
from tests import tiny

DIRECT = tuple(name for name in QUANTIZE if name not in K_QUANTS)
HEADS = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
"""Every row a multiple of 256."""

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (extra [llama-cpp])"
)


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    """The model with its weights in `dtype`, as a merge writes them in 16 bits."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: one.to(dtype) for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama in bf16 whose rows are multiples of 32."""
    sizes = {"hidden_size": 96, "intermediate_size": 160, "attention_bias": True}
    return in_dtype(tiny.make_model(tmp_path_factory.mktemp("m") / "hf", **sizes), torch.bfloat16)


def tensors(*paths: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for path in paths for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: gguf.ReaderTensor) -> NDArray[np.float32]:
    found: NDArray[np.float32] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return found


def rotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of rows, from its definition: new row 2i + s of a head is old row i + s d/2."""
    d = weight.shape[0] // heads
    order = [head * d + i + s * (d // 2) for head in range(heads) for i in range(d // 2) for s in (0, 1)]
    return weight[order]


@pytest.mark.parametrize("quantize", DIRECT)
def test_each_type_holds_the_weights_as_the_library_writes_them(
    model: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tensors, "ROWS_BYTES", 4 * 96 * 24)  # several pieces in each matrix, heads kept whole
    written = write_gguf(model, tmp_path / "m.gguf", quantize)
    assert (written.kept_f16, written.parts, written.size) == ((), (), (tmp_path / "m.gguf").stat().st_size)
    found, weights = tensors(written.path), load_file(model / "model.safetensors")
    wanted = {
        "blk.1.attn_q.weight": rotated(weights["model.layers.1.self_attn.q_proj.weight"], 6),
        "blk.1.attn_q.bias": rotated(weights["model.layers.1.self_attn.q_proj.bias"], 6),
        "blk.2.attn_k.weight": rotated(weights["model.layers.2.self_attn.k_proj.weight"], 2),
        "blk.0.ffn_down.weight": weights["model.layers.0.mlp.down_proj.weight"],
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output.weight": weights["lm_head.weight"],
        "blk.0.attn_norm.weight": weights["model.layers.0.input_layernorm.weight"],
    }
    for name, weight in wanted.items():
        kind = gguf.GGMLQuantizationType[quantize.upper()]
        if weight.ndim == 1:
            kind = gguf.GGMLQuantizationType.F32
        elif quantize in ("q4_0", "q5_0") and name == "output.weight":
            kind = gguf.GGMLQuantizationType.Q8_0  # its error would reach the logits undamped
        assert found[name].tensor_type == kind, name
        exact = weight.to(torch.float32).numpy()
        again = gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(exact), kind), kind)
        assert np.array_equal(values(found[name]).reshape(again.shape), again), name
        if quantize in ("f32", "bf16"):  # bit for bit the weights that were merged
            assert np.array_equal(values(found[name]).reshape(exact.shape), exact)
    reader = gguf.GGUFReader(written.path)
    assert reader.fields["general.file_type"].contents() == int(
        gguf.LlamaFileType["ALL_F32" if quantize == "f32" else f"MOSTLY_{quantize.upper()}"]
    )


def test_pieces_do_not_change_a_byte(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_gguf(model, tmp_path / "whole.gguf", "q8_0").path.read_bytes()
    monkeypatch.setattr(gguf_tensors, "ROWS_BYTES", 1)
    pieces = write_gguf(model, tmp_path / "pieces.gguf", "q8_0").path.read_bytes()
    assert pieces == whole


def test_a_tied_embedding_makes_the_logits(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf", hidden_size=96, intermediate_size=160, tie_word_embeddings=True)
    found = tensors(write_gguf(folder, tmp_path / "m.gguf", "q4_0").path)
    assert "output.weight" not in found
    assert found["token_embd.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert found["blk.0.attn_v.weight"].tensor_type == gguf.GGMLQuantizationType.Q4_0


# --- K-quants ---------------------------------------------------------------------------------------------------------


@needs_llama_cpp
@pytest.mark.llama_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_k_quants_come_from_the_weights_as_they_are(tmp_path: Path, dtype: torch.dtype) -> None:
    sizes = {"intermediate_size": 512, "num_hidden_layers": 2}
    folder = in_dtype(tiny.make_model(tmp_path / "hf", **HEADS, **sizes), dtype)
    weights = load_file(folder / "model.safetensors")
    exact = weights["model.layers.0.mlp.up_proj.weight"].float().numpy()
    for quantize, error in (("q6_k", 0.02), ("q5_k_m", 0.04), ("q4_k_m", 0.08)):
        written = write_gguf(folder, tmp_path / f"{quantize}.gguf", quantize_named(quantize))
        found = tensors(written.path)
        kind = gguf.GGMLQuantizationType[quantize.removesuffix("_m").upper()]
        assert found["blk.0.ffn_up.weight"].tensor_type == kind
        assert found["output.weight"].tensor_type == gguf.GGMLQuantizationType.Q6_K
        gap = values(found["blk.0.ffn_up.weight"]) - exact
        # The step of b bits over a block's range of some 5 sigma, evenly spread: 5 / 2^b / sqrt(12).
        assert np.sqrt((gap**2).mean()) < error * exact.std() * 1.25
        assert written.notes == ()
        planned = plan_tensors(read_config(folder), (folder / "model.safetensors",), quantize_named(quantize))
        foreseen = sum(final_size(tensor, quantize_named(quantize)) for tensor in planned)
        real = sum(int(tensor.n_bytes) for tensor in found.values())
        assert real <= foreseen <= 1.25 * real
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", *sorted(f"{name}.gguf" for name in K_QUANTS)]


@needs_llama_cpp
@pytest.mark.llama_cpp
def test_rows_that_no_super_block_fits(tiny_llama: Path, tmp_path: Path) -> None:
    written = write_gguf(tiny_llama, tmp_path / "m.gguf", "q4_k_m")
    found = tensors(written.path)
    assert "blk.0.ffn_up.weight" in written.kept_f16  # rows of 48
    assert found["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert found["blk.0.attn_output.weight"].tensor_type == gguf.GGMLQuantizationType.Q5_0  # rows of 96
    assert any("stay F16" in note for note in written.notes)
    assert any("no multiple of 256" in note for note in written.notes)


def test_a_missing_quantiser_is_said_first(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ExportError, match="llama-cpp-python is not installed") as caught:
        write_gguf(tiny_llama, tmp_path / "out" / "m.gguf", "q4_k_m")
    assert 'pip install "luthier[llama-cpp]"' in str(caught.value.remedy)
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
@pytest.mark.llama_cpp
def test_what_llama_cpp_says_where_it_refuses(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not one")
    with pytest.raises(ExportError, match=r"llama\.cpp's quantiser gave up") as caught:
        quantise(tmp_path / "bad.gguf", tmp_path / "out.gguf", "q4_k_m", parts=False, threads=1)
    assert len(caught.value.message.splitlines()) > 1  # its own words too
    assert "q8_0" in str(caught.value.remedy)


@needs_llama_cpp
@pytest.mark.llama_cpp
def test_no_room_for_the_k_quant_itself(tmp_path: Path) -> None:
    """The first file fits, llama.cpp's does not: told apart from a file that it does not understand."""
    folder = in_dtype(tiny.make_model(tmp_path / "hf", **HEADS, intermediate_size=512), torch.bfloat16)
    source = write_gguf(folder, tmp_path / "m.gguf", "bf16").path
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(ExportError, match="disk is full"):
            quantise(source, tmp_path / "q.gguf", "q4_k_m", parts=False, threads=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["f16", pytest.param("q4_k_m", marks=[needs_llama_cpp, pytest.mark.llama_cpp])])
def test_parts(tmp_path: Path, quantize: Quantize) -> None:
    sizes = {"intermediate_size": 1024, "num_hidden_layers": 12}
    folder = in_dtype(tiny.make_model(tmp_path / "hf", **HEADS, **sizes), torch.bfloat16)
    path, most = tmp_path / "out" / "m.gguf", 3_000_000
    whole = tensors(write_gguf(folder, path, quantize).path)
    written = write_gguf(folder, path, quantize, split=most)
    count = len(written.parts)
    assert count > 2
    assert [part.name for part in written.parts] == [f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert sorted(path.parent.iterdir()) == list(written.parts)  # the whole one, older, is gone
    assert written.path == written.parts[0]
    assert all(part.stat().st_size <= most for part in written.parts)
    assert written.size == sum(part.stat().st_size for part in written.parts)
    divided = tensors(*written.parts)
    assert divided.keys() == whole.keys()
    assert all(np.array_equal(divided[name].data, whole[name].data) for name in whole)
    for number, part in enumerate(written.parts):
        fields = gguf.GGUFReader(part).fields
        assert fields["split.no"].contents() == number
        assert fields["split.count"].contents() == count
        assert fields["split.tensors.count"].contents() == len(whole)
    fewer = write_gguf(folder, path, quantize, split=2 * most)
    assert 1 < len(fewer.parts) < count
    assert sorted(path.parent.iterdir()) == list(fewer.parts)
    one = write_gguf(folder, path, quantize, split=10**9)
    assert (one.parts, sorted(path.parent.iterdir())) == ((), [path])
    assert any("was not split" in note for note in one.notes)


def test_a_tensor_larger_than_a_part(model: Path, tmp_path: Path) -> None:
    written = write_gguf(model, tmp_path / "m.gguf", "f32", split=1)
    assert len(written.parts) == written.tensors  # each alone
    assert any("never divided" in note for note in written.notes)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "near"), [("q4_k", "q4_k_m"), ("q8", "q8_0"), ("int4", "Known"), ("fp16", "f16")])
def test_an_unknown_type(text: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"no --quantize {text}") as caught:
        quantize_named(text)
    assert near in str(caught.value.remedy)
    assert all(name in str(caught.value.remedy) for name in QUANTIZE)


def test_types_are_taken_in_any_case() -> None:
    assert [quantize_named(name.upper()) for name in QUANTIZE] == list(QUANTIZE)


@pytest.mark.parametrize("quantize", ["q8_0", pytest.param("q4_k_m", marks=[needs_llama_cpp, pytest.mark.llama_cpp])])
def test_a_disk_that_is_too_small_is_said_before(
    model: Path, tmp_path: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "m.gguf"
    real = write_gguf(model, path, quantize).size
    before = path.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=real // 2))
    with pytest.raises(FitError, match=f"^{quantize} needs .* GB .*nothing was written") as caught:
        write_gguf(model, path, quantize)
    assert "Free " in str(caught.value.remedy)
    assert ("for a while" in caught.value.message) == (quantize in K_QUANTS)
    assert [found.name for found in path.parent.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == before  # the older one is still there
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4 * real + 2**22))
    write_gguf(model, path, quantize)


def test_values_that_fp16_does_not_hold(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf", hidden_size=96, intermediate_size=160)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    save_file({k: w.to(torch.bfloat16) for k, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=r"up_proj\.weight holds .* fp16 ends") as caught:
        write_gguf(folder, tmp_path / "m.gguf", "f16")
    assert caught.value.remedy == "export with --quantize bf16"
    assert [found.name for found in tmp_path.iterdir()] == ["hf"]
    largest = values(tensors(write_gguf(folder, tmp_path / "m.gguf", "bf16").path)["blk.0.ffn_up.weight"]).max()
    assert largest == torch.tensor(1e5).to(torch.bfloat16)
    weights["model.layers.0.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for quantize in DIRECT:
        with pytest.raises(ExportError, match="not finite"):
            write_gguf(folder, tmp_path / "m.gguf", quantize)


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_take_white_space_are_refused(flag: str, tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf")
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"][-1][flag] = True
    (folder / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ExportError, match=f"eot_id.* sets `{flag}`"):
        write_gguf(folder, tmp_path / "m.gguf")


def test_a_family_that_llama_cpp_computes_otherwise_is_not_tried(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gemma3"}))
    with pytest.raises(UsageError, match="'gemma3' is not supported") as caught:
        write_gguf(folder, tmp_path / "m.gguf")
    assert "llama, mistral, qwen2, qwen3" in str(caught.value.remedy)


def test_what_a_kill_left_goes_with_the_next(model: Path, tmp_path: Path) -> None:
    left = tmp_path / ".m.gguf.999999999.tmp"
    left.mkdir()
    (left / "m.gguf").write_bytes(bytes(100))
    write_gguf(model, tmp_path / "m.gguf")
    assert [found.name for found in tmp_path.iterdir()] == ["m.gguf"]


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys
from pathlib import Path
from luthier.export.gguf import write_gguf
def peak(who):
    return resource.getrusage(who).ru_maxrss // 1024
folder, path, small = map(Path, sys.argv[1:4])
write_gguf(small, path, sys.argv[4])  # every library is loaded, every pool filled
before, path = peak(resource.RUSAGE_SELF), path.with_name("large.gguf")
size = write_gguf(folder, path, sys.argv[4]).size
print(peak(resource.RUSAGE_SELF) - before, peak(resource.RUSAGE_CHILDREN), size // 2**20)
"""


@pytest.mark.parametrize("quantize", ["f16", "q8_0", "q4_0"])
def test_memory_is_bounded_by_rows_not_by_the_model(model: Path, tmp_path: Path, quantize: Quantize) -> None:
    """101 tensors of 250 MB together, one of them of 67 MB: in fp32 as a whole they would take 500 and 134."""
    folder = tmp_path / "large"
    shutil.copytree(model, folder)
    layers, hidden, inner, rows = 11, 768, 3072, 43_690
    config = json.loads((folder / "config.json").read_text())
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": rows}
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64, "attention_bias": False}
    config |= {**sizes, **heads, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, out, inp in (
            *(("self_attn.q_proj", 768, hidden), ("self_attn.k_proj", 256, hidden), ("self_attn.v_proj", 256, hidden)),
            *(("self_attn.o_proj", hidden, 768), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden)),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"{prefix}{name}.weight"] = (out, inp)
        shapes |= {f"{prefix}{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    weights = {name: torch.full(shape, 0.01, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    del weights
    command = [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "s.gguf"), str(model), quantize]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    more, _, size = map(int, done.stdout.split())
    assert size > 70
    # 32 MiB of rows in fp32, as they are stored, and what quantising makes of them: up to five times as much, in all.
    assert more < 190, f"{more} MiB more than for a small model"


def test_sprig_in_every_type(tmp_path: Path) -> None:
    """The smaller the type's bits, the smaller the file."""
    sizes = {name: write_gguf(locate_model("sprig"), tmp_path / f"{name}.gguf", name).size for name in DIRECT}
    assert sorted(sizes, key=lambda name: -sizes[name]) in (list(DIRECT), ["f32", "bf16", "f16", *DIRECT[3:]])
