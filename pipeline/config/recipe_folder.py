"""Find recipe folders, in the package and on the Hub."""

import contextlib
import functools
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.fields import READ
from pipeline.config.untrusted import FILE, check_untrusted, recipe_files
from pipeline.config.yaml_file import MAX_BYTES, read_yaml
from pipeline.errors import Problem, UserError, as_typed, is_network_error, refuse
from pipeline.files import as_list, split_revision

SHIPPED = Path(__file__).parents[2] / "recipes"
LAUNCH_FILE = "accelerate_config.yaml"


def find_shipped(path: Path) -> Path:
    """Return `path` if it exists, otherwise the recipe or launch file of that name in the package or on the Hub.

    It is `pocket`, `recipes/pocket/2_sft.yaml`, `accelerate_config.yaml`, `NAME/repo@revision`, or any other path.
    """
    if os.path.exists(path) or path.is_absolute():
        return path
    inner = Path(*path.parts[1:]) if path.parts[0] == SHIPPED.name else path
    for found in (SHIPPED / inner, SHIPPED / "accelerate" / inner):
        if os.path.exists(found):
            return found
    is_id = path.parts[0] != SHIPPED.name and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@.+)?", path.as_posix())
    return fetch_recipes(path.as_posix()) or path if is_id and path.suffix not in (".yaml", ".yml") else path


@functools.cache
def fetch_recipes(name: str) -> Path | None:
    """Download the recipes of `NAME/repo` or `NAME/repo@revision`, a model or data set repository on the Hub, if any.

    A `UserError` says that the Hub cannot be reached, or lists what the files must not set (`untrusted`).
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    repo_id, revision = split_revision(name)
    # Its launch file is not downloaded, because it can start any program.
    patterns = ["[0-9]*_*.yaml", "[0-9]*_*.yml", "evaluate.yaml"]
    for repo_type in ("model", "dataset"):
        options = {"repo_type": repo_type, "revision": revision}
        # A bar for each of a few small files would only be noise.
        disable_progress_bars()
        try:
            # `list_repo_files` would retry for half a minute if the Hub cannot be reached.
            online = not constants.HF_HUB_OFFLINE
            info = HfApi().repo_info(repo_id, timeout=10, files_metadata=True, **options) if online else None
            listed = list(info.siblings or ()) if info else []
            files = [file for file in listed if FILE.fullmatch(file.rfilename)]
            if listed and not files:
                raise UserError(Problem("recipe", name, "does not contain files such as 2_sft.yaml; name another"))
            if len(files) > 100 or any((file.size or 0) > MAX_BYTES for file in files):
                raise UserError(Problem("recipe", name, "is larger than a recipe can be; name another"))
            folder = Path(snapshot_download(repo_id, allow_patterns=patterns, **options))
        except RepositoryNotFoundError:
            continue
        except RevisionNotFoundError:
            raise UserError(Problem("recipe", name, f"{repo_id} has no revision {revision}; correct it")) from None
        except (HTTPError, OSError, RuntimeError) as error:
            if constants.HF_HUB_OFFLINE:
                continue
            reason = "the Hub cannot be reached" if is_network_error(error) else str(error).strip().split("\n")[0][:200]
            remedy = f"is not a local folder, and cannot be downloaded ({reason}); correct it, or try later"
            raise UserError(Problem("recipe", name, remedy)) from None
        finally:
            enable_progress_bars()
        refuse(*check_untrusted(folder))
        return folder
    return None


def is_fetched(path: Path) -> bool:
    """Return whether a recipe folder is on the Hub rather than on this disk or in the package."""
    return not os.path.exists(path) and (found := find_shipped(path)) != path and not found.is_relative_to(SHIPPED)


def show_fetched(path: Path) -> str:
    """Return the text of a recipe folder's files if it lies on the Hub, so that people see what they run; or ""."""
    if not is_fetched(path):
        return ""
    text = "".join(f"# {path}: {file.name}\n{file.read_text('utf-8')}\n" for file in recipe_files(find_shipped(path)))
    return "".join(character if character.isprintable() or character in "\n\t" else "?" for character in text)


def missing_input(values: Mapping[str, Any], config: str) -> Problem | None:
    """Return the input of the step in `config` that an earlier step has yet to write, with the command for that."""
    folder = Path(config).parent
    steps: list[tuple[str, Path]] = []
    for path in sorted(find_shipped(folder).glob("[0-9]*.y*ml")):
        # The file of another step may be wrong, which is reported when that step runs.
        with contextlib.suppress(UserError):
            output = Path(str(read_yaml(str(path)).get("output_dir", "")))
            steps += [(path.stem, output)] if output.parts else []
    missing: dict[str, tuple[str, str]] = {}
    for name in READ:
        for text in filter(None, as_list(values.get(name))):
            writer = next((step for step, output in steps if Path(text).is_relative_to(output)), None)
            if writer is not None and not os.path.exists(text):
                missing.setdefault(writer, (name, text))
    if not missing:
        return None
    last = max(missing)
    return Problem(*missing[last], f"does not exist yet; first run `{as_typed('run', folder, '--until', last)}`")
