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
from pipeline.hub.published_files import places, public_settings, rename, without_paths
from pipeline.stages import STAGES, find_baseline
from pipeline.stages.kinds import StageKind

Values = Mapping[str, Any]
# Folder of a policy that holds its critic.
CRITIC = "value_model"


@dataclass
class Trained:
    """The information for a model card. The card omits what is missing.

    `kind` is a key of `STAGES`, `name` a Hub id or folder, `step` an entry of run.json. `ids` maps folders to Hub ids.
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
        """What is known about its kind."""
        return STAGES.get(self.kind, StageKind(name=self.kind))

    def on_hub(self, name: Any) -> str | None:
        """Return the Hub id for a setting's value: the id of a folder that is pushed, or the value if it is an id."""
        if not isinstance(name, str) or not name:
            return None
        name, _ = split_revision(name)
        # The run's other directories need not exist on this machine.
        home = Path(str(self.settings.get("output_dir") or ".")).parent
        is_output = home != Path() and Path(name).is_relative_to(home)
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() and not is_output
        return self.ids.get(name) or (name if is_id else None)


def _render(template: str, data: CardData, **values: Any) -> str:
    """Return a card: its metadata, and the text from a file in `templates/`."""
    return f"---\n{data.to_yaml()}\n---\n\n{_TEMPLATES.get_template(template).render(values)}"


def fenced(code: str, language: str) -> str:
    """Return a block of code in Markdown, whose fence is longer than any in the code."""
    fence = max(["``", *re.findall("`+", code)], key=len) + "`"
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def _figure(entry: Any) -> str:
    """Return a metric and its interval, empty if the entry has no number."""
    if not entry or entry.get("value") is None:
        return ""
    digits, ends = 3 if abs(entry["value"]) < 10 else 1, entry.get("ci95")
    interval = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""
    return f"{entry['value']:.{digits}f}{interval}"


_TEMPLATES = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
_TEMPLATES.loader = PackageLoader("pipeline.hub")
_TEMPLATES.filters |= {
    "fenced": fenced,
    "figure": _figure,
    "json": lambda text: json.dumps(text, ensure_ascii=False),
    "link": lambda name, kind="": f"[{name}](https://huggingface.co/{kind}{name})",
}
# Compile it before the runner forks for steps, each of which ends by writing such a card.
_TEMPLATES.get_template("model.md.jinja")


def model_card(trained: Trained) -> str:
    """Return the README.md of a model."""
    about, settings, stage = trained.about, trained.settings, trained.folder.name
    config, adapter = (read_json(trained.folder / name) for name in ("config.json", "adapter_config.json"))
    measured = (trained.metrics.get("stages", {}), trained.metrics.get("other", {}).get("lm_eval", {}))
    found = {metric: entry for stages in measured for metric, entry in stages.get(stage, {}).items()}
    own = {metric: entry for metric, entry in found.items() if entry.get("value") is not None}
    results = [_result(trained, metric, entry) for metric, entry in own.items()]
    base = trained.on_hub(settings.get("model_name_or_path"))
    datasets, judges = (
        [repo_id for name in as_list(settings.get(field)) if (repo_id := trained.on_hub(name))]
        for field in ("dataset_name", "reward_model_path")
    )
    data = ModelCardData(
        base_model=base,
        datasets=datasets or None,
        eval_results=results or None,
        language=trained.language,
        library_name="peft" if adapter else "transformers",
        license=trained.license,
        model_name=trained.name.rsplit("/", 1)[-1] if results else None,
        pipeline_tag="text-generation" if about.generates else "text-classification",
        tags=["fourstage", *about.card.tags],
    )
    # The settings as in the YAML file, with Hub ids for what was pushed.
    shown = rename(public_settings(settings), trained.ids.get)
    # The columns of the table: the stage, the stage before it, and the baselines with the same metrics.
    stages, baselines = trained.metrics.get("stages", {}), trained.metrics.get("baselines", {})
    before = Path(str(settings.get("model_name_or_path") or "0_random")).name
    columns = {f"`{stage}`": own} | ({f"`{before}`": stages.get(before, {})} if before != stage else {})
    columns |= {f"{name} (baseline)": entries for name, entries in baselines.items()}
    weights = trained.folder.glob("*.safetensors")
    number = re.match(r"\d+", stage)
    card = _render(
        "model.md.jinja",
        data,
        **{"adapter": adapter, "base": base, "config": config, "datasets": datasets, "judges": judges, "entries": own},
        baselines={name: (find_baseline(name), of) for name, of in baselines.items() if own.keys() & of.keys()},
        columns={name: found for name, found in columns.items() if own.keys() & found.keys()},
        critic=CRITIC if (trained.folder / CRITIC).is_dir() else "",
        imports=next((name for name in config.get("architectures") or () if name not in transformers.__all__), ""),
        parameters=sum(math.prod(shape) for file in weights for shape in read_shapes(file).values()),
        stage=f"Stage {number.group()}, {about.name.lower()}." if number else f"{about.name.capitalize()}.",
        steps=read_json(trained.folder / STATE).get("global_step"),
        tokens=trained.metrics.get("tokens", {}).get(stage),
        trained=trained,
        yaml=yaml.safe_dump(shown, sort_keys=False, allow_unicode=True) if shown else "",
    )
    return str(ModelCard(without_paths(card, places(trained.folder))))


