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
from pipeline.files import BASE, as_list, holds_model, is_missing_path, read_json, read_run
from pipeline.hub.cards import CRITIC, Trained, base_card, dataset_card, load_card, model_card, space_card
from pipeline.hub.published_files import Files, local_paths, public_settings, publishable, to_bytes, without_paths
from pipeline.hub.upload import retry
from pipeline.stages import HELD_OUT, STAGES

REPORT = "report"
# Directories of a run that are not outputs of stages.
NOT_OUTPUTS = (REPORT, "evaluations", "logs")
# Maximum number of characters that the Hub allows in the name of a repository.
LONGEST_NAME = 96


@dataclass
class Repository:
    """The contents of a repository.

    Attributes:
        id: Its id, `NAME/repo`.
        type: "model", "dataset" or "space".
        files: Its files on the branch that is pushed to.
        checkpoints: The files of each checkpoint, by branch, such as "step-1000".
    """

    id: str
    type: str
    files: Files
    checkpoints: dict[str, Files] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """The base model of an adapter whose adapter_config.json names a folder, not a Hub id.

    Attributes:
        folder: Folder of the base model.
        repo_id: Its Hub id, None if it is not on the Hub.
        is_merged: Whether it was merged from an earlier adapter, and lies in the folder of the new one. It is then
            pushed with the new adapter.
    """

    folder: Path
    repo_id: str | None
    is_merged: bool = False


