"""An adapter's two factors for every projection, checked against the base: what each adapter export starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from luthier.errors import ExportError, FileError
from luthier.guard.header import check_safetensors
from luthier.model.adapter import PREFIX, WEIGHTS, read_adapter_config
from luthier.model.config import ModelConfig, projection_shapes
from luthier.model.lora import LoRASpec

__all__ = ["Factors", "Pair", "place_of", "read_factors"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


class Pair(NamedTuple):
    """A (r, I) and B (O, r) of one projection, fp32; the update is s B A."""

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Factors:
    """`pairs` by the projection's name in the base, such as `model.layers.0.self_attn.q_proj`."""

    spec: LoRASpec
    pairs: Mapping[str, Pair]


def place_of(target: str) -> str:
    """Where a projection is in its layer: `self_attn.q_proj`."""
    return f"{'self_attn' if target in ATTENTION else 'mlp'}.{target}"


def read_factors(adapter: Path, config: ModelConfig) -> Factors:
    """The PEFT adapter in the folder `adapter`, for the base of that config.

    Raises ExportError where a file cannot be read, and with every tensor that is missing, unexpected or misshaped.
    """
    spec, _ = read_adapter_config(adapter)
    path = adapter / WEIGHTS
    if not path.is_file():
        raise ExportError(f"{adapter} has no {WEIGHTS}", "train again, or give the folder of a whole adapter")
    try:
        check_safetensors(path)
        stored = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(path).items()}
    except (SafetensorError, FileError, OSError) as error:
        raise ExportError(f"{path} cannot be read: {error}", "train again, or save the adapter again") from error
    shapes = projection_shapes(config)
    pairs: dict[str, Pair] = {}
    problems: list[str] = []
    for layer in range(config.layers):
        for target in spec.targets:
            stem, (out, inp) = f"model.layers.{layer}.{place_of(target)}", shapes[target]
            halves: list[Tensor] = []
            for half, wanted in (("A", (spec.rank, inp)), ("B", (out, spec.rank))):
                name = f"{stem}.lora_{half}.weight"
                found = stored.pop(name, None)
                if found is None:
                    problems.append(f"{name}: missing")
                elif found.shape != wanted:
                    problems.append(f"{name}: {tuple(found.shape)}, the base needs {wanted}")
                else:
                    halves.append(found.float())
            if len(halves) == 2:
                pairs[stem] = Pair(*halves)
    problems += [f"{name}: the base has no such place" for name in stored]
    if problems:
        raise ExportError(
            f"the adapter does not fit the base, {len(problems)} problem(s):\n"
            + "\n".join(f"  {problem}" for problem in problems),
            "give the base that the adapter was trained on (adapter_config.json names it)",
        )
    return Factors(spec, pairs)
