"""Check, before anything slow, that the token may write to repositories on the Hub."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, whoami
from huggingface_hub.errors import HfHubHTTPError

from pipeline.errors import Problem
from pipeline.hub.upload import PUSH_ERRORS, explain, retry


def full_id(repo_id: str | None, output_dir: str | Path) -> str:
    """Return the full id, `NAME/repo`, of the repository that an output directory is pushed to.

    Args:
        repo_id: `NAME/repo`, or `repo` for a repository of the user. None stands for the name of the directory.
        output_dir: The directory.

    Raises:
        PUSH_ERRORS: If the user's name is needed, and the Hub does not tell it.
    """
    name = repo_id or Path(output_dir).absolute().name
    if "/" in name:
        return name
    user = retry(lambda: whoami(cache=True))
    return f"{user['name']}/{name}"


def check_access(ids: Iterable[str], field: str, repo_type: str = "model", token: str | None = None) -> list[Problem]:
    """Check that the token may write to repositories, or create them. Nothing is written.

    Args:
        ids: The repositories: `NAME/repo`, or `repo` for a repository of the user. If there are none, only the token
            itself is checked.
        field: Argument that asks for the push, for the message.
        repo_type: "model", "dataset" or "space".
        token: The token. None stands for the one from `hf auth login` or HF_TOKEN.

    Returns:
        At most one problem: the first repository that the token may not write to, or why the Hub did not answer.
    """
    api = HfApi(token=token)
    ids = list(ids)
    try:
        user = retry(lambda: whoami(token, cache=True))
        for name in ids:
            repo_id = name if "/" in name else f"{user['name']}/{name}"
            obstacle = _find_obstacle(api, user, repo_id, repo_type)
            if obstacle is not None:
                return [Problem(field, repo_id, obstacle)]
    except PUSH_ERRORS as error:
        names = ", ".join(ids)
        return [Problem(field, names, explain(error, names or api.endpoint))]
    return []


def _find_obstacle(api: HfApi, user: Mapping[str, Any], repo_id: str, repo_type: str) -> str | None:
    """Return why the user's token may not push to a repository, with a remedy; None if it may.

    `user` is what `whoami` returns for the token.
    """
    try:
        retry(partial(api.auth_check, repo_id, repo_type=repo_type, write=True))
        return None
    except HfHubHTTPError as error:
        status = error.response.status_code
        # 403: the token may not write, and the reason is found below. 404: the repository does not exist yet, and what
        # the token may create is found below.
        if status not in (403, 404):
            raise
    namespace, _, name = repo_id.partition("/")
    user_name = user["name"]
    organizations = [organization["name"] for organization in user.get("orgs") or []]
    if namespace not in (user_name, *organizations):
        return f"belongs to {namespace}, and the token to {user_name}; push to {user_name}/{name}"
    token = (user.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    if role == "read":
        return "the token may only read; make one that may write, and log in with `hf auth login`"
    if role == "fineGrained":
        writable = _writable_names(token)
        if repo_id not in writable and namespace not in writable:
            names = ", ".join(sorted(writable)) or "nothing"
            return f"the token may write to {names} only; push there, or make a token that may write to {namespace}"
    if status == 403:
        return f"the token of {user_name} may not write to it; use one that may"
    return None


def _writable_names(token: Mapping[str, Any]) -> set[str]:
    """Return the users, organizations and repositories that a fine-grained token may write to."""
    scopes = token.get("fineGrained", {}).get("scoped", [])
    return {scope["entity"]["name"] for scope in scopes if "repo.write" in scope.get("permissions", [])}
