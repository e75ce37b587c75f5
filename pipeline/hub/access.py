"""Check, before anything slow, that the token may write to repositories on the Hub."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, whoami
from huggingface_hub.errors import HfHubHTTPError

from pipeline.errors import Problem
from pipeline.hub.upload import PUSH_ERRORS, explain, retry


def full_id(repo_id: str | None, output_dir: str | Path) -> str:
    """Return the id of the repository that an output directory is pushed to, by default named like the directory.

    A name without a namespace gets the user's own, which the Hub is asked for; that may raise `PUSH_ERRORS`.
    """
    name = repo_id or Path(output_dir).absolute().name
    return name if "/" in name else f"{retry(lambda: whoami(cache=True))['name']}/{name}"


def check_access(ids: Iterable[str], field: str, repo_type: str = "model", token: str | None = None) -> list[Problem]:
    """Check, without writing anything, that the token (by default, the user's) may write to or create repositories.

    Return at most one problem of `field`: the first repository that it may not write to, or why the Hub did not answer.
    """
    api, ids = HfApi(token=token), list(ids)
    try:
        user = retry(lambda: whoami(token, cache=True))
        own, known = user["name"], (user.get("auth") or {}).get("accessToken") or {}
        for name in ids:
            repo_id = name if "/" in name else f"{own}/{name}"
            try:
                retry(partial(api.auth_check, repo_id, repo_type=repo_type, write=True))
                continue
            except HfHubHTTPError as error:
                status = error.response.status_code
                # 404: the repository does not exist yet.
                if status not in (403, 404):
                    raise
            fault, namespace = "", repo_id.split("/")[0]
            scopes = known.get("fineGrained", {}).get("scoped", [])
            writable = {scope["entity"]["name"] for scope in scopes if "repo.write" in scope.get("permissions", [])}
            if namespace not in {own, *(org["name"] for org in user.get("orgs") or [])}:
                fault = f"belongs to {namespace}, and the token to {own}; push to {own}/{repo_id.split('/')[1]}"
            elif known.get("role") == "read":
                fault = "the token may only read; make one that may write, and log in with `hf auth login`"
            elif known.get("role") == "fineGrained" and not writable & {repo_id, namespace}:
                only = ", ".join(sorted(writable)) or "nothing"
                fault = f"the token may write to {only} only; push there, or make a token that may write to {namespace}"
            elif status == 403:
                fault = f"the token of {own} may not write to it; use one that may"
            if fault:
                return [Problem(field, repo_id, fault)]
    except PUSH_ERRORS as error:
        names = ", ".join(ids)
        return [Problem(field, names, explain(error, names or api.endpoint))]
    return []
