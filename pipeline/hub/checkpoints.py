"""Checkpoints in a repository on the Hub, from which a run resumes on any machine."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipeline.errors import Problem, UserError
from pipeline.files import STATE, read_json, split_revision
from pipeline.hub.upload import PUSH_ERRORS, explain, retry

LAST = "last-checkpoint"
"""Folder of a repository that holds the newest checkpoint, as transformers names it."""


def fetch_checkpoints(name: str, field: str) -> list[Path]:
    """Download the newest checkpoint of a repository to the cache of the Hub's client, unless it is there already.

    Args:
        name: `NAME/repo` or `NAME/repo@revision`.
        field: Argument that named it, for messages.

    Returns:
        Its folder, followed by the folder of the best checkpoint so far if the repository has it as well.

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
        numbered = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path)]
        newest = LAST if LAST in paths else max(numbered, key=lambda path: int(path.partition("-")[2]), default=None)
        if newest is None:
            remedy = "is neither a folder nor a repository with a checkpoint; push one with hub_strategy checkpoint"
            raise UserError(Problem(field, name, remedy))
        found = download(newest)
        # Resuming validates the state, and so it may be damaged here.
        best = Path(str(read_json(found / STATE).get("best_model_checkpoint") or "")).name
        return [found, download(best)] if best in paths and best != newest else [found]
    except HFValidationError as error:
        raise UserError(Problem(field, name, f"is neither a folder nor an id on the Hub ({error})")) from error
    except PUSH_ERRORS as error:
        remedy = f"is not a folder, and cannot be downloaded: {explain(error, repo_id)}"
        raise UserError(Problem(field, name, remedy)) from error
