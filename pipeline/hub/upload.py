"""Push files to a repository on the Hub, each file once, over a network that may fail at any request."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoFile, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.sha import git_hash

from pipeline.hub.published_files import Files

logger = logging.getLogger(__name__)

T = TypeVar("T")

PUSH_ERRORS = (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, RuntimeError, ValueError, OSError)
"""What the Hub's client raises if a request fails. It wraps a failed upload in a `RuntimeError`,
and a card that the Hub does not accept in a `ValueError`, as is JSON that cannot be read."""

TRANSIENT = (408, 409, 412, 429, 500, 502, 503, 504)
"""Statuses after which another attempt may succeed. 409 and 412: there has been another commit meanwhile."""

WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts, if the Hub does not name a time."""

TIMEOUT = 60.0
"""Seconds until a Hub that accepts a request and sends nothing is given up, where its client sets no limit."""


def is_replaced(path: str) -> bool:
    """Return whether the push of a model replaces a path: all but checkpoints and the files of Git."""
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
) -> list[str]:
    """Make a branch of a repository hold `files`, in one commit. Both are created if they do not exist.

    Only what differs is uploaded, and what is there and not in `files` is deleted; the history keeps it. The answer to
    a commit may be lost: what the branch holds is therefore looked up before every attempt.

    Args:
        message: Message of the commit, and title of the pull request.
        repo_type: "model", "dataset" or "space"; a Space is a static one.
        revision: The branch. Default: "main".
        create_pr: Whether to open a pull request instead.
        replaces: Whether a path of the repository is deleted if it is not among `files`.

    Returns:
        The paths that were uploaded or deleted; none if the branch held these files already.

    Raises:
        PUSH_ERRORS: If it still fails after some attempts, for the reason that `explain` gives.
    """

    # Any request may fail, and even a request that succeeded may seem to have failed, because its answer was lost. An
    # attempt therefore trusts nothing that an earlier one has done, but compares the branch with the files anew:
    #
    #     look up the branch --- missing ---> create it, and look again
    #          |
    #     compare sizes and hashes --- equal ---> done, also if an earlier attempt made the commit and never heard of it
    #          |
    #     upload what differs, and commit on top of `parent` --- somebody else committed ---> 409 or 412, try again
    def attempt() -> list[str] | None:
        """Return the paths that have changed, None if the repository or the branch was created first."""
        found = _read_branch(api, repo_id, repo_type, revision, private)
        if found is None:
            return None
        parent, remote = found
        stale = [path for path in remote if path not in files and replaces(path)]
        additions = [CommitOperationAdd(path, content) for path, content in files.items()]
        new = [addition for addition in additions if not _is_same(addition, remote.get(addition.path_in_repo))]
        if new or stale:
            where: dict[str, Any] = {"repo_type": repo_type, "revision": revision, "create_pr": create_pr}
            # Files of the same content are uploaded once: `create_commit` alone would upload each.
            distinct = {addition.upload_info.sha256: addition for addition in new}
            if len(distinct) < len(new):
                api.preupload_lfs_files(repo_id, list(distinct.values()), free_memory=False, **where)
            operations = [*new, *map(CommitOperationDelete, stale)]
            api.create_commit(repo_id, operations, commit_message=message, parent_commit=parent, **where)
        return [*(item.path_in_repo for item in new), *stale]

    for _ in range(5):
        if (changed := retry(attempt)) is not None:
            return changed
    raise RuntimeError(f"{repo_id} was created, but the Hub does not show it; check that your token may read it")


