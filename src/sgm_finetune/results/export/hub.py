"""Uploads a checked export to the model hub."""

from __future__ import annotations

from pathlib import Path

from sgm_finetune.base.errors import UserError
from sgm_finetune.base.text import first_line


def check_push(repository: str) -> None:
    """Raises UserError, before any work, when `repository` is not a valid name or there is no hub token."""
    from huggingface_hub import get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository} is not a repository name (owner/name): {error}") from None
    if "/" not in repository:
        raise UserError(f"--push-to-hub {repository} lacks the owner; write owner/{repository}")
    if get_token() is None:
        raise UserError(
            "--push-to-hub needs a hub token; log in with `hf auth login`, set HF_TOKEN, or leave the option out"
        )


def push(folder: Path, repository: str) -> str:
    """Uploads the folder and returns the repository's address. Creates a missing repository as a private one."""
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
