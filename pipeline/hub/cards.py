"""The card of a model: what a reader of its repository on the Hub sees."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined
from safetensors import safe_open

from pipeline.files import read_json, split_revision
from pipeline.hub.contents import places, public_settings, without_paths
from pipeline.hub.stages import GENERAL, registration, uses
from pipeline.stages import BASELINES, HELD_OUT, STAGES, StageKind

Values = Mapping[str, Any]

CRITIC = "value_model"
SAMPLES = 4
LONGEST_SAMPLE = 400


@dataclass
class Trained:
    """What the card of a model is made from; whatever is missing is left out of the card.

    Attributes:
        folder: Its folder.
        kind: Kind of its stage, a key of `STAGES`.
        name: Its id on the Hub, or its folder.
        settings: What the YAML file and the command line set.
        command: The command that trained it.
        seconds: How long that took.
        machine: `hardware`, `versions` and `commit`, as in run.json.
        metrics: Content of the run's metrics.json.
        evaluation: Content of the stage's evaluation.
        measured_on: Settings of that evaluation.
        ids: Ids on the Hub of folders that the settings name, as they name them.
        report: Address of the run's report.
        license: Licence of the model.
        language: Languages of its data.
    """

    folder: Path
    kind: str
    name: str
    settings: Values = field(default_factory=dict)
    command: str = ""
    seconds: float | None = None
    machine: Values = field(default_factory=dict)
    metrics: Values = field(default_factory=dict)
    evaluation: Values = field(default_factory=dict)
    measured_on: Values = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)
    report: str = ""
    license: Any = None
    language: Any = None

    def at(self, checkpoint: Path) -> Trained:
        """Return what the card of a checkpoint is made from: the stage, without the figures of its final model."""
        return replace(self, folder=checkpoint, metrics={}, evaluation={}, seconds=None)

    @property
    def stage(self) -> str:
        """Name of its directory, by which metrics.json calls it."""
        return self.folder.name

    @property
    def about(self) -> StageKind:
        """What is known about its kind."""
        return STAGES.get(self.kind, StageKind(name=self.kind))

    @property
    def config(self) -> Values:
        """Content of its config.json."""
        return read_json(self.folder / "config.json")

    @property
    def adapter(self) -> Values:
        """Content of its adapter_config.json, empty if it is a whole model."""
        return read_json(self.folder / "adapter_config.json")

    def on_hub(self, name: Any) -> str | None:
        """Return the id of what a setting names: a folder that is pushed, or something else of the Hub."""
        if not isinstance(name, str) or not name:
            return None
        name, _ = split_revision(name)
        is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
        return self.ids.get(name) or (name if is_id and not self._is_output(name) else None)

    def _is_output(self, name: str) -> bool:
        """Return whether a name is that of another directory of the run, which need not exist on this machine."""
        home = Path(str(self.settings.get("output_dir") or ".")).parent
        return home != Path() and Path(name).is_relative_to(home)

    @property
    def datasets(self) -> list[str]:
        """Ids of the data sets that it was trained on."""
        names = self.settings.get("dataset_name")
        return [found for name in (names if isinstance(names, list) else [names]) if (found := self.on_hub(name))]


def model_card(trained: Trained) -> str:
    """Return the README.md of a model."""
    about, settings = trained.about, trained.settings
    base = trained.on_hub(settings.get("model_name_or_path"))
    results = list(_results(trained))
    text, title = about.card, about.name.lower()
    data = ModelCardData(
        base_model=base,
        datasets=trained.datasets or None,
        eval_results=results or None,
        language=trained.language,
        library_name="peft" if trained.adapter else "transformers",
        license=trained.license,
        model_name=trained.name.rsplit("/", 1)[-1] if results else None,
        pipeline_tag="text-generation" if about.generates else "text-classification",
        tags=["fourstage", *text.tags],
    )
    answers = _answers(trained, "answers", "prompt")
    prompt = answers[0][0] if answers else "What is an LLM?"
    number = re.match(r"\d+", trained.stage)
    stage = f"**Stage {number.group()}, {title}.** " if number else f"**{title.capitalize()}.** "
    body = (
        _environment()
        .get_template("model.md.jinja")
        .render(
            title=data.model_name or trained.name.rsplit("/", 1)[-1],
            summary=stage + text.summary,
            facts=dict(_facts(trained, base)),
            uses=uses(trained.kind, trained.name, bool(trained.adapter), prompt, registration(trained.config)),
            report=trained.report,
            table=_table(trained),
            remarks=list(_remarks(trained)),
            samples=_samples(trained),
            how=text.how,
            settings=_yaml(trained),
            command=trained.command,
            circumstances=dict(_circumstances(trained)),
            limits=[text.limit, GENERAL],
        )
    )
    card = f"---\n{data.to_yaml()}\n---\n\n{body}"
    return str(ModelCard(without_paths(card, places(trained.folder))))


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("pipeline.hub"), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["fenced"] = fenced
    return environment


def fenced(code: str, language: str) -> str:
    """Return a block of code in Markdown, whatever it contains."""
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def rename(value: Any, ids: Mapping[str, str]) -> Any:
    """Return settings with the folders that were pushed under their ids, but for the folder that was written."""
    if isinstance(value, Mapping):
        return {key: item if key == "output_dir" else rename(item, ids) for key, item in value.items()}
    if isinstance(value, list):
        return [rename(item, ids) for item in value]
    return ids.get(value, value) if isinstance(value, str) else value


def _yaml(trained: Trained) -> str:
    """Return the settings of a stage as its YAML file has them, with the ids of what was pushed."""
    settings = rename(public_settings(trained.settings), trained.ids)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip() if settings else ""


def _facts(trained: Trained, base: str | None) -> Iterator[tuple[str, str]]:
    start = trained.settings.get("model_name_or_path")
    if base:
        yield "Trained from", f"[{base}](https://huggingface.co/{base})"
    elif start:
        yield "Trained from", f"`{Path(str(start)).name}`, which was not pushed"
    elif trained.about.from_scratch:
        yield "Trained from", "random weights"
    if found := trained.datasets:
        config = trained.settings.get("dataset_config")
        links = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in found)
        yield "Data", links + (f", configuration `{config}`" if config else "")
    rewards = trained.settings.get("reward_model_path")
    for reward in rewards if isinstance(rewards, list) else [rewards]:
        if found_reward := trained.on_hub(reward):
            yield STAGES["reward"].name, f"[{found_reward}](https://huggingface.co/{found_reward})"
    if names := trained.settings.get("reward_funcs"):
        yield "Reward functions", ", ".join(f"`{name}`" for name in ([names] if isinstance(names, str) else names))
    parameters = count_parameters(trained.folder)
    if parameters:
        yield "Parameters", f"{parameters:,}" + (" (the adapter)" if trained.adapter else "")
    config = trained.config
    if config.get("model_type"):
        context = config.get("max_position_embeddings")
        yield "Architecture", f"{config['model_type']}" + (f", context of {context} tokens" if context else "")
    if (trained.folder / CRITIC).is_dir():
        yield "Critic", f"in `{CRITIC}/`, for resuming PPO or starting another one"


def count_parameters(folder: Path) -> int:
    """Return the number of weights in a folder's safetensors files."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (it is not a mapping)
                size = 1
                for length in file.get_slice(key).get_shape():
                    size *= length
                total += size
    return total