def _read_branch(
    api: HfApi, repo_id: str, repo_type: str, branch: str | None, private: bool
) -> tuple[str | None, dict[str, RepoFile]] | None:
    """Look up what a branch holds, and make the repository private if that is asked for.

    Returns:
        The newest commit and the files by path; None if the repository or the branch did not exist, and was created.
    """
    where = {"repo_id": repo_id, "repo_type": repo_type}
    try:
        info = api.repo_info(revision=branch, **where)
        if private and not info.private:
            api.update_repo_settings(private=True, **where)
        tree = api.list_repo_tree(recursive=True, revision=branch, **where)
        return info.sha, {item.path: item for item in tree if isinstance(item, RepoFile)}
    except HfHubHTTPError as error:
        # The answer is 401 if the token may not see the repository, or if there is none.
        if error.response.status_code != 404 and not isinstance(error, RepositoryNotFoundError):
            raise
        sdk = "static" if repo_type == "space" else None
        # The client fails with a KeyError if a conflict (409) does not name the repository.
        with contextlib.suppress(KeyError):
            api.create_repo(private=private or None, exist_ok=True, space_sdk=sdk, **where)
        # The next attempt finds whether the repository is there, and its branch is not.
        if branch is not None and not isinstance(error, RepositoryNotFoundError):
            api.create_branch(branch=branch, exist_ok=True, **where)
        return None


def _is_same(addition: CommitOperationAdd, remote: RepoFile | None) -> bool:
    """Return whether a file of a repository has this content."""
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == addition.upload_info.sha256.hex()
    if remote.size != addition.upload_info.size:
        return False
    with addition.as_file() as file:
        return remote.blob_id == git_hash(file.read())


def retry(call: Callable[[], T]) -> T:
    """Return what `call` returns, after up to `len(WAITS)` failures that may pass. Honour the Hub's `Retry-After`."""
    for wait in WAITS:
        # The client may have replaced the session after a failure.
        session = get_session()
        if _limit_waiting not in (hooks := session.event_hooks["request"]):
            session.event_hooks = {**session.event_hooks, "request": [*hooks, _limit_waiting]}
        try:
            return call()
        except PUSH_ERRORS as error:
            if not is_transient(error):
                raise
            named = str(getattr(_response(error), "headers", {}).get("retry-after", ""))
            # Ten minutes at most, whatever the Hub asks for.
            seconds = min(float(named), 600.0) if named.isdigit() else wait
            logger.warning("A request failed (%s); the next attempt is in %g s.", explain(error, "the Hub"), seconds)
        time.sleep(seconds)
    return call()


def _limit_waiting(request: Any) -> None:
    """Give a request of the Hub's client that has no time limit one: most of them would wait forever."""
    # The client asks for no limit in the request itself, so that a limit of the session would not count.
    limits = request.extensions.get("timeout", {})
    missing = [name for name in ("connect", "read", "write") if not limits.get(name)]
    request.extensions["timeout"] = limits | dict.fromkeys(missing, TIMEOUT)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later: the network failed, or the Hub was busy."""
    if isinstance(error, LocalTokenNotFoundError | OfflineModeIsEnabled):
        return False
    response = _response(error)
    if response is not None:
        return response.status_code in TRANSIENT
    return any(isinstance(item, HTTPError | json.JSONDecodeError | ConnectionError) for item in _causes(error))


def explain(error: BaseException, repo_id: str) -> str:
    """Return in one line why a request about a repository failed."""
    response = _response(error)
    status = getattr(response, "status_code", None)
    said = " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
    if isinstance(error, LocalTokenNotFoundError):
        return "it needs a token; log in with `hf auth login`, or set HF_TOKEN"
    reasons = {
        401: "the token is not valid, or has expired; make a new one, and log in with `hf auth login`",
        403: f"the token may not write to {repo_id} ({said}); use one that may",
        404: f"{repo_id} does not exist, or the token may not see it ({said})",
        429: "the Hub accepts no more requests for now; wait a while",
    }
    if status is not None:
        return reasons.get(status, f"the Hub answered {status} ({said})")
    if is_transient(error) or isinstance(error, OfflineModeIsEnabled):
        return f"the Hub cannot be reached ({said or type(error).__name__}); check the network and HF_HUB_OFFLINE"
    return said or type(error).__name__


def _response(error: BaseException) -> Any:
    """Return the answer of the Hub that an error is about, if there was one."""
    responses = (getattr(item, "response", None) for item in _causes(error))
    return next((response for response in responses if response is not None), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        # Not the context, which may be the answer to an earlier request.
        error = error.__cause__
