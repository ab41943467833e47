"""Why a download from the model hub failed, and what to do, in our own words."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from sgm_finetune.base.text import one_line


def explain_hub_error(error: BaseException, kind: str, name: str) -> str:
    """The reason of a failed download of the repository `name` and the remedy, as `reason; remedy`.

    `kind` is "model" or "data set". The client, its downloader in Rust and `datasets` raise dozens of types. The one
    that says why is often a cause of the one that arrives; `datasets` drops some causes and keeps their words.
    """
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT, HF_HOME, HF_HUB_OFFLINE

    chain = list(_causes(error))
    status = next((code for one in chain if (code := _status(one)) is not None), None)
    page = f"{ENDPOINT}/{'datasets/' if kind == 'data set' else ''}{name}"

    def any_is(*types: type[BaseException]) -> bool:
        return any(isinstance(one, types) for one in chain)

    if any(_is_disk_full(one) for one in chain):
        return f"the disk of {HF_HOME} is full; make room, or set HF_HOME to a folder on another disk"
    if any_is(PermissionError):
        return f"{HF_HOME} cannot be written; set HF_HOME to a folder of yours"
    if any_is(errors.GatedRepoError) or "is a gated dataset" in str(error):
        return f"it is behind a licence; accept that on {page}, then run `hf auth login`"
    if any_is(errors.RevisionNotFoundError):
        return "it has no such revision; name a branch, tag or commit that it has"
    if any_is(errors.DisabledRepoError):
        return f"the hub has disabled it; take another {kind}"
    if any_is(errors.RepositoryNotFoundError) or "doesn't exist on the Hub" in str(error):
        return f"the hub has no such {kind}; check the name, or run `hf auth login` if it is private"
    if any_is(errors.HFValidationError, errors.HfUriError):
        return "that is no name on the hub; write owner/name"
    if status == 429:
        return "the hub asks to wait (429, too many requests); try again in a few minutes, or run `hf auth login`"
    if status is not None and status >= 500:
        return f"the hub has trouble of its own ({status}); try again later"
    if HF_HUB_OFFLINE or any_is(errors.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE=1 forbids downloads; unset HF_HUB_OFFLINE"
    transport = next((one for one in chain if _is_transport_error(one)), None)
    if transport is not None or any_is(ConnectionError, TimeoutError, errors.LocalEntryNotFoundError):
        cause = f" ({one_line(transport, 80)})" if transport is not None else ""
        return f"{ENDPOINT} does not answer{cause}; check the network, HTTPS_PROXY and HF_ENDPOINT"
    return f"{one_line(error)}; check the name and the network"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and the errors in whose handling it was raised."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_transport_error(error: BaseException) -> bool:
    """Whether the hub's HTTP client could not reach it. The client's library goes by httpx or httpx2, so the name
    decides."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def _is_disk_full(error: BaseException) -> bool:
    """Whether the disk is full; the downloader in Rust says so in words."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error)