def _estimates(trained: Trained) -> Iterator[tuple[str, Values]]:
    """Yield the metrics of a stage that have a value, those of lm-eval included."""
    for above in (("stages",), ("other", "lm_eval")):
        for metric, entry in _inner(trained.metrics, *above, trained.stage).items():
            if isinstance(entry, Mapping) and isinstance(entry.get("value"), int | float) and isfinite(entry["value"]):
                yield metric, entry


def _label(trained: Trained, metric: str) -> str:
    return str(_inner(trained.metrics, "metrics", metric).get("label", metric.replace("_", " ")))


def _inner(values: Any, *keys: str) -> Values:
    """Return a mapping inside mappings, empty if it is missing or, as in a damaged file, something else."""
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values if isinstance(values, Mapping) else {}


def _answers(trained: Trained, key: str, question: str) -> list[tuple[str, str]]:
    """Return what an evaluation recorded under a key: each question with its answer."""
    found = trained.evaluation.get(key)
    records = [record for record in found if isinstance(record, Mapping)] if isinstance(found, list) else []
    return [(str(one[question]), str(one["answer"])) for one in records if {question, "answer"} <= set(one)]


def _results(trained: Trained) -> Iterator[EvalResult]:
    """Yield what the Hub shows of a model's metrics. It has no field for intervals; they are among the arguments."""
    for metric, entry in _estimates(trained):
        key = next((key for key, held_out in HELD_OUT.items() if metric.startswith(held_out.metrics)), "")
        source = trained.measured_on.get(key) or {}
        name = source.get("dataset_name")
        name = ", ".join(name) if isinstance(name, list) else name
        shown = trained.on_hub(name) or Path(str(name or "held-out data")).name
        task, colon, own = metric.partition(":")  # of lm-eval
        yield EvalResult(
            task_type="text-generation" if trained.about.generates else "text-classification",
            dataset_type=task if colon else shown,
            dataset_name=task if colon else shown.rsplit("/", 1)[-1],
            dataset_config=source.get("dataset_config"),
            dataset_split=None if colon else "test_longer" if metric.endswith("_longer") else "test",
            metric_type=own or metric,
            metric_name=_label(trained, metric),
            metric_value=entry["value"],
            metric_args={key: entry[key] for key in ("ci95", "n") if entry.get(key) is not None} or None,
        )


