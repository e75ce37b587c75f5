"""Cards of models, data and reports, which Hub users see first. Their text is in `templates/`."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import yaml
from huggingface_hub import CardData, DatasetCard, EvalResult, ModelCard, ModelCardData, SpaceCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline.errors import Problem, UserError
from pipeline.files import STATE, as_list, read_json, read_shapes, split_revision
from pipeline.hub.published_files import local_paths, public_settings, with_hub_ids, without_paths
from pipeline.stages import STAGES, find_baseline
from pipeline.stages.kinds import StageKind

Values = Mapping[str, Any]
# Folder of a policy that holds its critic.
CRITIC = "value_model"


@dataclass
class Trained:
    """A trained model, as far as its card describes it. The card omits what is missing.

    Attributes:
        folder: Folder of the model.
        kind: Kind of its stage, a key of `STAGES`.
        name: Hub id of the model or, if it is not pushed, its folder.
        settings: The settings of the stage in its YAML file and on the command line.
        step: Entry of the stage in run.json.
        metrics: Content of the run's metrics.json.
        evaluation: Content of evaluations/STAGE.json.
        measured_on: Settings of that evaluation.
        ids: Folder, as the settings name it -> Hub id.
        report: Address of the run's report, "" if it has none.
        license: Licence of the model.
        language: Languages of its data.
    """

    folder: Path
    kind: str
    name: str
    settings: Values = field(default_factory=dict)
    step: Values = field(default_factory=dict)
    metrics: Values = field(default_factory=dict)
    evaluation: Values = field(default_factory=dict)
    measured_on: Values = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    report: str = ""
    license: Any = None
    language: Any = None

    @property
    def about(self) -> StageKind:
        """The entry in `STAGES` for its kind, or an entry with only a name for an unknown kind."""
        return STAGES.get(self.kind, StageKind(name=self.kind))

    @property
    def task(self) -> str:
        """Its task in the Hub's terms, a `pipeline_tag`."""
        return "text-generation" if self.about.generates else "text-classification"

    def on_hub(self, name: Any) -> str | None:
        """Return the Hub id of what a setting names: a folder that is pushed, or a model or data set of the Hub.

        None means that the setting is not set, or names a folder that is not on the Hub.
        """
        if not isinstance(name, str) or not name:
            return None
        name, _ = split_revision(name)
        if name in self.ids:
            return self.ids[name]
        # A folder of the run is no Hub id, even if it does not exist on this machine.
        home = Path(str(self.settings.get("output_dir") or ".")).parent
        is_output = home != Path() and Path(name).is_relative_to(home)
        if is_output or Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return None
        return name

    def all_on_hub(self, field: str) -> list[str]:
        """Return the Hub ids of what a setting names, which may be a string, a list or None."""
        ids = [self.on_hub(name) for name in as_list(self.settings.get(field))]
        return [repo_id for repo_id in ids if repo_id]


def _render(template: str, data: CardData, **values: Any) -> str:
    """Return a card: its metadata, and the text from a file in `templates/`."""
    return f"---\n{data.to_yaml()}\n---\n\n{_TEMPLATES.get_template(template).render(values)}"


def fenced(code: str, language: str) -> str:
    """Return a block of code in Markdown, whose fence is longer than any in the code."""
    fence = max(["``", *re.findall("`+", code)], key=len) + "`"
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def _metric_text(entry: Any) -> str:
    """Return a metric and its interval, such as "0.750 [0.701, 0.794]"; empty if the entry has no number."""
    if not entry or entry.get("value") is None:
        return ""
    digits = 3 if abs(entry["value"]) < 10 else 1
    text = f"{entry['value']:.{digits}f}"
    if entry.get("ci95"):
        low, high = entry["ci95"]
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


_TEMPLATES = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
_TEMPLATES.loader = PackageLoader("pipeline.hub")
_TEMPLATES.filters |= {
    "fenced": fenced,
    "metric_text": _metric_text,
    "json": lambda text: json.dumps(text, ensure_ascii=False),
    "link": lambda name, kind="": f"[{name}](https://huggingface.co/{kind}{name})",
}
# Compile it before the runner forks for steps, each of which ends by writing such a card.
_TEMPLATES.get_template("model.md.jinja")


