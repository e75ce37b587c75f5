"""Fetch from the Hub what the steps of a recipe read, for machines without internet, and checkpoints to resume from."""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder
from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipeline.data.sources import open_source
from pipeline.errors import Problem, UserError
from pipeline.files import STATE, as_list, is_missing_path, read_json, split_revision
from pipeline.hub.upload import PUSH_ERRORS, explain, retry
from pipeline.models.loading import user_error_for

MODELS = ("model_name_or_path", "tokenizer_name_or_path", "reward_model_path", "value_model_path", "judge")
"""Fields that may name models or tokenizers of the Hub."""

FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
"""What models are loaded from; pickles are left where they are."""

LAST = "last-checkpoint"
"""Folder of a repository that holds the newest checkpoint, as transformers names it."""


def download(steps: Iterable[Mapping[str, Any]], home: Path) -> int:
    """Fetch the models and data sets that steps name, and print a line for each.

    Args:
        steps: Settings of each.
        home: Directory of the run, as the settings name it: what lies there is made by the run.

    Returns:
        0.

    Raises:
        UserError: If one of them cannot be fetched, or takes more than the disk has.
    """
    models: dict[str, tuple[str, str | None]] = {}
    data: dict[tuple[str, str | None], bool] = {}
    for values in steps:
        for field in MODELS:
            for name in as_list(values.get(field)):
                if _is_of_hub(name, home):
                    models.setdefault(name, (field, values.get("model_revision")))
        # The settings of an evaluation name data in mappings.
        for source in (values, *(value for value in values.values() if isinstance(value, Mapping))):
            for name in as_list(source.get("dataset_name")):
                if _is_of_hub(name, home):
                    key = (name, source.get("dataset_config"))
                    data[key] = data.get(key, True) and bool(source.get("dataset_streaming"))
    for name, (field, revision) in models.items():
        with user_error_for(field, name):
            repo_id, own = split_revision(name)
            snapshot_download(repo_id, revision=own or revision, allow_patterns=FILES)
        print(f"fetched the model {name}")
    for (name, config), streamed in data.items():
        if streamed:
            _fetch_stream(name, config)
        else:
            open_source(name, config)
            print(f"fetched the data set {name}")
    return 0


def _fetch_stream(name: str, config: str | None) -> None:
    """Fetch the files of a data set's configuration, so that it can be streamed without the Hub.

    All of its splits are fetched, because `datasets` does not open a folder that lacks one.
    """
    # Opening it reports what is wrong with the name or the configuration.
    open_source(name, config, streaming=True)
    repo_id, revision = split_revision(name)
    files = load_dataset_builder(repo_id, config, revision=revision).config.data_files
    hub, options = HfFileSystem(), {"repo_type": "dataset", "revision": revision}
    paths = [glob.escape(hub.resolve_path(url).path_in_repo) for split in files.values() for url in split]
    planned = snapshot_download(repo_id, allow_patterns=paths, dry_run=True, **options)
    missing = [file.file_size for file in planned if file.will_download]
    needed, cache = sum(missing), Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
    size = f"{needed / 1e9:.2f} GB in {len(missing)} files"
    if needed > free:
        remedy = f"takes {size}, and {free / 1e9:.2f} GB are free in {cache}; make room, or set HF_HOME to another disk"
        raise UserError(Problem("dataset_name", name, remedy))
    print(f"fetching the stream {name}: {size}", flush=True)
    with user_error_for("dataset_name", name, "data set"):
        snapshot_download(repo_id, allow_patterns=["README.md", *paths], **options)
    print(f"fetched the stream {name}")


def _is_of_hub(name: object, home: Path) -> bool:
    """Return whether a name is an id of the Hub: not a folder, and not the name of a function either."""
    return isinstance(name, str) and not (
        Path(name).is_relative_to(home) or Path(name).exists() or is_missing_path(name) or ":" in name
    )


def fetch_checkpoints(name: str, field: str) -> list[Path]:
    """Download the newest checkpoint of a repository to the cache of the Hub's client, unless it is there already.

    The repository is `NAME/repo` or `NAME/repo@revision`, and `field` the argument that named it, for messages.

    Returns:
        Its folder, followed by the folder of the best checkpoint so far if the repository has it as well.

    Raises:
        UserError: If there is no such repository or no checkpoint in it, or if it cannot be downloaded.
    """
    repo_id, revision = split_revision(name)

    def fetch(folder: str) -> Path:
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
        found = fetch(newest)
        # Resuming validates the state, and so it may be damaged here.
        best = Path(str(read_json(found / STATE).get("best_model_checkpoint") or "")).name
        return [found, fetch(best)] if best in paths and best != newest else [found]
    except HFValidationError as error:
        raise UserError(Problem(field, name, f"is neither a folder nor an id on the Hub ({error})")) from error
    except PUSH_ERRORS as error:
        remedy = f"is not a folder, and cannot be downloaded: {explain(error, repo_id)}"
        raise UserError(Problem(field, name, remedy)) from error
