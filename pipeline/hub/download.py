"""Fetch from the Hub what a recipe's steps read, for machines without internet, and checkpoints to resume from."""

import glob
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder
from huggingface_hub import HfApi, HfFileSystem, constants, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pipeline.data.sources import open_source
from pipeline.errors import Problem, UserError
from pipeline.files import STATE, as_list, is_missing_path, nearest_existing, read_json, split_revision
from pipeline.hub.upload import PUSH_ERRORS, explain, retry
from pipeline.models.loading import user_error_for

# Fields that may name models or tokenizers of the Hub.
MODEL_FIELDS = ("model_name_or_path", "tokenizer_name_or_path", "reward_model_path", "value_model_path", "judge")
# Files that models are loaded from; pickles are not downloaded.
MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# Folder of a repository that holds the newest checkpoint, as transformers names it.
LAST = "last-checkpoint"


def download(steps: Iterable[Mapping[str, Any]], home: Path) -> int:
    """Fetch the models and data that the settings of steps name, into the caches of the libraries.

    Args:
        steps: Settings of each step.
        home: Directory of the run, whose contents the run makes itself.

    Returns:
        0, the exit code.

    Raises:
        UserError: If something does not exist, cannot be fetched, or does not fit on the disk.
    """
    steps = list(steps)
    for name, (field, revision) in _named_models(steps, home).items():
        with user_error_for(field, name):
            repo_id, named_revision = split_revision(name)
            snapshot_download(repo_id, revision=named_revision or revision, allow_patterns=MODEL_FILES)
        print(f"fetched the model {name}")
    for (name, config), is_streamed in _named_datasets(steps, home).items():
        # Opening a data set reports a wrong name or configuration, and fetches it unless it is streamed.
        open_source(name, config, streaming=is_streamed)
        if is_streamed:
            _fetch_stream(name, config)
            print(f"fetched the stream {name}")
        else:
            print(f"fetched the data set {name}")
    return 0


def _named_models(steps: Iterable[Mapping[str, Any]], home: Path) -> dict[str, tuple[str, str | None]]:
    """Return the models of the Hub that steps name: Hub id -> the first field that names it, and its revision."""
    models: dict[str, tuple[str, str | None]] = {}
    for values in steps:
        for field in MODEL_FIELDS:
            for name in _hub_ids(values.get(field), home):
                models.setdefault(name, (field, values.get("model_revision")))
    return models


def _named_datasets(steps: Iterable[Mapping[str, Any]], home: Path) -> dict[tuple[str, str | None], bool]:
    """Return the data sets of the Hub that steps name: (Hub id, configuration) -> whether all steps stream it."""
    datasets: dict[tuple[str, str | None], bool] = {}
    for values in steps:
        # The settings of an evaluation name data in mappings: {"problems": {"dataset_name": "openai/gsm8k"}}.
        sources = [values, *(value for value in values.values() if isinstance(value, Mapping))]
        for source in sources:
            for name in _hub_ids(source.get("dataset_name"), home):
                key = (name, source.get("dataset_config"))
                datasets[key] = datasets.get(key, True) and bool(source.get("dataset_streaming"))
    return datasets


def _hub_ids(names: object, home: Path) -> list[str]:
    """Return the Hub ids among the names (a string, a list, or None): those that are neither paths nor functions."""
    ids = []
    for name in as_list(names):
        if not isinstance(name, str) or ":" in name:
            continue
        is_path = Path(name).is_relative_to(home) or Path(name).exists() or is_missing_path(name)
        if not is_path:
            ids.append(name)
    return ids


def _fetch_stream(name: str, config: str | None) -> None:
    """Fetch the files of a data set that a step streams.

    All splits of the configuration are fetched, because `datasets` does not open a folder that lacks one.
    """
    repo_id, revision = split_revision(name)
    data_files = load_dataset_builder(repo_id, config, revision=revision).config.data_files
    urls = [url for split in data_files.values() for url in split]
    hub = HfFileSystem()
    paths = [glob.escape(hub.resolve_path(url).path_in_repo) for url in urls]
    options = {"repo_type": "dataset", "revision": revision}
    planned = snapshot_download(repo_id, allow_patterns=paths, dry_run=True, **options)
    sizes = [file.file_size for file in planned if file.will_download]
    size = f"{sum(sizes) / 1e9:.2f} GB in {len(sizes)} files"
    free = shutil.disk_usage(nearest_existing(Path(constants.HF_HUB_CACHE))).free
    if sum(sizes) > free:
        remedy = f"takes {size}, and {free / 1e9:.2f} GB are free; make room, or set HF_HOME to a larger disk"
        raise UserError(Problem("dataset_name", name, remedy))
    print(f"fetching the stream {name}: {size}", flush=True)
    with user_error_for("dataset_name", name, "data set"):
        snapshot_download(repo_id, allow_patterns=["README.md", *paths], **options)


def fetch_checkpoints(name: str, field: str) -> list[Path]:
    """Download the newest checkpoint of a repository into the cache of the Hub's client.

    Args:
        name: `NAME/repo` or `NAME/repo@revision`.
        field: Argument that named it, for messages.

    Returns:
        The folder of the checkpoint and, if the repository has another one that was the best so far, its folder.

    Raises:
        UserError: If the repository or a checkpoint in it does not exist, or cannot be downloaded.
    """
    repo_id, revision = split_revision(name)

    def fetch(folder: str) -> Path:
        snapshot = retry(lambda: snapshot_download(repo_id, revision=revision, allow_patterns=f"{folder}/*"))
        return Path(snapshot, folder)

    try:
        validate_repo_id(repo_id)
        paths = retry(lambda: [item.path for item in HfApi().list_repo_tree(repo_id, revision=revision)])
        newest = _newest_checkpoint(paths)
        if newest is None:
            remedy = "is neither a folder nor a repository with a checkpoint; push one with hub_strategy checkpoint"
            raise UserError(Problem(field, name, remedy))
        checkpoint = fetch(newest)
        # A damaged state is not reported here: `read_json` returns {}, and resuming validates the checkpoint.
        best = Path(str(read_json(checkpoint / STATE).get("best_model_checkpoint") or "")).name
        if best in paths and best != newest:
            return [checkpoint, fetch(best)]
        return [checkpoint]
    except HFValidationError as error:
        raise UserError(Problem(field, name, f"is neither a folder nor an id on the Hub ({error})")) from error
    except PUSH_ERRORS as error:
        remedy = f"is not a folder, and cannot be downloaded: {explain(error, repo_id)}"
        raise UserError(Problem(field, name, remedy)) from error


def _newest_checkpoint(paths: Sequence[str]) -> str | None:
    """Return the folder of the newest checkpoint among the paths at the top of a repository, or None."""
    if LAST in paths:
        return LAST
    numbered = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path)]
    return max(numbered, key=lambda path: int(path.partition("-")[2]), default=None)