def _table(trained: Trained) -> str:
    """Return the metrics of a stage beside those of the stage before it and of the baselines that have them."""
    own = dict(_estimates(trained))
    stages, baselines = _inner(trained.metrics, "stages"), _inner(trained.metrics, "baselines")
    before = Path(str(trained.settings.get("model_name_or_path") or "0_random")).name
    columns = {f"`{trained.stage}`": own}
    if before != trained.stage and set(own) & set(_inner(stages, before)):
        columns[f"`{before}`"] = stages[before]
    columns |= {f"{name} (baseline)": baselines[name] for name in baselines if set(own) & set(_inner(baselines, name))}
    if not own:
        return ""
    lines = [["metric", *columns, "rows"], ["---"] + ["---:"] * (len(columns) + 1)]
    for metric, entry in own.items():
        cells = [_figure(found.get(metric)) for found in columns.values()]
        better = _inner(trained.metrics, "metrics", metric).get("better")
        label = _label(trained, metric).replace("|", "\\|") + {"up": " ↑", "down": " ↓"}.get(str(better), "")
        lines.append([label, *cells, str(entry.get("n") or "")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _figure(entry: Any) -> str:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("value"), int | float):
        return ""
    digits = 3 if abs(entry["value"]) < 10 else 1
    shown, ends = f"{entry['value']:.{digits}f}", entry.get("ci95")
    if isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends):
        shown += f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"
    return shown


def _remarks(trained: Trained) -> Iterator[str]:
    own, against = dict(_estimates(trained)), trained.evaluation.get("against") or "the stage before it"
    for name, entry in _inner(trained.metrics, "baselines").items():
        if isinstance(entry, Mapping) and set(own) & set(entry) and name in BASELINES:
            yield f"{name}: " + BASELINES[name].card.format(against=against, text=entry.get("text", ""))
    if "win_rate" in own:
        judge = trained.evaluation.get("judge") or trained.metrics.get("judge") or "annotators"
        yield f"Win rates are those against `{against}`, judged by {judge}; 0.5 is as good."
    for data, count in _inner(trained.evaluation, "cut_off").items():
        if isinstance(count, Mapping) and {"cut off", "answers", "limit"} <= set(count) and count["cut off"]:
            yield f"{data}: {count['cut off']} of {count['answers']} answers were cut off at {count['limit']} tokens"
    if isinstance(left_out := trained.evaluation.get("left_out"), list):
        yield from map(str, left_out)


def _samples(trained: Trained) -> str:
    """Return some prompts and problems, each with the model's answer."""
    pairs = _answers(trained, "answers", "prompt")[:SAMPLES]
    pairs += _answers(trained, "traces", "problem")[: SAMPLES // 2]
    shown = [
        f"> {prompt.strip()}\n{answer[:LONGEST_SAMPLE].strip()}{' …' * (len(answer) > LONGEST_SAMPLE)}"
        for prompt, answer in pairs
    ]
    return "\n\n".join(shown)


def _circumstances(trained: Trained) -> Iterator[tuple[str, str]]:
    state = read_json(trained.folder / "trainer_state.json")
    if isinstance(steps := state.get("global_step"), int) and steps > 0:
        yield "Optimizer steps", f"{steps:,}"
    if isinstance(tokens := _inner(trained.metrics, "tokens").get(trained.stage), int) and tokens:
        yield "Tokens", f"{tokens:,}"
    if trained.seconds and trained.seconds >= 1:
        yield "Time", f"{trained.seconds:,.0f} s"
    hardware = trained.machine.get("hardware") or {}
    if hardware:
        parts = (hardware.get("gpu"), hardware.get("processor"), f"{hardware['cores']} cores" * ("cores" in hardware))
        yield "Hardware", ", ".join(filter(None, [*parts, hardware.get("system")]))
    if versions := trained.machine.get("versions"):
        yield "Versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if commit := trained.machine.get("commit"):
        yield "Commit", f"`{commit}`"
