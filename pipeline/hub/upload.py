"""Push files to a repository on the Hub, each file once, over a network that may fail at any request."""

import contextlib
import json
import logging
import time
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from pipeline.errors import causes
from pipeline.hub.published_files import Files

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What the Hub's client raises if a request fails. It wraps a failed upload in a `RuntimeError`, and a card that the Hub
# rejects in a `ValueError`.
PUSH_ERRORS = (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, RuntimeError, ValueError, OSError)
# Statuses after which another attempt may succeed. 409 and 412: there has been another commit meanwhile.
TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
# Seconds between attempts, if the Hub does not name a time.
WAITS = (1.0, 2.0, 4.0, 8.0)
# Longest time in seconds to wait before an attempt, whatever the Hub asks for.
LONGEST_WAIT = 600.0
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

    Only differences are uploaded. An interrupted push is resumed by pushing again. tests/hub/test_upload.py lets each
    request fail in turn.

    Args:
        api: The client.
        repo_id: The repository, `NAME/repo`.
        files: Its files after the push.
        message: Message of the commit, and title of the pull request.
        repo_type: "model", "dataset" or "space"; a Space is created as a static one.
        private: Whether to make the repository private. False leaves an existing one as it is.
        revision: The branch. None is "main".
        create_pr: Whether to open a pull request instead of writing to the branch.
        replaces: Whether to delete a file of the branch, by its path, if it is not in `files`.

    Returns:
        Whether the push changed anything.

    Raises:
        PUSH_ERRORS: If it still fails after some attempts. `explain` gives the reason.
    """
    repository = {"repo_id": repo_id, "repo_type": repo_type}

    # Any request may fail, or seem to, because the response was lost. So an attempt does not rely on earlier ones: it
    # creates a missing branch, and the client compares each file with it, so that no commit is repeated.
    def attempt() -> bool:
        if revision is not None:
            api.create_branch(branch=revision, exist_ok=True, **repository)
        info = api.repo_info(revision=revision, **repository)
        if private and not info.private:
            api.update_repo_settings(private=True, **repository)
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        remote_paths = [sibling.rfilename for sibling in info.siblings or ()]
        deletions = [CommitOperationDelete(path) for path in remote_paths if path not in files and replaces(path)]
        options = {"revision": revision, "create_pr": create_pr, **repository}
        # `create_commit` alone would upload files of equal content several times.
        distinct = {addition.upload_info.sha256: addition for addition in additions}
        api.preupload_lfs_files(additions=distinct.values(), free_memory=False, **options)
        commit = api.create_commit(operations=[*additions, *deletions], commit_message=message, **options)
        return commit.oid != info.sha

    options: dict[str, Any] = {"exist_ok": True, **repository}
    if private:
        options["private"] = True
    if repo_type == "space":
        options["space_sdk"] = "static"
    # The client fails with a KeyError if a conflict (409) does not name the repository.
    with contextlib.suppress(KeyError):
        retry(lambda: api.create_repo(**options))
    # For a moment, the Hub may not find a repository that it has just created.
    return retry(attempt, (*TRANSIENT, 404))


def retry(call: Callable[[], T], transient: Collection[int] = TRANSIENT) -> T:
    """Return what `call` returns, after up to `len(WAITS)` further attempts if a request fails.

    Args:
        call: Makes requests to the Hub.
        transient: Statuses after which it is called again.

    Raises:
        PUSH_ERRORS: If the last attempt fails, or if another attempt would not help.
    """
    for wait in WAITS:
        _limit_requests()
        try:
            return call()
        except PUSH_ERRORS as error:
            if not is_transient(error, transient):
                raise
            seconds = _seconds_to_wait(error, wait)
            logger.warning("A request failed (%s); the next attempt is in %g s.", explain(error, "the Hub"), seconds)
        time.sleep(seconds)
    return call()


def _seconds_to_wait(error: BaseException, default: float) -> float:
    """Return the seconds that the Hub asks to wait (`Retry-After`), at most `LONGEST_WAIT`; otherwise the default."""
    headers = getattr(_response(error), "headers", {})
    requested = str(headers.get("retry-after", ""))
    if requested.isdigit():
        return min(float(requested), LONGEST_WAIT)
    return default


def _limit_requests() -> None:
    """Let the Hub's client call `_limit_waiting` for each request."""
    # The client may have replaced the session after a failure.
    session = get_session()
    hooks = session.event_hooks["request"]
    if _limit_waiting not in hooks:
        session.event_hooks = {**session.event_hooks, "request": [*hooks, _limit_waiting]}


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
    response = _response(error)
    if response is not None:
        return response.status_code in transient
    # A proxy may answer with a page instead of JSON.
    return any(isinstance(cause, HTTPError | json.JSONDecodeError | ConnectionError) for cause in causes(error))


def explain(error: BaseException, repo_id: str) -> str:
    """Return in one line why a request about a repository failed."""
    if isinstance(error, LocalTokenNotFoundError):
        return "it needs a token; log in with `hf auth login`, or set HF_TOKEN"
    text = getattr(error, "server_message", None) or str(error)
    # In one line.
    message = " ".join(str(text).split())[:200]
    response = _response(error)
    if response is not None:
        reasons = {
            401: "the token is invalid or has expired; make a new one, and log in with `hf auth login`",
            403: f"the token may not write to {repo_id} ({message}); use one that may",
            404: f"{repo_id} does not exist, or the token may not see it ({message})",
            429: "the Hub accepts no more requests for now; wait a while",
        }
        return reasons.get(response.status_code, f"the Hub answered {response.status_code} ({message})")
    message = message or type(error).__name__
    if is_transient(error) or isinstance(error, OfflineModeIsEnabled):
        return f"the Hub cannot be reached ({message}); check the network and HF_HUB_OFFLINE"
    return message


def _response(error: BaseException) -> Any:
    """Return the Hub's response that caused an error, or None if there was none."""
    for cause in causes(error):
        response = getattr(cause, "response", None)
        if response is not None:
            return response
    return None
