"""How much one server takes on, and for how long: values only."""

from __future__ import annotations

from dataclasses import dataclass

from luthier.errors import UsageError

__all__ = ["Limits"]


@dataclass(frozen=True)
class Limits:
    """`slots` texts are written at once and `queue` more may wait, of all models together. Raises UsageError.

    `max_tokens`: the longest answer. `seconds`: from a request's arrival to its answer's end. `body` bytes of a request
    and `body_seconds` for it to come. `grace` seconds for what is under way when the server is to stop.
    """

    slots: int = 32
    queue: int = 256
    max_tokens: int = 4096
    seconds: float = 600.0
    body: int = 4 * 2**20
    body_seconds: float = 30.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--slots", self.slots, 1),
            ("--queue", self.queue, 0),
            ("--max-tokens", self.max_tokens, 1),
            ("--timeout", self.seconds, 0.001),
            ("--body-limit", self.body, 1),
            ("--grace", self.grace, 0),
        ):
            if not least <= value < 2**53:
                raise UsageError(f"{name} is {value}", f"give {least} or more")
