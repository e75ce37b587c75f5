"""The repositories that a run is pushed to, and what goes into each."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from pyarrow.parquet import read_table

from pipeline.errors import Problem, UserError, as_typed
from pipeline.files import as_list, holds_model, is_missing_path, read_json, read_run
from pipeline.hub.cards import CRITIC, Trained, base_card, dataset_card, load_card, model_card, space_card
from pipeline.hub.published_files import Files, places, public_settings, publishable, to_bytes, without_paths
from pipeline.hub.upload import retry
from pipeline.stages import HELD_OUT, STAGES

# Folder of an adapter with its base model, if that was itself merged from an adapter.
BASE = "base"

REPORT = "report"
# Directories of a run that are not outputs of stages.
OTHERS = (REPORT, "evaluations", "logs")


@dataclass
class Repository:
    """The contents of a repository: a "model", "dataset" or "space". `checkpoints` has the files of each by branch."""

    id: str
    type: str
    files: Files
    checkpoints: dict[str, Files] = field(default_factory=dict)


@dataclass
class Outputs:
    """The output directories of the run in `path`, to be pushed to a `namespace`; or one of them, with a `repo_id`.

    `only` names those that are pushed, by default all. `license` is by default the one in the cards of the data. `api`
    looks for earlier pushes; None makes no request.
    """

    path: Path
    namespace: str = ""
    repo_id: str = ""
    only: Sequence[str] | None = None
    license: str | None = None
    checkpoints: bool = False
    api: HfApi | None = None

    @property
    def name(self) -> str:
        """Name of the run's directory, prefixed with the recipe's name if the directory is for a seed."""
        path = self.path.resolve()
        return f"{path.parent.name}-{path.name}" if re.fullmatch(r"seed\d+", path.name) else path.name

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The output directories with a finished model or data, by name."""
        found = [path for path in sorted(self.path.iterdir()) if path.name not in OTHERS and path.name[0] != "."]
        # Unrelated folders may lie next to a single output directory.
        if self.repo_id and not self.record:
            found = [path for path in found if path.name in (self.only or ())]
        return {path.name: path.resolve() for path in found if is_data(path) or holds_model(path)}

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The entries of the steps in run.json, empty if there is none."""
        return read_run(self.path).get("steps", {})

    @cached_property
    def is_smoke(self) -> bool:
        """Whether the run is a miniature of `run --smoke`."""
        return bool(read_run(self.path).get("smoke"))

    @cached_property
    def own_data(self) -> list[str]:
        """The user's files and folders that the stages are measured on, whose rows the report shows."""
        names: list[str] = []
        for step in self.record.values():
            values = step.get("values", {})
            # Only the settings of an evaluation have a home, the folder that the run was written to.
            if home := values.get("home"):
                sources = [values[key] for key in HELD_OUT if isinstance(values.get(key), Mapping)]
                named = [str(name) for source in sources for name in as_list(source.get("dataset_name") or [])]
                names += [name for name in named if not Path(name).is_relative_to(home)]
        # Others are ids on the Hub.
        return [name for name in dict.fromkeys(names) if Path(name).exists() or is_missing_path(name)]

    @cached_property
    def ids(self) -> dict[str, str]:
        """Repositories of the output directories that are pushed now, or were pushed before."""
        if self.repo_id:
            return dict.fromkeys(self.only or (), self.repo_id)
        found = {}
        for name, path in self.folders.items():
            repo_id, kind = self.id_of(name), "dataset" if is_data(path) else "model"
            exists = partial(self.api.repo_exists, repo_id, repo_type=kind) if self.api else bool
            if self.only is None or name in self.only or retry(exists):
                found[name] = repo_id
        return found

    def id_of(self, output: str) -> str:
        """Return the repository of an output directory or of the report; the Hub allows names of 96 characters."""
        name = f"{self.name[: max(95 - len(output), 1)]}-{output}"
        name = re.sub(r"(?:[^A-Za-z0-9_.]|\.\.)+", "-", name)[:96].strip("-.")
        return self.repo_id or f"{self.namespace}/{name}"

    @cached_property
    def wanted(self) -> list[str]:
        """Names of the output directories to push. Raise a `UserError` if one is not finished, or there are none."""
        if missing := [name for name in self.only or () if name not in self.folders]:
            remedy = f"is not a finished model or data set; choose from: {', '.join(self.folders) or 'nothing yet'}"
            raise UserError(*(Problem("RUN" if self.repo_id else "--stage", name, remedy) for name in missing))
        wanted = [name for name in self.folders if self.only is None or name in self.only]
        if not wanted:
            remedy = f"contains neither a finished model nor data; run it first with `{as_typed('run', 'RECIPE')}`"
            raise UserError(Problem("RUN", self.path, remedy))
        return wanted

    @cached_property
    def bases(self) -> dict[str, tuple[Path, str | None]]:
        """For each adapter that names a folder as its base model: the folder, and its Hub id or None.

        If that base was itself merged from an adapter, it comes with the new adapter, in the folder `base`.
        """
        found: dict[str, tuple[Path, str | None]] = {}
        for name, folder in self.folders.items():
            base = Path(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
            # The base model may lie in the cache of the Hub's client, or be a stage of this run, which may have moved.
            cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"{base}/")
            if base.name == BASE and holds_model(folder / BASE):
                found[name] = base, f"{self.id_of(name)}-{BASE}"
            elif base.is_absolute():
                found[name] = base, "/".join(cached.groups()) if cached else self.ids.get(base.name)
        return found

    def repositories(self) -> list[Repository]:
        """Return what is pushed: first data sets, which the cards of the models name, then models, then the report."""
        data: list[Repository] = []
        models: list[Repository] = []
        for name in self.wanted:
            folder, repo_id = self.folders[name], self.id_of(name)
            if is_data(folder):
                # Data are published unchanged: only models and reports contain paths.
                rows: Files = {path: folder / path for path in publishable(folder)}
                rows["README.md"] = to_bytes(dataset_card(folder, repo_id, self.ids, self._license[0]))
                data.append(Repository(repo_id, "dataset", rows))
                continue
            _, base_id = self.bases.get(name, (Path(), None))
            # PEFT does not look for the base in a subfolder, so it has its own repository.
            if base_id == f"{repo_id}-{BASE}":
                own: Files = {"README.md": to_bytes(base_card(base_id, self._trained(name)))}
                models.append(Repository(base_id, "model", publishable(folder / BASE) | own))
            saved = sorted(path for path in folder.glob("checkpoint-*") if self.checkpoints and holds_model(path))
            branches = {f"step-{path.name.rpartition('-')[2]}": self._model_files(name, path) for path in saved}
            models.append(Repository(repo_id, "model", self._model_files(name, folder), branches))
        if not self.has_report or self.only is not None:
            return data + models
        steps = {name: step | {"values": public_settings(step.get("values", {}))} for name, step in self.record.items()}
        for step in steps.values():
            # It is a row of the training data, which may not be public.
            step.pop("first_row", None)
        # The paths in the run's record are among the known ones.
        record = without_paths(json.dumps(read_run(self.path) | {"steps": steps}, indent=1), places(self.path))
        data_ids = [repo_id for name, repo_id in self.ids.items() if is_data(self.folders[name])]
        model_ids = [repo_id for repo_id in self.ids.values() if repo_id not in data_ids]
        card = space_card(f"{self.name}: the report", model_ids, data_ids)
        own = {"run.json": to_bytes(record + "\n"), "README.md": to_bytes(card)}
        return [*data, *models, Repository(self.id_of(REPORT), "space", publishable(self.path / REPORT) | own)]

    @property
    def has_report(self) -> bool:
        """Whether there is a report to push."""
        return not self.repo_id and (self.path / REPORT / "index.html").exists()

    @cached_property
    def _license(self) -> tuple[Any, Any]:
        """Licence that all cards of the data agree on, unless `license` is set, and the first language in a card."""
        cards = [load_card(path).data for path in self.folders.values() if is_data(path)]
        licenses = [card.license for card in cards if card.license]
        license = licenses[0] if licenses and all(found == licenses[0] for found in licenses) else None
        return self.license or license, next((card.language for card in cards if card.language), None)

    def _model_files(self, output: str, source: Path) -> Files:
        """Return the files of a model or, if `source` is not its folder, of one of its checkpoints."""
        folder, trained = self.folders[output], self._trained(output)
        if source != folder:
            # The figures belong to the final model.
            trained = replace(trained, folder=source, metrics={}, evaluation={}, step={**trained.step, "seconds": None})
        ids = {self.folders[name]: found for name, found in self.ids.items()}
        ids |= {base: base_id for base, base_id in self.bases.values() if base_id}
        files = {path: file for path, file in publishable(source, ids).items() if not path.startswith(f"{BASE}/")}
        # Without a record of the run, use the card that the recipe wrote.
        if "README.md" in files and not trained.step:
            own = files["README.md"]
            text = own.decode() if isinstance(own, bytes) else own.read_text(encoding="utf-8")
            named = r'((model=|from_pretrained\()"|vllm serve |value_model_path: )[^"`\n]+'
            card = re.sub(named, rf"\1{trained.name}", text)
        else:
            card = model_card(trained)
        return files | {"README.md": to_bytes(card)}

    def _trained(self, output: str) -> Trained:
        step_name, step = output, {}
        for name, entry in self.record.items():
            written = Path(entry.get("values", {}).get("output_dir") or "")
            if written.name == output and not name.startswith("evaluate_"):
                step_name, step = name, entry
        kind = step_name.split("_")[1] if "_" in step_name else step_name
        settings = step.get("values", {})
        measured_on = self.record.get(f"evaluate_{output}", {}).get("values", {})
        # A card names repositories instead of folders, so that readers can follow its links and run its YAML anywhere:
        #
        #     model_name_or_path: runs/pocket/1_pretrain   ->   alice/pocket-1_pretrain
        #
        # Settings name directories as the YAML files do, even if the run is elsewhere.
        home = str(measured_on.get("home") or Path(str(settings.get("output_dir") or output)).parent)
        ids = {f"{home}/{name}{inner}": found for name, found in self.ids.items() for inner in ("", f"/{CRITIC}")}
        # Every model's repository contains the tokenizer.
        ids[f"{home}/tokenizer"] = next(self.ids[name] for name in self.ids if not is_data(self.folders[name]))
        license, language = self._license
        return Trained(
            *(self.folders[output], kind, self.id_of(output)),
            # A stage without its own file shares the settings of another stage.
            settings={} if kind in STAGES and STAGES[kind].file_of else settings,
            step=step,
            metrics=_read_newer(self.path / REPORT / "metrics.json", step),
            evaluation=_read_newer(self.path / "evaluations" / f"{output}.json", step),
            measured_on=measured_on,
            ids=ids,
            report=f"https://huggingface.co/spaces/{self.id_of(REPORT)}" if self.has_report else "",
            license=license,
            language=language,
        )


def _read_newer(path: Path, step: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object in a file written after a step had finished, or {} if the step has run again since."""
    finished = step.get("finished_at")
    if not path.exists() or (finished is None and "started_at" in step):
        return {}
    is_newer = finished is None or path.stat().st_mtime >= datetime.fromisoformat(str(finished)).timestamp()
    return read_json(path) if is_newer else {}


def is_data(path: Path) -> bool:
    """Return whether a directory is a data set repository."""
    return (path / "README.md").exists() and not (path / "config.json").exists() and any(path.rglob("*.parquet"))


def names_of_people(path: Path) -> list[str]:
    """Return the names that people entered in a data set of votes; none for other data."""
    if not (path / "votes.jsonl").exists():
        return []
    columns = (read_table(file, columns=["annotator"])["annotator"] for file in sorted(path.glob("*.parquet")))
    return sorted({str(name) for column in columns for name in column.unique().to_pylist()})