@dataclass
class Outputs:
    """The output directories of a run, or one of them, and the repositories that they are pushed to.

    Attributes:
        path: Directory of the run; for a single output directory, the directory around it.
        namespace: User or organization that the run is pushed to.
        repo_id: Repository of a single output directory; empty for a run.
        only: Names of the directories that are pushed. None pushes all of them, and the report.
        license: Licence of models and data. None stands for the licence in the cards of the data.
        checkpoints: Whether checkpoints are pushed, too.
        api: Client of the Hub, which looks for earlier pushes. None makes no request.
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
        if re.fullmatch(r"seed\d+", path.name):
            return f"{path.parent.name}-{path.name}"
        return path.name

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The output directories with a finished model or data, by name."""
        paths = [path for path in sorted(self.path.iterdir()) if path.name not in NOT_OUTPUTS and path.name[0] != "."]
        # Unrelated folders may lie next to a single output directory.
        if self.repo_id and not self.record:
            paths = [path for path in paths if path.name in (self.only or ())]
        return {path.name: path.resolve() for path in paths if is_data(path) or holds_model(path)}

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The entries of the steps in run.json, empty if there is none."""
        return read_run(self.path).get("steps", {})

    @cached_property
    def is_smoke(self) -> bool:
        """Whether the run is a miniature of `run --smoke`."""
        return bool(read_run(self.path).get("smoke"))

    @cached_property
    def local_data(self) -> list[str]:
        """The files and folders outside of the run that the stages are measured on, whose rows the report shows."""
        names: list[str] = []
        for step in self.record.values():
            values = step.get("values", {})
            # Only the settings of an evaluation have a home, the folder that the run was written to.
            home = values.get("home")
            if not home:
                continue
            for source in [values[key] for key in HELD_OUT if isinstance(values.get(key), Mapping)]:
                dataset_names = [str(name) for name in as_list(source.get("dataset_name") or [])]
                names += [name for name in dataset_names if not Path(name).is_relative_to(home)]
        # Any other name is an id on the Hub, whose rows are public already.
        return [name for name in dict.fromkeys(names) if Path(name).exists() or is_missing_path(name)]

    @cached_property
    def ids(self) -> dict[str, str]:
        """Name of an output directory -> its repository; only directories that are pushed now or were pushed before."""
        if self.repo_id:
            return dict.fromkeys(self.only or (), self.repo_id)
        return {name: self.id_of(name) for name in self.folders if self._is_selected(name) or self._is_on_hub(name)}

    def _is_selected(self, output: str) -> bool:
        """Return whether an output directory is to be pushed."""
        if self.only is None:
            return output not in self.unpublished
        return output in self.only

    @cached_property
    def unpublished(self) -> list[str]:
        """Names of the data sets that may not be pushed: all of a run, if one of their cards has `publish: false`.

        The data that stages write, such as pairs, contain rows of the data that the run began with.
        """
        data = [name for name, folder in self.folders.items() if is_data(folder)]
        if any(load_card(self.folders[name]).data.get("publish") is False for name in data):
            return data
        return []

    def _is_on_hub(self, output: str) -> bool:
        """Return whether the repository of an output directory exists; False if no request is made."""
        if self.api is None:
            return False
        kind = "dataset" if is_data(self.folders[output]) else "model"
        return retry(partial(self.api.repo_exists, self.id_of(output), repo_type=kind))

    def id_of(self, output: str) -> str:
        """Return the repository of an output directory or of the report: `NAME/RUN-OUTPUT`."""
        if self.repo_id:
            return self.repo_id
        # The name of the run is shortened to leave room for the output.
        run_name = self.name[: max(LONGEST_NAME - 1 - len(output), 1)]
        name = re.sub(r"(?:[^A-Za-z0-9_.]|\.\.)+", "-", f"{run_name}-{output}")
        return f"{self.namespace}/{name[:LONGEST_NAME].strip('-.')}"

    @cached_property
    def selected(self) -> list[str]:
        """Names of the output directories to push.

        Raises:
            UserError: If one that `only` names is not finished, or may not be published, or if there are none.
        """
        option = "RUN" if self.repo_id else "--stage"
        missing = [name for name in self.only or () if name not in self.folders]
        if missing:
            remedy = f"is not a finished model or data set; choose from: {', '.join(self.folders) or 'nothing yet'}"
            raise UserError(*(Problem(option, name, remedy) for name in missing))
        unpublished = [name for name in self.only or () if name in self.unpublished]
        if unpublished:
            remedy = "contains texts that are not to be published: a card of the run's data says `publish: false`"
            raise UserError(*(Problem(option, name, remedy) for name in unpublished))
        selected = [name for name in self.folders if self._is_selected(name)]
        if not selected:
            remedy = f"contains neither a finished model nor data; run it first with `{as_typed('run', 'RECIPE')}`"
            raise UserError(Problem("RUN", self.path, remedy))
        return selected

    @cached_property
    def bases(self) -> dict[str, Base]:
        """Name of an adapter's directory -> its base model, for adapters that name a folder as their base model."""
        bases: dict[str, Base] = {}
        for name, folder in self.folders.items():
            base = Path(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
            if base.name == BASE and holds_model(folder / BASE):
                bases[name] = Base(base, f"{self.id_of(name)}-{BASE}", is_merged=True)
            elif base.is_absolute():
                # The base model is a stage of this run, which may have been moved, or lies in the cache of the Hub's
                # client: ~/.cache/huggingface/hub/models--Qwen--Qwen2.5-0.5B/snapshots/060db6/
                repo_id = self.ids.get(base.name)
                if match := re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"{base}/"):
                    repo_id = f"{match[1]}/{match[2]}"
                bases[name] = Base(base, repo_id)
        return bases

    def repositories(self) -> list[Repository]:
        """Return what is pushed: first data sets, which the cards of the models name, then models, then the report."""
        datasets: list[Repository] = []
        models: list[Repository] = []
        for name in self.selected:
            if is_data(self.folders[name]):
                datasets.append(self._dataset(name))
                continue
            base = self.bases.get(name)
            if base is not None and base.is_merged:
                models.append(self._merged_base(name, str(base.repo_id)))
            models.append(self._model(name))
        if self.has_report and self.only is None:
            return [*datasets, *models, self._space()]
        return datasets + models

    @property
    def has_report(self) -> bool:
        """Whether there is a report to push."""
        return not self.repo_id and (self.path / REPORT / "index.html").exists()

    @cached_property
    def _license_and_language(self) -> tuple[Any, Any]:
        """The licence and the language of the models.

        The licence is `license`, or the one that all cards of the data agree on, if any. The language is the first one
        in a card of the data. Each is None if there is none.
        """
        cards = [load_card(path).data for path in self.folders.values() if is_data(path)]
        language = next((card.language for card in cards if card.language), None)
        if self.license:
            return self.license, language
        licenses = [card.license for card in cards if card.license]
        if licenses and all(license == licenses[0] for license in licenses):
            return licenses[0], language
        return None, language

    def _dataset(self, output: str) -> Repository:
        """Return the repository of a data set."""
        folder = self.folders[output]
        repo_id = self.id_of(output)
        license, _ = self._license_and_language
        # Data are published unchanged: only models and reports contain paths.
        files: Files = {path: folder / path for path in publishable(folder)}
        files["README.md"] = to_bytes(dataset_card(folder, repo_id, self.ids, license))
        return Repository(repo_id, "dataset", files)

    def _merged_base(self, output: str, repo_id: str) -> Repository:
        """Return the repository `repo_id` of the merged base model of an adapter.

        It has a repository of its own, because PEFT does not look for it in a subfolder of the adapter's.
        """
        files = publishable(self.folders[output] / BASE)
        files["README.md"] = to_bytes(base_card(repo_id, self._trained(output)))
        return Repository(repo_id, "model", files)

    def _model(self, output: str) -> Repository:
        """Return the repository of a model, with a branch for each checkpoint if those are pushed, too."""
        folder = self.folders[output]
        branches: dict[str, Files] = {}
        if self.checkpoints:
            for checkpoint in sorted(filter(holds_model, folder.glob("checkpoint-*"))):
                step = checkpoint.name.rpartition("-")[2]
                branches[f"step-{step}"] = self._model_files(output, checkpoint)
        files = self._model_files(output, folder)
        return Repository(self.id_of(output), "model", files, branches)

    def _model_files(self, output: str, source: Path) -> Files:
        """Return the files in `source`, the folder of the model `output` or of one of its checkpoints, with a card."""
        trained = self._trained(output)
        if source != self.folders[output]:
            # Metrics and training time belong to the final model, not to a checkpoint.
            step = {**trained.step, "seconds": None}
            trained = replace(trained, folder=source, metrics={}, evaluation={}, step=step)
        ids = {self.folders[name]: repo_id for name, repo_id in self.ids.items()}
        ids |= {base.folder: base.repo_id for base in self.bases.values() if base.repo_id}
        files = publishable(source, ids)
        files = {path: content for path, content in files.items() if not path.startswith(f"{BASE}/")}
        # Without a record of the run, use the card that the recipe wrote.
        if "README.md" in files and not trained.step:
            card = _with_name(files["README.md"], trained.name)
        else:
            card = model_card(trained)
        return files | {"README.md": to_bytes(card)}

    def _space(self) -> Repository:
        """Return the Space that shows the report. Its run.json is a copy of the run's, without secrets and paths."""
        steps = {}
        for name, step in self.record.items():
            steps[name] = step | {"values": public_settings(step.get("values", {}))}
            # A row of the training data, which may not be public.
            steps[name].pop("first_row", None)
        record = json.dumps(read_run(self.path) | {"steps": steps}, indent=1)
        datasets = [repo_id for name, repo_id in self.ids.items() if is_data(self.folders[name])]
        models = [repo_id for repo_id in self.ids.values() if repo_id not in datasets]
        files = publishable(self.path / REPORT)
        # The paths in the run's record are among the local ones.
        files["run.json"] = to_bytes(without_paths(record, local_paths(self.path)) + "\n")
        files["README.md"] = to_bytes(space_card(f"{self.name}: the report", models, datasets))
        return Repository(self.id_of(REPORT), "space", files)

    def _trained(self, output: str) -> Trained:
        """Return the model in an output directory, with what its card says about it."""
        step_name, step = self._step_of(output)
        kind = step_name.split("_")[1] if "_" in step_name else step_name
        settings = step.get("values", {})
        measured_on = self.record.get(f"evaluate_{output}", {}).get("values", {})
        # The run's directory as the settings name it. The run may have been moved since.
        home = measured_on.get("home") or Path(str(settings.get("output_dir") or output)).parent
        license, language = self._license_and_language
        trained = Trained(
            folder=self.folders[output],
            kind=kind,
            name=self.id_of(output),
            settings=settings,
            step=step,
            metrics=_read_newer(self.path / REPORT / "metrics.json", step),
            evaluation=_read_newer(self.path / "evaluations" / f"{output}.json", step),
            measured_on=measured_on,
            ids=self._ids_in_settings(str(home)),
            license=license,
            language=language,
        )
        if kind in STAGES and STAGES[kind].file_of:
            # A stage without a file of its own has the settings of another stage, which its card does not show.
            trained.settings = {}
        if self.has_report:
            trained.report = f"https://huggingface.co/spaces/{self.id_of(REPORT)}"
        return trained

    def _step_of(self, output: str) -> tuple[str, Mapping[str, Any]]:
        """Return the name and the entry in run.json of the step that wrote an output directory.

        Without an entry, the name is that of the directory, and the entry is empty.
        """
        step_name: str = output
        step: Mapping[str, Any] = {}
        for name, entry in self.record.items():
            output_dir = Path(entry.get("values", {}).get("output_dir") or "")
            if output_dir.name == output and not name.startswith("evaluate_"):
                step_name, step = name, entry
        return step_name, step

    def _ids_in_settings(self, home: str) -> dict[str, str]:
        """Return folder, as the settings name it -> repository. `home` is the run's directory in the settings.

        A card names repositories instead of folders, so that readers can follow its links and run its YAML anywhere:

            model_name_or_path: runs/pocket/1_pretrain   ->   alice/pocket-1_pretrain
        """
        ids: dict[str, str] = {}
        for name, repo_id in self.ids.items():
            ids[f"{home}/{name}"] = repo_id
            ids[f"{home}/{name}/{CRITIC}"] = repo_id
        # Every model's repository contains the tokenizer.
        ids[f"{home}/tokenizer"] = next(self.ids[name] for name in self.ids if not is_data(self.folders[name]))
        return ids


