"""The models that a server has, by the names that clients ask for."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.data.render import Template
from luthier.model.decoder import Decoder
from luthier.serve.refusals import Refusal

__all__ = ["Served", "find"]


@dataclass(frozen=True)
class Served:
    """A model as clients know it. `parent` names the base model where it is an adapter on one."""

    name: str
    decoder: Decoder
    template: Template
    parent: str | None = None


def find(models: Mapping[str, Served], name: str) -> Served:
    """The model that a client asks for. Raises Refusal (404), which lists those there are."""
    if name in models:
        return models[name]
    near = difflib.get_close_matches(name[:200], models, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise Refusal(
        404,
        f"The model {name[:200]!r} does not exist here.{hint} There are: {', '.join(models)}.",
        param="model",
        code="model_not_found",
    )
