"""What is said to a client that cannot be served: OpenAI's error object, with the status that its clients know.

400 what is asked cannot be        401 no key, or a wrong one      403 a host that is not ours
404 no such model or path          408 the body did not come       413 the body is too long
429 the queue is full              500 a defect of ours            503 stopping       504 out of time
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import orjson
from starlette.responses import Response

from luthier.errors import LuthierError
from luthier.guard.secrets import visible

__all__ = ["Refusal", "json_response", "of_error", "of_validation", "stopping"]

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
_SHOWN = 1000
"""Characters of a message: it may quote what the client sent."""


class Refusal(Exception):  # noqa: N818  (most are no fault of the program)
    """Ends a request with `status`. `param` names the field that is wrong, `code` the reason for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, dict(headers or {})
        self.message = visible(message if len(message) <= _SHOWN else message[:_SHOWN] + "…")

    @property
    def document(self) -> dict[str, object]:
        """OpenAI's error object."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        param = None if self.param is None else visible(self.param)
        return {"error": {"message": self.message, "type": kind, "param": param, "code": self.code}}

    @property
    def response(self) -> Response:
        """The answer in its place."""
        return json_response(self.document, self.status, self.headers)


def stopping() -> Refusal:
    """For all that comes, or is under way, when the server may not go on."""
    return Refusal(503, "The server is stopping.", code="stopping", headers={"Connection": "close"})


def json_response(document: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`document` as JSON."""
    return Response(orjson.dumps(document), status, headers, media_type="application/json")


def of_error(error: LuthierError, param: str | None = None, code: str | None = None) -> Refusal:
    """400 with what the engine, the template or the tokenizer says of a request."""
    said = error.message if error.remedy is None else f"{error.message}. Try: {error.remedy}"
    return Refusal(400, said, param=param, code=code)


def of_validation(errors: Sequence[Mapping[str, object]], known: Sequence[str]) -> Refusal:
    """400 with the first thing that pydantic found wrong; `known` are the names of fields there are.

    What the client sent is not quoted, but for names of fields.
    """
    first = _telling(errors)
    place = first.get("loc")
    where = list(place) if isinstance(place, tuple) else []
    if where[:1] in (["body"], ["path"], ["query"]):
        del where[0]
    if first.get("type") == "json_invalid":
        return Refusal(400, "The body is not valid JSON.", code="invalid_json")
    param = ".".join(str(part) for part in where if _names(part)) or None
    if first.get("type") == "extra_forbidden" and where:
        near = difflib.get_close_matches(str(where[-1]), known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return Refusal(400, f"Unrecognized request argument supplied: {param}.{hint}", param=param, code="unknown")
    if param is None:
        return Refusal(400, "The body must be a JSON object, sent as Content-Type: application/json.")
    return Refusal(400, f"Invalid '{param}': {first.get('msg')}.", param=param, code=str(first.get("type")))


def _telling(errors: Sequence[Mapping[str, object]]) -> Mapping[str, object]:
    """Of the first field that is wrong, what says more than that it is of none of the types that it may have."""
    field = _field(errors[0])
    same = [error for error in errors if _field(error) == field]
    return next((error for error in same if not str(error.get("type")).endswith("_type")), errors[0])


def _field(error: Mapping[str, object]) -> object:
    place = error.get("loc")
    return place[:2] if isinstance(place, tuple) else None


def _names(part: object) -> bool:
    """Whether a part of pydantic's location is a place in the document, and no type out of a union."""
    if isinstance(part, int):
        return True
    return (
        isinstance(part, str) and part not in ("str", "constrained-str") and part.isidentifier() and part[0].islower()
    )