def model_card(trained: Trained) -> str:
    """Return the README.md of a model."""
    stage = trained.folder.name
    config = read_json(trained.folder / "config.json")
    adapter = read_json(trained.folder / "adapter_config.json")
    entries = _entries(trained)
    baselines = trained.metrics.get("baselines", {})
    # As in the YAML file, with Hub ids for what was pushed.
    settings = with_hub_ids(public_settings(trained.settings), trained.ids.get)
    card = _render(
        "model.md.jinja",
        _metadata(trained, entries, bool(adapter)),
        adapter=adapter,
        base=trained.on_hub(trained.settings.get("model_name_or_path")),
        baselines={
            name: (find_baseline(name), metrics)
            for name, metrics in baselines.items()
            if entries.keys() & metrics.keys()
        },
        columns=_columns(trained, entries),
        config=config,
        critic=CRITIC,
        has_critic=(trained.folder / CRITIC).is_dir(),
        datasets=trained.all_on_hub("dataset_name"),
        entries=entries,
        imports=_class_of_fourstage(config),
        judges=trained.all_on_hub("reward_model_path"),
        parameters=_count_parameters(trained.folder),
        stage=_stage_title(stage, trained.about.name),
        steps=read_json(trained.folder / STATE).get("global_step"),
        tokens=trained.metrics.get("tokens", {}).get(stage),
        trained=trained,
        yaml=_to_yaml(settings),
    )
    return str(ModelCard(without_paths(card, local_paths(trained.folder))))


def _to_yaml(settings: Values) -> str:
    """Return settings as YAML, "" if there are none."""
    if not settings:
        return ""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _entries(trained: Trained) -> dict[str, Values]:
    """Return the metrics of the stage that have a value, by name, including the metrics of lm-eval."""
    stage = trained.folder.name
    entries = {
        **trained.metrics.get("stages", {}).get(stage, {}),
        **trained.metrics.get("other", {}).get("lm_eval", {}).get(stage, {}),
    }
    return {metric: entry for metric, entry in entries.items() if entry.get("value") is not None}


def _metadata(trained: Trained, entries: Mapping[str, Values], is_adapter: bool) -> ModelCardData:
    """Return the metadata at the top of a card, which the Hub reads for its search and its pages."""
    results = [_result(trained, metric, entry) for metric, entry in entries.items()]
    model_name = None
    if results:
        # `ModelCardData` requires a name if there are results.
        model_name = trained.name.rsplit("/", 1)[-1]
    return ModelCardData(
        base_model=trained.on_hub(trained.settings.get("model_name_or_path")),
        datasets=trained.all_on_hub("dataset_name") or None,
        eval_results=results or None,
        language=trained.language,
        library_name="peft" if is_adapter else "transformers",
        license=trained.license,
        model_name=model_name,
        pipeline_tag=trained.task,
        tags=["fourstage", *trained.about.card.tags],
    )


def _columns(trained: Trained, entries: Mapping[str, Values]) -> dict[str, Values]:
    """Return the columns of the table of results: title -> entry of each metric.

    They are the stage, the stage that it started from, and the baselines. Columns without any metric of the stage are
    omitted.
    """
    stage = trained.folder.name
    stages = trained.metrics.get("stages", {})
    parent = Path(str(trained.settings.get("model_name_or_path") or "0_random")).name
    columns: dict[str, Values] = {f"`{stage}`": entries}
    if parent != stage:
        columns[f"`{parent}`"] = stages.get(parent, {})
    for name, metrics in trained.metrics.get("baselines", {}).items():
        columns[f"{name} (baseline)"] = metrics
    return {title: metrics for title, metrics in columns.items() if entries.keys() & metrics.keys()}


def _class_of_fourstage(config: Values) -> str:
    """Return the class of a model if it is one of `pipeline.models`, not of transformers; otherwise ""."""
    for name in config.get("architectures") or ():
        if name not in transformers.__all__:
            return str(name)
    return ""


def _count_parameters(folder: Path) -> int:
    """Return the number of parameters in the safetensors files of a folder."""
    total = 0
    for file in folder.glob("*.safetensors"):
        total += sum(math.prod(shape) for shape in read_shapes(file).values())
    return total


