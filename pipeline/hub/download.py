"""Fetch from the Hub what a recipe's steps read, for machines without internet, and checkpoints to resume from."""

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
from pipeline.files import STATE, as_list, is_missing_path, nearest, read_json, split_revision
from pipeline.hub.upload import PUSH_ERRORS, explain, retry
from pipeline.models.loading import user_error_for

# Fields that may name models or tokenizers of the Hub.
MODELS = ("model_name_or_path", "tokenizer_name_or_path", "reward_model_path", "value_model_path", "judge")
# Files that models are loaded from; pickles are not downloaded.
FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
# Folder of a repository that holds the newest checkpoint, as transformers names it.
LAST = "last-checkpoint"


def download(steps: Iterable[Mapping[str, Any]], home: Path) -> int:
    """Fetch what the steps' settings name, except what the run makes in `home`; return 0, or raise a `UserError`."""

    def on_hub(names: object) -> list[str]:
        """Return the Hub ids among names: those that are neither paths nor functions."""
        found = [name for name in as_list(names) if isinstance(name, str) and ":" not in name]
        found = [name for name in found if not (Path(name).is_relative_to(home) or Path(name).exists())]
        return [name for name in found if not is_missing_path(name)]

    models: dict[str, tuple[str, str | None]] = {}
    data: dict[tuple[str, str | None], bool] = {}
    for values in steps:
        for field in MODELS:
            for name in on_hub(values.get(field)):
                models.setdefault(name, (field, values.get("model_revision")))
        # The settings of an evaluation name data in mappings.
        for source in (values, *(value for value in values.values() if isinstance(value, Mapping))):
            for name in on_hub(source.get("dataset_name")):
                key = (name, source.get("dataset_config"))
                data[key] = data.get(key, True) and bool(source.get("dataset_streaming"))
    for name, (field, revision) in models.items():
        with user_error_for(field, name):
            repo_id, own = split_revision(name)
            snapshot_download(repo_id, revision=own or revision, allow_patterns=FILES)
        print(f"fetched the model {name}")
    for (name, config), streamed in data.items():
        # Opening it reports a wrong name or configuration.
        open_source(name, config, streaming=streamed)
        if streamed:
            # All splits of the configuration are fetched, because `datasets` does not open a folder that lacks one.
            repo_id, revision = split_revision(name)
            files = load_dataset_builder(repo_id, config, revision=revision).config.data_files
            hub, options = HfFileSystem(), {"repo_type": "dataset", "revision": revision}
            paths = [glob.escape(hub.resolve_path(url).path_in_repo) for split in files.values() for url in split]
            planned = snapshot_download(repo_id, allow_patterns=paths, dry_run=True, **options)
            missing = [file.file_size for file in planned if file.will_download]
            size = f"{sum(missing) / 1e9:.2f} GB in {len(missing)} files"
            if sum(missing) > (free := shutil.disk_usage(nearest(Path(constants.HF_HUB_CACHE))).free):
                remedy = f"takes {size}, and {free / 1e9:.2f} GB are free; make room, or set HF_HOME to a larger disk"
                raise UserError(Problem("dataset_name", name, remedy))
            print(f"fetching the stream {name}: {size}", flush=True)
            with user_error_for("dataset_name", name, "data set"):
                snapshot_download(repo_id, allow_patterns=["README.md", *paths], **options)
        print(f"fetched the {'stream' if streamed else 'data set'} {name}")
    return 0


def fetch_checkpoints(name: str, field: str) -> list[Path]:
    """Download the newest checkpoint of `NAME/repo` or `NAME/repo@revision`, which the argument `field` named.

    Return its folder, and the folder of the best checkpoint so far if the repository has that, too. Raise a `UserError`
    if the repository or a checkpoint in it does not exist, or cannot be downloaded.
    """
    repo_id, revision = split_revision(name)

    def fetch(folder: str) -> Path:
        return Path(retry(lambda: snapshot_download(repo_id, revision=revision, allow_patterns=f"{folder}/*")), folder)

    try:
        validate_repo_id(repo_id)
        paths = retry(lambda: [item.path for item in HfApi().list_repo_tree(repo_id, revision=revision)])
        numbered = [path for path in paths if re.fullmatch(r"checkpoint-\d+", path)]
        newest = LAST if LAST in paths else max(numbered, key=lambda path: int(path.partition("-")[2]), default=None)
        if newest is None:
            remedy = "is neither a folder nor a repository with a checkpoint; push one with hub_strategy checkpoint"
            raise UserError(Problem(field, name, remedy))
        found = fetch(newest)
        # Resuming validates the state, so it may be damaged here.
        best = Path(str(read_json(found / STATE).get("best_model_checkpoint") or "")).name
        return [found, fetch(best)] if best in paths and best != newest else [found]
    except HFValidationError as error:
        raise UserError(Problem(field, name, f"is neither a folder nor an id on the Hub ({error})")) from error
    except PUSH_ERRORS as error:
        remedy = f"is not a folder, and cannot be downloaded: {explain(error, repo_id)}"
        raise UserError(Problem(field, name, remedy)) from error
