"""The audit of data: what is wrong with the rows, what is odd about them, and what they are like. `luthier data check`.

findings.py    what is said: findings, and the places they are about
texts.py       checks of one row's text (a table): mojibake, control characters, template tokens, secrets, …
checks.py      checks of the data as a whole (a table): leaks, duplicates, rows too long, …
survey.py      the pass over the rows
repeats.py     who says the same as whom
answers.py     how answers begin, which repeat, who speaks
lengths.py     lengths in tokens, and what a max_length would cut
languages.py   a guess at the languages
auditing.py    all of it together
document.py    the audit as a JSON document
"""

from __future__ import annotations

from luthier.data.audit.auditing import Audit, Told, audit
from luthier.data.audit.document import as_document
from luthier.data.audit.findings import Finding, Sighting

__all__ = ["Audit", "Finding", "Sighting", "Told", "as_document", "audit"]