def _with_name(card: Path | bytes, name: str) -> str:
    """Return the text of a model card in which the examples load the model from the Hub, as `name`."""
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    loads = r'((model=|from_pretrained\()"|vllm serve |value_model_path: )[^"`\n]+'
    return re.sub(loads, rf"\1{name}", text)


def _read_newer(path: Path, step: Mapping[str, Any]) -> dict[str, Any]:
    """Return the JSON object in a file that was written after a step had finished.

    Return {} if there is no such file or the step has run again since, so that the file is about an earlier model. If
    the times of the step are unknown, as without a record of the run, the file counts as newer.

    Args:
        path: The file.
        step: The entry of the step in run.json.
    """
    if not path.exists():
        return {}
    finished = step.get("finished_at")
    if finished is None:
        if "started_at" in step:
            # The step is running, or was interrupted.
            return {}
        return read_json(path)
    if path.stat().st_mtime < datetime.fromisoformat(str(finished)).timestamp():
        return {}
    return read_json(path)


def is_data(path: Path) -> bool:
    """Return whether a directory contains a data set with a card, and no model."""
    return (path / "README.md").exists() and not (path / "config.json").exists() and any(path.rglob("*.parquet"))


def names_of_people(path: Path) -> list[str]:
    """Return the names that people entered in a data set of votes; none for other data."""
    if not (path / "votes.jsonl").exists():
        return []
    names: set[str] = set()
    for file in sorted(path.glob("*.parquet")):
        annotators = read_table(file, columns=["annotator"])["annotator"]
        names.update(map(str, annotators.unique().to_pylist()))
    return sorted(names)
