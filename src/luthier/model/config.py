"""What a model folder says about its model, as one checked value. No torch here: the planner reads it too.

`config.json` comes in two layouts: transformers 4 wrote `rope_theta` and `rope_scaling` beside each other, transformers
5 writes one `rope_parameters`. Both give the same ModelConfig. What this project's decoder does not compute is refused
here, with the name of the key, rather than computed wrongly later.

Source of the meaning of each key and of its default: the configuration classes of transformers for the four families.
`attention_dropout` is not read: it changes no output of a model in use, and fine-tuning here has LoRA's own dropout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luthier.errors import FileError, ModelError
from luthier.guard.documents import read_object
from luthier.guard.keys import LARGEST_SIZE, Keys

__all__ = [
    "FAMILIES",
    "PROJECTIONS",
    "TARGETS",
    "Family",
    "ModelConfig",
    "RopeScaling",
    "expand_targets",
    "parameters",
    "projection_shapes",
    "read_config",
]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linear projections of a decoder layer, in the order of computation."""

TARGETS: Mapping[str, tuple[str, ...]] = {"all-linear": PROJECTIONS, "attention": PROJECTIONS[:4]}
"""Names for groups of projections, as a recipe's `adapter.targets` may say them."""

_REQUIRED = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

MOST_LAYERS = 4096
"""Each costs time and memory before any weight is read; the deepest models have a few hundred."""

MOST_PARAMETERS = 2**44
"""Ten times the largest models that there are. Each size of a config may be right and their product absurd."""

RopeKind = Literal["default", "llama3", "linear", "yarn"]


@dataclass(frozen=True)
class Family:
    """What tells one Llama-shaped family from another; the rest is in its `config.json`."""

    name: str
    bias: Literal["never", "qkv", "configured"]  # "configured": the key `attention_bias`, on all four projections
    qk_norm: bool
    window: Literal["never", "all layers", "upper layers"]
    kv_heads: int | None  # where `num_key_value_heads` is absent; None: as many as query heads
    max_positions: int
    head_dim: int | None = None  # where `head_dim` is absent; None: hidden_size / heads
    bos_id: int | None = None
    eos_id: int | None = None


FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "configured", False, "never", None, 2048, bos_id=1, eos_id=2),
        Family("mistral", "never", False, "all layers", 8, 131072, bos_id=1, eos_id=2),
        Family("qwen2", "qkv", False, "upper layers", 32, 32768),
        Family("qwen3", "configured", True, "upper layers", 32, 32768, head_dim=128),
    )
}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are stretched for contexts longer than those of pre-training.

    kind "default": not at all. "linear": all frequencies / factor (Chen et al. 2023, position interpolation).
    "llama3": only the long wavelengths (Llama 3.1 model card). "yarn": by wavelength, and cos and sin times
    `attention_factor` (Peng et al. 2023, equations 17-22).
    """

    kind: RopeKind = "default"
    factor: float = 1.0
    original_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one model. Sizes are in elements, `dtype` is the checkpoint's: float32, float16 or bfloat16.

    `attention_bias` adds a bias to q, k and v; `output_bias` one to o; `mlp_bias` one to gate, up and down.
    `window` is the reach of sliding attention in tokens, the token itself counted;
    `windowed` says which layers have it (empty: all).
    `eos_ids` are all tokens that end a text: those of `config.json`, then those `generation_config.json` adds.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope: RopeScaling = RopeScaling()
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    max_positions: int = 2048
    dtype: str = "float32"
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of one layer, None where it attends to everything before it."""
        if self.window is None or (self.windowed and not self.windowed[layer]):
            return None
        return self.window


def projection_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven projections of one layer; every layer has the same."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    return {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def parameters(config: ModelConfig) -> int:
    """The number of weights of the model; a tied head is counted once."""
    shapes = projection_shapes(config)
    layer = sum(out * inp for out, inp in shapes.values()) + 2 * config.hidden_size
    if config.attention_bias:
        layer += sum(shapes[name][0] for name in ("q_proj", "k_proj", "v_proj"))
    if config.output_bias:
        layer += shapes["o_proj"][0]
    if config.mlp_bias:
        layer += sum(shapes[name][0] for name in ("gate_proj", "up_proj", "down_proj"))
    if config.qk_norm:
        layer += 2 * config.head_dim
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tied else 2)
    return embeddings + config.layers * layer + config.hidden_size


