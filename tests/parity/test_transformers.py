"""Logits against transformers, for each family, each RoPE scaling, tied and untied, windowed and packed.

The reference model is made and saved by transformers, and its own from_pretrained reads the same files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from luthier.model.config import FAMILIES, read_config
from luthier.model.load import load_decoder
from tests import tiny

TOLERANCE = 1e-4
"""Asked for, relative to the norm of the logits. fp32 through 3 layers loses about 2^-23 x 30 = 4e-6."""

LENGTH = 201
"""Beyond the 64 positions of the `original` context below, so that scaling is at work on every wavelength."""

ROPES: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500.0,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    "yarn with everything set": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 700.0,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "mscale": 1.3,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn with its factor given": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
        "attention_factor": 0.77,
    },
}


def ids(count: int = LENGTH) -> Tensor:
    return torch.randint(0, 400, (count,), generator=torch.Generator().manual_seed(8))


@torch.no_grad()
def reference(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    logits: Tensor = model(tokens[None]).logits[0]
    return logits


@torch.no_grad()
def ours(folder: Path, tokens: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return load_decoder(folder, dtype=dtype)(tokens)


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", list(ROPES))
@pytest.mark.parametrize("family", list(FAMILIES))
def test_logits(tmp_path: Path, family: str, rope: str, tied: bool) -> None:
    folder = tiny.make_model(tmp_path, family, tie_word_embeddings=tied, rope_parameters=dict(ROPES[rope]))
    wanted = reference(folder, ids())
    assert distance(ours(folder, ids()), wanted) < TOLERANCE


@pytest.mark.parametrize("rope", [name for name in ROPES if name != "default"])
def test_the_scaling_matters_at_this_length(tmp_path: Path, rope: str) -> None:
    """Without this the test above could pass with a scaling that is ignored."""
    scaled = tiny.make_model(tmp_path / "a", "llama", rope_parameters=dict(ROPES[rope]))
    plain = tiny.make_model(
        tmp_path / "b", "llama", rope_parameters={"rope_type": "default", "rope_theta": ROPES[rope]["rope_theta"]}
    )
    assert distance(ours(scaled, ids()), ours(plain, ids())) > 100 * TOLERANCE


@pytest.mark.parametrize("rope", list(ROPES))
def test_the_old_config_layout_is_the_same_model(tmp_path: Path, rope: str) -> None:
    """transformers 4 wrote `rope_theta` and `rope_scaling` (with `type` in the oldest) and `torch_dtype`."""
    folder = tiny.make_model(tmp_path, "llama", rope_parameters=dict(ROPES[rope]))
    new, wanted = read_config(folder), reference(folder, ids())
    config = json.loads((folder / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config["rope_theta"] = scaling.pop("rope_theta")
    config["torch_dtype"] = config.pop("dtype")
    scaling["type"] = scaling.pop("rope_type")
    config["rope_scaling"] = scaling if scaling["type"] != "default" else None
    (folder / "config.json").write_text(json.dumps(config))
    assert read_config(folder) == new
    assert distance(reference(folder, ids()), wanted) == 0.0
    assert distance(ours(folder, ids()), wanted) < TOLERANCE


WINDOWS: dict[str, tuple[str, dict[str, object]]] = {
    "mistral": ("mistral", {"sliding_window": 17}),
    "qwen2 upper layers": ("qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3 upper layers": ("qwen3", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2}),
    "qwen3 named layers": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 17,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("case", list(WINDOWS))
def test_sliding_windows(tmp_path: Path, case: str) -> None:
    family, overrides = WINDOWS[case]
    folder = tiny.make_model(tmp_path / "windowed", family, **overrides)
    tokens = ids(61)
    wanted = reference(folder, tokens)
    assert distance(ours(folder, tokens), wanted) < TOLERANCE
    wide = tiny.make_model(tmp_path / "wide", family, sliding_window=None)  # the window must be seen to be at work
    assert distance(ours(wide, tokens), wanted) > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_is_not_switched_on_is_none(tmp_path: Path, family: str) -> None:
    """Official Qwen configs carry a `sliding_window` beside `use_sliding_window: false`."""
    folder = tiny.make_model(tmp_path, family, use_sliding_window=False, sliding_window=5, max_window_layers=0)
    config = json.loads((folder / "config.json").read_text())
    config["sliding_window"] = 5  # transformers drops it when saving
    (folder / "config.json").write_text(json.dumps(config))
    assert distance(ours(folder, ids(61)), reference(folder, ids(61))) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_biases(tmp_path: Path, family: str) -> None:
    extra: dict[str, object] = {"mlp_bias": True} if family == "llama" else {}
    folder = tiny.make_model(tmp_path, family, attention_bias=True, **extra)
    assert distance(ours(folder, ids()), reference(folder, ids())) < TOLERANCE


@pytest.mark.parametrize("family", list(FAMILIES))
def test_packed_documents_are_transformers_separate_runs(tmp_path: Path, family: str) -> None:
    folder = tiny.make_model(tmp_path, family, rope_parameters=dict(ROPES["llama3"]))
    lengths = (83, 5, 1, 112)
    tokens = ids(sum(lengths))
    with torch.no_grad():
        packed = load_decoder(folder, dtype=torch.float32)(tokens, lengths)
    wanted = torch.cat([reference(folder, document) for document in tokens.split(lengths)])
    assert distance(packed, wanted) < TOLERANCE


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_half_precision_rounds_where_transformers_rounds(
    tmp_path: Path, family: str, dtype: torch.dtype, bits: int
) -> None:
    """Same casts in the same places: closer to transformers' half-precision run than that is to its fp32 run."""
    folder = tiny.make_model(tmp_path, family)
    wanted, exact = reference(folder, ids(), dtype), reference(folder, ids())
    gap = distance(ours(folder, ids(), dtype), wanted)
    assert gap < 0.5 * distance(wanted, exact)
    assert gap < 4 * 2.0**-bits


def test_a_saved_copy_of_a_tied_head_is_ignored(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.make_model(tmp_path, "llama", tie_word_embeddings=True)
    wanted = reference(folder, ids(31))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as Llama 1 checkpoints have it
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert distance(ours(folder, ids(31)), wanted) < TOLERANCE
