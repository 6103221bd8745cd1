"""Tokens, passwords and control characters taken out of what is shown or written.

Nothing here reads a token on purpose; but an error of a library may quote the header or the address that it sent, a
data set's address may hold a password, and `--debug` shows the lines of a traceback as they are. `redact` takes out

    what the environment calls a token, a key, a password or a secret, by its value
    what looks like a token of Hugging Face, Weights & Biases, OpenAI, GitHub, AWS and the like
    the password in an address: https://user:password@host

and `visible` puts escape sequences, by which a file's name could rewrite the terminal, into a form that can be seen;
`printable` does both.
"""

from __future__ import annotations

import os
import re

__all__ = ["REDACTED", "holds_secret", "printable", "redact", "visible"]

REDACTED = "[redacted]"

_NAMES = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY", re.IGNORECASE)
_SHORTEST = 8
"""Characters: a shorter value would take ordinary words out of messages."""
_FEWEST_DIGITS = 12
"""So many may be a secret; fewer are a count, or a time to live."""

_LOOKS = re.compile(
    r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\bwandb_v1_[A-Za-z0-9_]{16,}|\blocal-[0-9a-f]{40}\b"
    r"|\bsk-(?:[a-z0-9]+-){0,2}(?:(?=\w*\d)(?=\w*[A-Z])[A-Za-z0-9_]{20,}|[0-9a-f]{32,}\b)"  # no file's name, mostly
    r"|\bgh[oprsu]_[A-Za-z0-9]{16,}|\bgithub_pat_[A-Za-z0-9_]{16,}"
    r"|\bAKIA[A-Z0-9]{12,}"
    r"|(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}"
    r"|(?<=[?&]token=)[^&\s'\"]+"
)
_ADDRESS = re.compile(r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Halves of surrogate pairs too, which Python has for a name that is not in UTF-8: no file or JSON takes them."""


def holds_secret(text: str) -> bool:
    """Whether something in it looks like a token or a password, whatever the environment holds."""
    return bool(_LOOKS.search(text) or _ADDRESS.search(text))


def redact(text: str) -> str:
    """`text` without secrets; the same text where it holds none."""
    for value in _of_the_environment():
        text = text.replace(value, REDACTED)
    return _LOOKS.sub(REDACTED, _ADDRESS.sub(REDACTED, text))


def _of_the_environment() -> list[str]:
    """The values of the environment that are secrets, the longest first: one may hold another."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _NAMES.search(name) and not _is_plain(value)
    }
    return sorted(found, key=len, reverse=True)


def _is_plain(value: str) -> bool:
    """Whether it is no secret under a name that sounds so: TOKENIZERS_PARALLELISM=false, the path of a file of tokens,
    which is there (what begins with / may be a key in base64)."""
    if value.lower() in ("true", "false") or (value.isdecimal() and len(value) < _FEWEST_DIGITS):
        return True
    return value.startswith("/") and os.path.exists(value)


def visible(text: str) -> str:
    """`text` with what is no character, and control characters but for line breaks and tabs, written out (`\\x1b`)."""
    return _CONTROLS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """`redact`, and `visible`."""
    return visible(redact(text))
