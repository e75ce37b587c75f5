"""Push files to a repository on the Hub, each file once, over a network that may fail at any request."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pipeline.hub.published_files import Files

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What the Hub's client raises if a request fails: a `RuntimeError` for an upload, a `ValueError` for a card.
PUSH_ERRORS = (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, RuntimeError, ValueError, OSError)
# Statuses after which another attempt may succeed. 409 and 412: there has been another commit meanwhile.
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
# Seconds between attempts, if the Hub does not name a time.
WAITS = (1.0, 2.0, 4.0, 8.0)
# Seconds to wait for a Hub that accepts a request but sends nothing, if its client sets no limit.
TIMEOUT = 60.0


def is_replaced(path: str) -> bool:
    """Return whether the push of a model replaces a path: anything but checkpoints and Git files."""
    return not path.startswith((".git", "last-checkpoint/", "checkpoint-"))


def push(
    api: HfApi,
    repo_id: str,
    files: Files,
    message: str,
    *,
    repo_type: str = "model",
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    replaces: Callable[[str], bool] = is_replaced,
) -> bool:
    """Make a branch of a repository hold `files`, in one commit. Both are created if they do not exist.

    Only differences are uploaded. Existing files that are not in `files` are deleted if the push `replaces` them. The
    branch `revision` is "main" by default; `create_pr` opens a pull request instead. Return whether anything has
    changed. If it still fails after some attempts, `PUSH_ERRORS` are raised.
    """
    where = {"repo_id": repo_id, "repo_type": repo_type}

    # Any request may fail, or seem to, because the response was lost. So an attempt does not rely on earlier ones: it
    # creates a missing branch, and the client compares each file with it, so that no commit is repeated.
    def attempt() -> bool:
        if revision is not None:
            api.create_branch(branch=revision, exist_ok=True, **where)
        info = api.repo_info(revision=revision, **where)
        if private and not info.private:
            api.update_repo_settings(private=True, **where)
        paths = [sibling.rfilename for sibling in info.siblings or ()]
        stale = [CommitOperationDelete(path) for path in paths if path not in files and replaces(path)]
        operations = [*(CommitOperationAdd(path, content) for path, content in files.items()), *stale]
        options = {"revision": revision, "create_pr": create_pr, **where}
        # `create_commit` alone would upload equal files several times.
        distinct = {one.upload_info.sha256: one for one in operations if isinstance(one, CommitOperationAdd)}
        api.preupload_lfs_files(additions=distinct.values(), free_memory=False, **options)
        return api.create_commit(operations=operations, commit_message=message, **options).oid != info.sha

    # The client fails with a KeyError if a conflict (409) does not name the repository.
    with contextlib.suppress(KeyError):
        sdk = "static" if repo_type == "space" else None
        retry(lambda: api.create_repo(private=private or None, exist_ok=True, space_sdk=sdk, **where))
    # For a moment, the Hub may not find a repository that it has just created.
    return retry(attempt, (*TRANSIENT, 404))


def retry(call: Callable[[], T], transient: Collection[int] = TRANSIENT) -> T:
    """Return what `call` returns, retrying up to `len(WAITS)` `transient` failures. Honour the Hub's `Retry-After`."""
    for wait in WAITS:
        # The client may have replaced the session after a failure.
        session = get_session()
        if _limit_waiting not in (hooks := session.event_hooks["request"]):
            session.event_hooks = {**session.event_hooks, "request": [*hooks, _limit_waiting]}
        try:
            return call()
        except PUSH_ERRORS as error:
            if not is_transient(error, transient):
                raise
            named = str(getattr(_response(error), "headers", {}).get("retry-after", ""))
            # Ten minutes at most, whatever the Hub asks for.
            seconds = min(float(named), 600.0) if named.isdigit() else wait
            logger.warning("A request failed (%s); the next attempt is in %g s.", explain(error, "the Hub"), seconds)
        time.sleep(seconds)
    return call()


def _limit_waiting(request: Any) -> None:
    """Add a time limit to a request of the Hub's client that has none: most would wait forever."""
    # The client sets no limit in the request itself, which would override a limit of the session.
    limits = request.extensions.get("timeout", {})
    missing = [name for name in ("connect", "read", "write") if not limits.get(name)]
    request.extensions["timeout"] = limits | dict.fromkeys(missing, TIMEOUT)


def is_transient(error: BaseException, transient: Collection[int] = TRANSIENT) -> bool:
    """Return whether the same request may succeed later: the network failed, or the Hub was busy."""
    if isinstance(error, LocalTokenNotFoundError | OfflineModeIsEnabled):
        return False
    if (response := _response(error)) is not None:
        return response.status_code in transient
    return any(isinstance(item, HTTPError | json.JSONDecodeError | ConnectionError) for item in _causes(error))


def explain(error: BaseException, repo_id: str) -> str:
    """Return in one line why a request about a repository failed."""
    if isinstance(error, LocalTokenNotFoundError):
        return "it needs a token; log in with `hf auth login`, or set HF_TOKEN"
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
    reasons = {
        401: "the token is invalid or has expired; make a new one, and log in with `hf auth login`",
        403: f"the token may not write to {repo_id} ({said}); use one that may",
        404: f"{repo_id} does not exist, or the token may not see it ({said})",
        429: "the Hub accepts no more requests for now; wait a while",
    }
    if (status := getattr(_response(error), "status_code", None)) is not None:
        return reasons.get(status, f"the Hub answered {status} ({said})")
    if is_transient(error) or isinstance(error, OfflineModeIsEnabled):
        return f"the Hub cannot be reached ({said or type(error).__name__}); check the network and HF_HUB_OFFLINE"
    return said or type(error).__name__


def _response(error: BaseException) -> Any:
    """Return the Hub's response that caused an error, if there was one."""
    responses = (getattr(item, "response", None) for item in _causes(error))
    return next((response for response in responses if response is not None), None)


def _causes(error: BaseException | None) -> list[BaseException]:
    # Ignore the context, which may be about an earlier request.
    return [] if error is None else [error, *_causes(error.__cause__)]
