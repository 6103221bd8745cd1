"""Reading config.json: the defaults of each family, and the refusal of what the decoder does not compute."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from luthier.errors import ModelError
from luthier.model.config import (
    FAMILIES,
    PROJECTIONS,
    ModelConfig,
    RopeScaling,
    expand_targets,
    parameters,
    projection_shapes,
    read_config,
)

LLAMA = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}


def write(folder: Path, **changes: object) -> Path:
    kept = {key: value for key, value in {**LLAMA, **changes}.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_the_file_leaves_out_is_what_transformers_takes(tmp_path: Path, family: str) -> None:
    heads = 32 if FAMILIES[family].kv_heads == 32 else 8
    config = read_config(write(tmp_path, model_type=family, num_attention_heads=heads, hidden_size=256))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert config.kv_heads == theirs.num_key_value_heads
    assert config.head_dim == getattr(theirs, "head_dim", 256 // heads)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.max_positions == theirs.max_position_embeddings
    assert config.window == getattr(theirs, "sliding_window", None)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tied == theirs.tie_word_embeddings
    assert config.bos_id == theirs.bos_token_id
    assert config.eos_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def test_stop_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    """Llama 3 Instruct names its end of turn in generation_config.json only."""
    write(tmp_path, bos_token_id=7, eos_token_id=[9, 3])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 11]}))
    config = read_config(tmp_path)
    assert (config.bos_id, config.eos_ids) == (7, (9, 3, 11))


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
def test_the_dtype_by_either_name(tmp_path: Path, key: str, value: str) -> None:
    assert read_config(write(tmp_path, **{key: value})).dtype == "bfloat16"


def test_yarns_attention_factor_is_its_formula(tmp_path: Path) -> None:
    """0.1 ln(8) + 1 = 1.20794; with mscale a over b: (0.1 a ln 8 + 1) / (0.1 b ln 8 + 1)."""
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
    assert read_config(write(tmp_path, rope_parameters=rope)).rope.attention_factor == pytest.approx(
        1.2079442, abs=1e-7
    )
    both = {**rope, "mscale": 2.0, "mscale_all_dim": 1.0}
    assert read_config(write(tmp_path, rope_parameters=both)).rope.attention_factor == pytest.approx(
        1.1721472, abs=1e-7
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": "absent"}, "`model_type` is missing"),
        ({"model_type": ""}, "'' is not supported"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not implemented"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "'longrope' is not implemented"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "`low_freq_factor` is missing"),
        ({"partial_rotary_factor": 0.5}, "`partial_rotary_factor` is not implemented"),
        ({"hidden_size": "absent"}, "`hidden_size` is missing"),
        ({"hidden_size": "48"}, "`hidden_size` is '48', it must be a positive whole number"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers` is 0"),
        ({"num_hidden_layers": True}, "`num_hidden_layers` is True"),
        ({"rms_norm_eps": "small"}, "`rms_norm_eps` is 'small'"),
        ({"tie_word_embeddings": 1}, "`tie_word_embeddings` is 1"),
        ({"eos_token_id": "</s>"}, "`eos_token_id` is '</s>'"),
        ({"num_key_value_heads": 4}, "6 query heads over 4 key heads"),
        ({"model_type": "qwen2", "num_key_value_heads": 2, "layer_types": ["full_attention"]}, "`layer_types` must be"),
        (
            {"model_type": "qwen3", "num_key_value_heads": 2, "layer_types": ["sliding_attention"] * 3},
            "there is no `sliding_window`",
        ),
        ({"vocab_size": 2**31 - 1, "hidden_size": 2**20}, "make a model of 4,5"),
        ({"num_hidden_layers": 4096, "hidden_size": 2**20, "intermediate_size": 2**20}, "which no machine holds"),
        ({"num_attention_heads": 2**17, "head_dim": 2**14}, "query heads of 2,147,483,648 elements together"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(write(tmp_path, **changes))
    assert said in caught.value.message
    assert str(tmp_path / "config.json") in caught.value.message
    assert caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("key", list(LLAMA))
def test_each_field_that_is_needed_is_missed_by_name(tmp_path: Path, key: str, value: str | None) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(write(tmp_path, **{key: value}))
    assert caught.value.message == f"{tmp_path / 'config.json'}: `{key}` is missing"


def test_all_missing_fields_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="`vocab_size`, `num_hidden_layers` are missing"):
        read_config(write(tmp_path, vocab_size="absent", num_hidden_layers="absent"))


def test_an_unsupported_family_lists_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_config(write(tmp_path, model_type="mamba"))
    assert caught.value.remedy is not None
    assert all(family in caught.value.remedy for family in ("llama", "mistral", "qwen2", "qwen3"))


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not valid JSON"), ("[1]", "does not hold a JSON object"), (None, "has no config.json")]
)
def test_a_broken_file(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=said):
        read_config(tmp_path)


def test_llama_3_1_8b_by_its_published_numbers() -> None:
    """8 030 261 248 weights, as its model card counts them."""
    config = ModelConfig("llama", 128256, 4096, 14336, layers=32, heads=32, kv_heads=8, head_dim=128)
    assert parameters(config) == 8_030_261_248
    assert projection_shapes(config)["k_proj"] == (1024, 4096)
    assert tuple(projection_shapes(config)) == PROJECTIONS


def test_qwen2_5_0_5b_by_its_published_numbers() -> None:
    """494 032 768 weights: tied, with biases on q, k and v."""
    config = ModelConfig("qwen2", 151936, 896, 4864, 24, 14, 2, 64, tied=True, attention_bias=True)
    assert parameters(config) == 494_032_768


def test_the_largest_models_pass(tmp_path: Path) -> None:
    """Two trillion parameters, more than any that is published."""
    sizes = {"hidden_size": 2**15, "intermediate_size": 2**17, "num_hidden_layers": 128, "vocab_size": 2**18}
    assert parameters(read_config(write(tmp_path, **sizes, num_attention_heads=256))) > 2e12


def test_windows_by_layer() -> None:
    config = ModelConfig("qwen3", 9, 8, 8, 3, 2, 1, 4, window=5, windowed=(False, True, True))
    assert [config.layer_window(layer) for layer in range(3)] == [None, 5, 5]
    everywhere = ModelConfig("mistral", 9, 8, 8, 3, 2, 1, 4, window=5)
    assert [everywhere.layer_window(layer) for layer in range(3)] == [5, 5, 5]
    assert RopeScaling().kind == "default"


def test_targets() -> None:
    assert expand_targets("all-linear") == PROJECTIONS
    assert expand_targets("attention") == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert expand_targets(["v_proj", "q_proj", "v_proj"]) == ("q_proj", "v_proj")
    with pytest.raises(ModelError, match="qkv_proj: no such projection"):
        expand_targets(["q_proj", "qkv_proj"])
    with pytest.raises(ModelError, match="at least one target"):
        expand_targets([])


def test_reading_a_config_does_not_import_torch() -> None:
    heavy = "('torch', 'transformers', 'huggingface_hub')"
    code = f"import sys, luthier.model.config, luthier.model.locate; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