def _stage_title(stage: str, kind: str) -> str:
    """Return the first words of a card: "Stage 2, instruction tuning." for `2_sft`, "Instruction tuning." for `sft`."""
    number = re.match(r"\d+", stage)
    if number:
        return f"Stage {number.group()}, {kind.lower()}."
    return f"{kind.capitalize()}."


def _result(trained: Trained, metric: str, entry: Values) -> EvalResult:
    """Return a metric as the Hub's metadata describe it.

    `EvalResult` has no field for an interval, so it is among the metric's arguments, with the number of examples.
    """
    # Reports of earlier releases do not say on which data a metric was measured.
    about = trained.metrics.get("metrics", {}).get(metric, {})
    source = trained.measured_on.get(about.get("data")) or {}
    name = ", ".join(as_list(source.get("dataset_name") or []))
    # A metric of lm-eval is named `task:metric`.
    task, colon, metric_of_task = metric.partition(":")
    if colon:
        dataset = title = task
        split = None
    else:
        dataset = trained.on_hub(name) or Path(name or "held-out data").name
        title = dataset.rsplit("/", 1)[-1]
        split = "test_longer" if metric.endswith("_longer") else "test"
    return EvalResult(
        task_type=trained.task,
        dataset_type=dataset,
        dataset_name=title,
        dataset_config=source.get("dataset_config"),
        dataset_split=split,
        metric_type=metric_of_task or metric,
        metric_name=str(about.get("label", metric.replace("_", " "))),
        metric_value=entry["value"],
        metric_args={key: entry[key] for key in ("ci95", "n") if entry.get(key) is not None} or None,
    )


def base_card(name: str, trained: Trained) -> str:
    """Return the README.md of an adapter's base model that is not on the Hub, because it was merged from an adapter.

    Args:
        name: Hub id of the base model.
        trained: The adapter.
    """
    start = trained.on_hub(trained.settings.get("model_name_or_path"))
    tags = ["fourstage", *trained.about.card.tags]
    data = ModelCardData(base_model=start, license=trained.license, library_name="transformers", tags=tags)
    return _render("base.md.jinja", data, title=name.rsplit("/", 1)[-1], adapter=trained.name, start=start)


def load_card(folder: Path) -> DatasetCard:
    """Return the card of a folder of data, or an empty card if it has none.

    Raises:
        UserError: If the card cannot be read.
    """
    path = folder / "README.md"
    if not path.exists():
        return DatasetCard("---\n{}\n---\n")
    try:
        return DatasetCard.load(path)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(Problem("RUN", path, f"cannot be read as a data card ({reason}); correct it")) from None


def dataset_card(folder: Path, name: str, ids: Mapping[str, str], license: Any = None) -> str:
    """Return the README.md of a folder of data: the text of its own card, with a licence, tags and how to load it.

    Args:
        folder: The folder.
        name: Hub id of the data set.
        ids: Repositories of the run's outputs, by directory. The text names them instead of the directories.
        license: The licence. None keeps the licence in the folder's card.
    """
    card = load_card(folder)
    card.data.license = license or card.data.license
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), "fourstage"]))
    card.data.task_categories = card.data.task_categories or ["text-generation"]
    text = card.text.strip() or f"# {name.rsplit('/', 1)[-1]}"
    for output, repo_id in ids.items():
        # A path that ends in the directory, such as `runs/pocket/2_sft`.
        text = re.sub(rf"(?<![\w/.~-])[\w/.~-]*/{re.escape(output)}(?![\w/-])", repo_id, text)
    configs = [config["config_name"] for config in card.data.get("configs") or []]
    config = ""
    if configs and configs != ["default"]:
        # The example loads the first configuration.
        config = configs[0]
    return without_paths(_render("data.md.jinja", card.data, text=text, name=name, config=config), local_paths(folder))


def space_card(title: str, models: Sequence[str], datasets: Sequence[str]) -> str:
    """Return the README.md of a static Space that shows a report."""
    data = SpaceCardData(
        title=title, sdk="static", app_file="index.html", emoji="📈", colorFrom="blue", colorTo="indigo", pinned=False,
        models=list(models), datasets=list(datasets), tags=["fourstage"],
    )  # fmt: skip
    return _render("space.md.jinja", data, title=title, models=models)