def _result(trained: Trained, metric: str, entry: Values) -> EvalResult:
    """Return a metric for the Hub. It has no field for intervals, so they are among the arguments."""
    # Reports of earlier releases do not say on which data a metric was measured.
    about = trained.metrics.get("metrics", {}).get(metric, {})
    source = trained.measured_on.get(about.get("data")) or {}
    name = ", ".join(as_list(source.get("dataset_name") or []))
    shown = trained.on_hub(name) or Path(name or "held-out data").name
    # A metric of lm-eval is named `task:metric`.
    task, colon, own = metric.partition(":")
    return EvalResult(
        task_type="text-generation" if trained.about.generates else "text-classification",
        dataset_type=task if colon else shown,
        dataset_name=task if colon else shown.rsplit("/", 1)[-1],
        dataset_config=source.get("dataset_config"),
        dataset_split=None if colon else "test_longer" if metric.endswith("_longer") else "test",
        metric_type=own or metric,
        metric_name=str(about.get("label", metric.replace("_", " "))),
        metric_value=entry["value"],
        metric_args={key: entry[key] for key in ("ci95", "n") if entry.get(key) is not None} or None,
    )


def base_card(name: str, trained: Trained) -> str:
    """Return the README.md of the base model `name` of an adapter: an earlier adapter, merged into its own base."""
    start = trained.on_hub(trained.settings.get("model_name_or_path"))
    tags = ["fourstage", *trained.about.card.tags]
    data = ModelCardData(base_model=start, license=trained.license, library_name="transformers", tags=tags)
    return _render("base.md.jinja", data, title=name.rsplit("/", 1)[-1], adapter=trained.name, start=start)


def load_card(folder: Path) -> DatasetCard:
    """Return the card of a folder of data, empty if it has none. Raise a `UserError` if it cannot be read."""
    path = folder / "README.md"
    try:
        return DatasetCard.load(path) if path.exists() else DatasetCard("---\n{}\n---\n")
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(Problem("RUN", path, f"cannot be read as a data card ({reason}); correct it")) from None


def dataset_card(folder: Path, name: str, ids: Mapping[str, str], license: Any = None) -> str:
    """Return the README.md of a folder of data: the text of its own card, with a licence, tags and how to load it.

    Other outputs of the run that the text names are replaced by their repositories, which `ids` has by directory.
    """
    card = load_card(folder)
    card.data.license = license or card.data.license
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), "fourstage"]))
    card.data.task_categories = card.data.task_categories or ["text-generation"]
    configs = [config["config_name"] for config in card.data.get("configs") or []]
    text = card.text.strip() or f"# {name.rsplit('/', 1)[-1]}"
    for output, found in ids.items():
        text = re.sub(rf"(?<![\w/.~-])[\w/.~-]*/{re.escape(output)}(?![\w/-])", found, text)
    chosen = configs[0] if configs and configs != ["default"] else ""
    return without_paths(_render("data.md.jinja", card.data, text=text, name=name, config=chosen), places(folder))


def space_card(title: str, models: Sequence[str], datasets: Sequence[str]) -> str:
    """Return the README.md of a static Space that shows a report."""
    data = SpaceCardData(
        title=title, sdk="static", app_file="index.html", emoji="📈", colorFrom="blue", colorTo="indigo", pinned=False,
        models=list(models), datasets=list(datasets), tags=["fourstage"],
    )  # fmt: skip
    return _render("space.md.jinja", data, title=title, models=models)
