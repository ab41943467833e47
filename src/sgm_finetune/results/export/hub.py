"""Uploading an export to a model hub, after it has been checked."""

from __future__ import annotations

from pathlib import Path

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line


def check_push(repository: str) -> None:
    """Raises UserError, before any work, for a name that cannot be one and where there is no token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository} is no repository (owner/name): {error}") from None
    if "/" not in repository:
        raise UserError(f"--push-to-hub {repository} names no owner; write owner/{repository}")
    if get_token() is None:
        raise UserError(
            "--push-to-hub needs a token of the hub; log in with `hf auth login`, or set HF_TOKEN, or leave it out"
        )


def push(folder: Path, repository: str) -> str:
    """Uploads the folder into the repository, which is made where it is missing, private; returns its address."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by sgm-finetune")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{folder} is complete, but could not be uploaded to {repository}: {first_line(error)}; upload it with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return str(address)
