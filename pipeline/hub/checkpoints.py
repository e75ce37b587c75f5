"""Checkpoints in a repository on the Hub, from which a run resumes on any machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipeline.errors import Problem, UserError
from pipeline.files import split_revision
from pipeline.hub.upload import PUSH_ERRORS, explain, retry

LAST = "last-checkpoint"
"""Folder of a repository that holds the newest checkpoint, as transformers names it."""


def fetch_checkpoints(name: str, field: str) -> list[Path]:
    """Download the newest checkpoint of a repository to the cache of the Hub's client, unless it is there already.

    Args:
        name: `NAME/repo` or `NAME/repo@revision`.
        field: Argument that named it, for messages.

    Returns:
        Its folder, and after it that of the best checkpoint so far if the repository has it as well.

    Raises:
        UserError: If there is no such repository or no checkpoint in it, or if it cannot be downloaded.
    """
    repo_id, revision = split_revision(name)

    def download(folder: str) -> Path:
        patterns = [f"{folder}/*"]
        return Path(retry(lambda: snapshot_download(repo_id, revision=revision, allow_patterns=patterns))) / folder

    try:
        validate_repo_id(repo_id)
        paths = retry(lambda: [item.path for item in HfApi().list_repo_tree(repo_id, revision=revision)])
        newest = _newest(paths)
        if newest is None:
            remedy = "is neither a folder nor a repository with a checkpoint; push one with hub_strategy checkpoint"
            raise UserError(Problem(field, name, remedy))
        found = download(newest)
        best = _best(found)
        return [found, download(best)] if best is not None and best in paths and best != newest else [found]
    except HFValidationError as error:
        raise UserError(Problem(field, name, f"is neither a folder nor an id on the Hub ({error})")) from error
    except PUSH_ERRORS as error:
        remedy = f"is not a folder, and cannot be downloaded: {explain(error, repo_id)}"
        raise UserError(Problem(field, name, remedy)) from error


def _newest(paths: list[str]) -> str | None:
    """Return the folder of the newest checkpoint among the paths at the top of a repository, or None."""
    steps = {int(match[1]): path for path in paths if (match := re.fullmatch(r"checkpoint-(\d+)", path))}
    return LAST if LAST in paths else steps[max(steps)] if steps else None


def _best(checkpoint: Path) -> str | None:
    """Return the folder of the best checkpoint so far, as a checkpoint's state names it, or None."""
    try:
        named = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["best_model_checkpoint"]
    except (OSError, ValueError, LookupError, TypeError):  # it is validated later
        return None
    return Path(str(named)).name if named else None
