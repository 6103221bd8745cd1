"""The merged folder to the Hugging Face hub, where it is asked for: private, until its owner says otherwise."""

from __future__ import annotations

import re
from pathlib import Path

from luthier.errors import ExportError, UsageError

__all__ = ["check_name", "push"]

LEFT_HERE = ["unmerge/*", "verify.json", "luthier.json"]
"""What says something of the run, not of the model."""
_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", re.ASCII)


def check_name(name: str) -> None:
    """Raise UsageError where `name` is no `owner/name` of the hub."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is not a name on the hub", "--push owner/name")


def push(folder: Path, name: str) -> str:
    """Upload `folder` as the model `name`, which is made (private) where it is not there; the address of the commit.

    The one boundary to the hub's errors of uploading. Raises UsageError without a login, ExportError where it fails.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub import errors as hub

    if get_token() is None:
        raise UsageError(
            "pushing to the hub needs a login, and this machine has none", "hf auth login; or set HF_TOKEN"
        )
    try:
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        made = api.upload_folder(
            repo_id=name, folder_path=folder, ignore_patterns=LEFT_HERE, commit_message="Made with Luthier"
        )
    except (hub.HTTPError, hub.HFValidationError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's own
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(
            f"pushing to {name} failed: {first}", f"the model is whole in {folder}; run this again to push it"
        ) from error
    return str(made.commit_url)
