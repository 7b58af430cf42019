"""What went wrong with the Hub, in a sentence that says what to do."""

from typing import Any

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..data.remote import http_status as status
from ..data.remote import is_transient
from ..files import is_disk_full
from .privacy import scrub

_TOKENS = "https://huggingface.co/settings/tokens"


class PublishError(OSError):
    """A push did not happen; the message says why and how to repeat it."""


def explain(error: BaseException, repo_id: str, again: str | None = None) -> PublishError:
    """``error`` of a push to ``repo_id`` as a PublishError; ``again``: the command that repeats the push."""
    if isinstance(error, PublishError):
        return error
    sentence = _cause(error, repo_id)
    repeat = "The repo shows its earlier state or the new one, whole; push again when that is mended"
    return PublishError(f"not published: {sentence} {repeat}{f': {again}' if again else ''}.")


def explain_reading(error: BaseException, repo_id: str) -> OSError:
    """``error`` of loading from ``repo_id`` as an OSError; what transformers wrapped around the cause is left out."""
    found: BaseException | None = error
    while found is not None and status(found) is None:
        found = found.__cause__ or found.__context__
    if found is None:
        return error if isinstance(error, OSError) else OSError(str(error))
    if isinstance(found, GatedRepoError):
        return OSError(f"{repo_id} is gated: ask for access on its page, then `hf auth login` ({status(found)}).")
    if isinstance(found, RepositoryNotFoundError):
        return OSError(
            f"{repo_id} is no folder here, and no repo that this token may see ({status(found)}): check the name, and "
            "for a private repo `hf auth login`."
        )
    return OSError(f"{repo_id} cannot be read: {_cause(found, repo_id)}")


def _cause(error: BaseException, repo_id: str) -> str:
    code = status(error)
    if isinstance(error, LocalTokenNotFoundError) or (code == 401 and not _has_token(error)):
        return f"there is no token to write to {repo_id} with: `hf auth login`, or set HF_TOKEN ({_TOKENS})."
    if code == 401:
        return f"the Hub does not know the token (401): make one that may write at {_TOKENS}, then `hf auth login`."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated and this token has no access (403): ask for it on the repo's page."
    if code == 403:
        return (
            f"this token may not write to {repo_id} (403): it can only read, or the namespace is another's; {_TOKENS}."
        )
    if isinstance(error, RepositoryNotFoundError) or code == 404:
        return f"{repo_id} is not there, or this token may not see it (404): check the name and the token."
    if code in (409, 412):
        return f"{repo_id} is being changed by somebody else ({code})."
    if code == 413:
        return f"the Hub finds a file or the commit too large (413) for {repo_id}."
    if code is not None and code >= 500:
        return f"the Hub has a problem of its own ({code})."
    if code is not None:
        return f"the Hub refuses the push to {repo_id} ({code}): {_said(error)}"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked."
    if isinstance(error, HFValidationError):
        return f"{repo_id!r} is no repo id: give user/name."
    if is_disk_full(error):
        return "the disk is full: free some space."
    if is_transient(error):
        return f"the connection to the Hub broke ({type(error).__name__})."
    return f"{type(error).__name__}: {_said(error)}"


def _has_token(error: Any) -> bool:
    request = getattr(getattr(error, "response", None), "request", None)
    return bool(request is not None and request.headers.get("authorization"))


def _said(error: BaseException) -> str:
    text = " ".join(str(scrub(str(error))).split())[:300]
    return text if text.endswith(".") else f"{text}."