def expand_targets(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Projection names, in the order of PROJECTIONS, from `all-linear`, `attention` or a list of names.

    Raises ModelError for a name that is not a projection, and for an empty list.
    """
    said = (targets,) if isinstance(targets, str) else tuple(targets)
    named = {name for one in said for name in TARGETS.get(one, (one,))}
    unknown = sorted(named - set(PROJECTIONS))
    if unknown or not named:
        what = f"{', '.join(unknown)}: no such projection" if unknown else "an adapter needs at least one target"
        raise ModelError(what, f"Choose all-linear, attention, or some of {', '.join(PROJECTIONS)}.")
    return tuple(name for name in PROJECTIONS if name in named)


def _read_object(path: Path) -> Keys:
    try:
        return Keys(read_object(path), str(path))
    except FileError as error:
        raise ModelError(error.message, "Fetch the model again.") from error


def read_config(folder: Path) -> ModelConfig:
    """The model in `folder`, from `config.json` (and the stop tokens of `generation_config.json`).

    Raises ModelError where the file is missing or broken, and for families, RoPE kinds, activations and quantised
    checkpoints that this project does not compute.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json, so it is not a model in Hugging Face's layout",
                         "Give the folder that holds config.json and the .safetensors files.")  # fmt: skip
    keys = _read_object(path)
    family = _family(keys)
    hidden, heads = keys.whole("hidden_size"), keys.whole("num_attention_heads")
    layers = keys.whole("num_hidden_layers", most=MOST_LAYERS)
    max_positions = keys.whole("max_position_embeddings", family.max_positions)
    theta, rope = _rope(keys, max_positions)
    window, windowed = _window(keys, family, layers)
    configured_bias = keys.flag("attention_bias", False) if family.bias == "configured" else False
    kv_heads = keys.whole("num_key_value_heads", family.kv_heads or heads)
    head_dim = keys.whole("head_dim", family.head_dim or hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise ModelError(
            f"{path}: {heads} query heads over {kv_heads} key heads of size {head_dim} is not possible: "
            "query heads must be a multiple of key heads, and the head size even",
            "Fetch the model again.",
        )
    config = ModelConfig(
        family=family.name,
        vocab_size=keys.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=keys.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope=rope,
        tied=keys.flag("tie_word_embeddings", False),
        attention_bias=configured_bias or family.bias == "qkv",
        output_bias=configured_bias,
        mlp_bias=keys.flag("mlp_bias", False) if family.name == "llama" else False,
        qk_norm=family.qk_norm,
        window=window,
        windowed=windowed,
        max_positions=max_positions,
        dtype=keys.text("dtype", keys.text("torch_dtype", "float32")).removeprefix("torch."),
        bos_id=next(iter(keys.ids("bos_token_id", family.bos_id)), None),
        eos_ids=_eos_ids(keys, family, folder),
    )
    _check_product(config, path)
    return config


def _check_product(config: ModelConfig, path: Path) -> None:
    count, width = parameters(config), config.heads * config.head_dim
    if count > MOST_PARAMETERS or width > LARGEST_SIZE:
        what = f"{count:,} parameters" if count > MOST_PARAMETERS else f"query heads of {width:,} elements together"
        raise ModelError(f"{path}: its sizes make a model of {what}, which no machine holds", "Fetch the model again.")


def _family(keys: Keys) -> Family:
    name = keys.text("model_type", "")
    if name not in FAMILIES and keys.values.get("model_type") is not None:
        raise ModelError(
            f"{keys.where}: the model family {name!r} is not supported",
            f"Supported families: {', '.join(FAMILIES)} (all their sizes). Choose a model of one of them.",
        )
    if missing := [f"`{key}`" for key in _REQUIRED if keys.values.get(key) is None]:
        are = "is missing" if len(missing) == 1 else "are missing"
        raise ModelError(f"{keys.where}: {', '.join(missing)} {are}", "Fetch the model again.")
    activation = keys.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(f"{keys.where}: `hidden_act` is {activation!r}; only silu is implemented",
                         "Choose a model with the SiLU activation, as the official ones have.")  # fmt: skip
    if keys.values.get("quantization_config") is not None:
        raise ModelError(
            f"{keys.where}: this checkpoint is already quantised (`quantization_config`)",
            "Name the model it was made from: with `quantize: nf4` it is quantised while it is loaded, and the merged "
            "model is then made from the full-precision weights.",
        )
    return FAMILIES[name]


def _eos_ids(keys: Keys, family: Family, folder: Path) -> tuple[int, ...]:
    ids = keys.ids("eos_token_id", family.eos_id)
    generation = folder / "generation_config.json"
    if generation.is_file():
        ids += _read_object(generation).ids("eos_token_id")
    return tuple(dict.fromkeys(ids))


def _window(keys: Keys, family: Family, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """(window, which layers have it); transformers' rule for each family."""
    if family.window == "never":
        return None, ()
    if family.window == "all layers":
        absent = "sliding_window" not in keys.values
        return (keys.whole("sliding_window", 4096) if absent or keys.values["sliding_window"] is not None else None), ()
    types = keys.values.get("layer_types")
    on = keys.flag("use_sliding_window", False) and keys.values.get("sliding_window", 4096) is not None
    window = keys.whole("sliding_window", 4096) if on else None
    if types is None:
        first = keys.values.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int):
            raise ModelError(f"{keys.where}: `max_window_layers` must be a whole number", "Fetch the model again.")
        windowed = tuple(layer >= first for layer in range(layers))
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(one not in known for one in types):
            raise ModelError(f"{keys.where}: `layer_types` must be {' or '.join(known)} for each of {layers} layers",
                             "Other kinds of attention are not implemented: choose another model.")  # fmt: skip
        windowed = tuple(one == "sliding_attention" for one in types)
        if window is None and any(windowed):
            raise ModelError(f"{keys.where}: `layer_types` has sliding attention, but there is no `sliding_window`",
                             "Fetch the model again.")  # fmt: skip
    if window is None or not any(windowed):
        return None, ()
    return window, windowed


def _rope(keys: Keys, max_positions: int) -> tuple[float, RopeScaling]:
    """(theta, scaling) from `rope_scaling` beside `rope_theta` (the old layout) or `rope_parameters` (the new one)."""
    base = keys.number("rope_theta", 10000.0)
    rope = keys.inside("rope_scaling") or keys.inside("rope_parameters") or Keys({}, keys.where)
    theta = rope.number("rope_theta", base)
    kind = rope.text("rope_type", rope.text("type", "default"))
    for place in (keys, rope):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise ModelError(f"{place.where}: `partial_rotary_factor` is not implemented", "Choose another model.")
    if kind == "default":
        return theta, RopeScaling()
    if kind == "linear":
        return theta, RopeScaling("linear", factor=rope.number("factor"))
    trained = "original_max_position_embeddings"  # beside the scaling in some configs, inside it in most
    original = keys.whole(trained, rope.whole(trained, max_positions))
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        return theta, RopeScaling("llama3", rope.number("factor"), original, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return theta, _yarn(rope, original, max_positions)
    raise ModelError(
        f"{rope.where}: RoPE scaling of the kind {kind!r} is not implemented",
        "Implemented: default, linear, llama3, yarn. Choose a model that uses one of these.",
    )


def _yarn(rope: Keys, original: int, max_positions: int) -> RopeScaling:
    """YaRN's settings with the attention factor resolved: 0.1 ln(factor) + 1 unless given (equation 22)."""
    factor = rope.number("factor", max_positions / original)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    numerator, denominator = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    inferred = magnitude(numerator) / magnitude(denominator) if numerator and denominator else magnitude(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.number("beta_fast", 0.0) or 32.0,
        beta_slow=rope.number("beta_slow", 0.0) or 1.0,
        truncate=rope.flag("truncate", True),
        attention_factor=rope.number("attention_factor", inferred),
    )
