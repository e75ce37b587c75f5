"""How the stages of a run are measured: `evaluate.yaml`, completed with the data and settings of the stages themselves.

    problems: {dataset_name: gsm8k-test.jsonl, prompt_column: question, grade: math}
    limit: 200

The file is optional, and so is each key. Data that it does not name are the held-out rows of the stages' own data sets;
`null` omits them. The runner completes the file before training and records the result in `run.json`.

    evaluate.yaml ------- complete --> content ----- check, find_settings --> Settings.requested: EvaluationArguments
                            |
    stages of the run --> RunFacts ------------------ relocated ------------> Settings.facts: RunFacts

The content is a mapping until it has been checked, because it may have wrong keys and values. `run.json` and the steps
of the runner have content and facts in one mapping, the record.
"""

# `option` returns a field.
# ruff: noqa: RUF009

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipeline.data.arguments import DataArguments, option
from pipeline.files import as_list, read_json, read_run, relocate
from pipeline.rewards.table import NO_VERDICT
from pipeline.stages import HELD_OUT, OPPONENT, STAGES, kind_in_name, stage_order
from pipeline.stages.kinds import StageKind

FILE = "evaluate.yaml"
"""Name of the file in a recipe folder."""
BASE = "0_base"
"""Name for the model that the first stage starts from, if it does not come from a stage of the run."""
VOTES = "votes"
"""The judge that consists of people's votes."""
DEFAULT_LENGTH = 64
"""Maximum length of an answer in tokens if no stage sets one."""

TOOLS = ("tools", "environment")
"""Fields with the tools that a model may call."""
DIVISION_FIELDS = ("validation_share", "dataset_train_split", "dataset_streaming", "document", "keep_rows")
"""Fields that decide which rows of a data set are held out."""

Values = Mapping[str, Any]
Data = dict[str, Any] | str | None


@dataclass
class Source(DataArguments):
    """A data set to measure on: by default all rows of its split `test` or `validation`, or of its only split.

    If a stage trains on that only split, just the rows that it holds out are measured.
    """

    dataset_test_split: str = option("", "Split to measure on (default: test, validation, or the only one).")
    validation_share: float = option(0.0, "Share of a single split that training holds out.")
    grade: str | None = option(None, "exact, math, choice, code, a reward or module:function (default: exact or math).")


@dataclass
class EvaluationArguments:
    """The keys of `evaluate.yaml`. The first five name data, by the fields of `Source` or by `dataset_name` alone."""

    text: Data = option(None, "Text to predict, for bits_per_byte.")
    instructions: Data = option(None, "Conversations, or questions with answers.")
    problems: Data = option(None, "Problems with final answers, for pass@k.")
    prompts: Data = option(None, "Prompts of the win rate.")
    pairs: Data = option(None, "Pairs of answers, for reward_accuracy.")
    judge: str | None = option(None, "Judge of win rates: a reward model that PPO does not use, `votes` or a function.")
    against: str | None = option(None, "Opponent in the win rate (default: the last SFT).")
    elicit: list[str] | str | None = option(
        "Working:", "Beginning of elicited answers, or a list from which validation picks one (for other data: none)."
    )
    shots: int = option(0, "Solved training problems before each problem; tried as a further beginning.")
    best_of: list[int] | int = option(
        0, "Number of sampled answers (or several) from which PPO's reward model picks one, as a baseline."
    )
    fixed_prompts: list[str] | None = option(None, "Prompts that every stage answers.")
    limit: int | None = option(None, "Maximum number of examples for each measurement (default: some hundreds).")
    samples: int = option(8, "Answers sampled for each problem.")
    max_new_tokens: int | None = option(None, "Tokens of an answer (default: max_length, max_completion_length).")
    lm_eval_tasks: list[str] | None = option(None, "Tasks of lm-eval.")
    seed: int = option(0, "Seed of the sampled answers and of the intervals.")
    vllm: bool | None = option(None, "Sample answers with vLLM, on a GPU (default: no).")

    def source(self, key: str) -> dict[str, Any] | None:
        """Return the fields of `Source` of the data of a key, such as "text"; None if there are no such data."""
        source = getattr(self, key)
        if isinstance(source, str):
            return {"dataset_name": source}
        return source or None

    def without(self, key: str) -> Self:
        """Return the arguments without the data of a key."""
        nothing: dict[str, Any] = {key: None}
        return replace(self, **nothing)


SOURCE_FIELDS = tuple(item.name for item in fields(Source) if not item.name.startswith(("max_", "tokenizer_")))
DEFAULTS: dict[str, Any] = {
    item.name: item.default for item in fields(EvaluationArguments) if item.name not in HELD_OUT
}
"""Default values of the keys that do not name data."""


class TrainedStage(NamedTuple):
    """A stage of a run: the name of its directory, its kind, and the settings that it is trained with."""

    name: str
    kind: str
    values: Values

    @property
    def info(self) -> StageKind:
        """What is known about its kind."""
        return STAGES.get(self.kind, StageKind())


@dataclass(frozen=True)
class RunFacts:
    """What follows from the stages of a run, whatever `evaluate.yaml` says.

    Attributes:
        home: Directory that the stages write to, according to their settings; a run may have been moved since.
        trained_on: Key of evaluate.yaml, or name of a stage that trains on further data of the user -> the fields of
            `Source` with which the data are read.
        lengths: Key -> longest answer in tokens of the stage that trains on such data; None for TRL's default.
        against: Name of the stage that others are compared with, None if there is none.
        base: Folder or Hub id of the model that the run starts from, None if it starts from random weights.
        base_tokenizer: Folder or Hub id of that model's tokenizer, None if it is the model's own.
        reward_models: Folders of the models that PPO is trained to please.
        chat_template_kwargs: Name of a stage, or key -> arguments of the chat template.
        called: Key -> the `tools` and the `environment` with which models answer such data.
    """

    home: str
    trained_on: Mapping[str, Values] = field(default_factory=dict)
    lengths: Mapping[str, int | None] = field(default_factory=dict)
    against: str | None = None
    base: str | None = None
    base_tokenizer: str | None = None
    reward_models: Sequence[str] = field(default_factory=list)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    called: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of_stages(cls, stages: Iterable[tuple[str, str, Values]], home: Path) -> Self:
        """Derive the facts from the name, kind and settings of each stage, in order. They write to `home`."""
        run = [TrainedStage(*stage) for stage in stages]
        trained_on: dict[str, Values] = {}
        lengths: dict[str, int | None] = {}
        templates = _templates_of(run)
        called: dict[str, Any] = {}
        for key, stage in _stages_by_data(run).items():
            trained_on[key] = _with_common_division(_measured_source(key, stage.values), run)
            field_of_length = HELD_OUT[key].length
            if not field_of_length:
                continue
            lengths[key] = stage.values.get(field_of_length)
            if stage.name in templates:
                templates[key] = templates[stage.name]
            tools = {name: stage.values[name] for name in TOOLS if stage.values.get(name)}
            if tools:
                called[key] = tools
        trained_on |= _further_sources(run, trained_on, home)

        base = _base_of(run, home)
        opponents = [stage.name for stage in run if stage.kind == OPPONENT]
        against = None
        if opponents:
            against = opponents[-1]
        elif base:
            against = BASE
        reward_models: list[str] = []
        for stage in run:
            if stage.info.has_critic:
                reward_models += as_list(stage.values.get("reward_model_path") or [])
        return cls(
            home=str(home),
            trained_on=trained_on,
            lengths=lengths,
            against=against,
            base=base.get("model_name_or_path"),
            base_tokenizer=base.get("tokenizer_name_or_path"),
            reward_models=reward_models,
            chat_template_kwargs=templates,
            called=called,
        )

    def recorded_in(self, record: Values) -> Self:
        """Return a copy with the values of a record of `to_record`. Facts that the record lacks stay."""
        recorded = {item.name: record[item.name] for item in fields(self) if item.name in record}
        # `to_record` writes None for mappings that are empty.
        for name in ("chat_template_kwargs", "called"):
            if name in recorded:
                recorded[name] = recorded[name] or {}
        return replace(self, **recorded)

    def to_record(self) -> dict[str, Any]:
        """Return the facts as `run.json` has them."""
        record = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("chat_template_kwargs", "called"):
            record[name] = record[name] or None
        return record

    def template_for(self, stage: str, key: str) -> dict[str, Any]:
        """Return the chat template arguments for asking a stage the prompts of a key of `evaluate.yaml`."""
        # These are the stage's own. A stage without any, such as instruction tuning, is asked like the stage that
        # trains on such data; otherwise, a gain of that stage could be due to a different prompt.
        return self.chat_template_kwargs.get(stage) or self.chat_template_kwargs.get(key) or {}


FACTS = {item.name for item in fields(RunFacts)}
"""Keys of a record that do not come from `evaluate.yaml`, except for `against`, which the file may set."""


@dataclass(frozen=True)
class Settings:
    """How the stages of a run are measured.

    Attributes:
        run: Directory of the run.
        requested: What `evaluate.yaml` and the command ask for, completed with defaults.
        facts: What follows from the stages.
    """

    run: Path
    requested: EvaluationArguments
    facts: RunFacts

    @property
    def against(self) -> str:
        """Name of the stage that others are compared with, "" if there is none."""
        return self.requested.against or ""

    def model_of(self, stage: str) -> Path:
        """Return the directory of a stage's model; the model `0_base` may be anywhere, or on the Hub."""
        if stage == BASE and self.facts.base:
            return Path(self.facts.base)
        return self.run / stage


def _stages_by_data(run: Iterable[TrainedStage]) -> dict[str, TrainedStage]:
    """Return, by key of evaluate.yaml, the stage whose held-out rows all stages are measured on by default.

    Of several kinds of stages that train on data of a key, it is the last in the order of training. Keys on whose data
    no stage trains are absent.
    """
    # The last stage of each kind; but the first reward model, as PPO is trained with that one, and others are judges.
    last: dict[str, TrainedStage] = {}
    for stage in run:
        if stage.kind not in last or stage.info.generates:
            last[stage.kind] = stage
    stages = {}
    for key in HELD_OUT:
        candidates = [last[kind] for kind, info in STAGES.items() if info.held_out == key and kind in last]
        if candidates and candidates[-1].values.get("dataset_name"):
            stages[key] = candidates[-1]
    return stages


def _templates_of(run: Iterable[TrainedStage]) -> dict[str, Any]:
    """Return the chat template arguments (`chat_template_kwargs`) of each stage that has any, by its name."""
    templates: dict[str, Any] = {}
    for stage in run:
        arguments = stage.values.get("chat_template_kwargs")
        # They may be JSON, as on a command line. The stage itself reports invalid JSON.
        if isinstance(arguments, str):
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        if arguments and isinstance(arguments, dict):
            templates[stage.name] = arguments
    return templates


def _source_of(values: Values) -> dict[str, Any]:
    """Return how a stage reads its data, as the fields of `Source`."""
    source = {name: values[name] for name in SOURCE_FIELDS if values.get(name) is not None}
    # People's votes, which may be combined with preferences, have their own metric.
    names = as_list(source["dataset_name"])
    without_votes = [name for name in names if Path(str(name)).name != VOTES]
    names = without_votes or names
    source["dataset_name"] = names if len(names) > 1 else names[0]
    source.setdefault("validation_share", DataArguments.validation_share)
    # Training was evaluated on this split, perhaps to choose a checkpoint. A split `test` is better.
    if source.get("dataset_test_split") == DataArguments.dataset_test_split:
        del source["dataset_test_split"]
    return source


def _measured_source(key: str, values: Values) -> dict[str, Any]:
    """Return how a stage reads its data, and by which of its rewards held-out problems are graded, if by any."""
    source = _source_of(values)
    rewards = as_list(values.get("reward_funcs") or [])
    # By default, problems are graded as `exact_answer` and `math_answer` do.
    without_grade = ("exact_answer", "math_answer", *NO_VERDICT, "")
    if key == "problems" and rewards and rewards[0] not in without_grade:
        source["grade"] = rewards[0]
    return source


def _with_common_division(source: dict[str, Any], run: Iterable[TrainedStage]) -> dict[str, Any]:
    """Return the source of a stage, divided so that no stage trains on a row that is held out.

    Stages that read the same data set usually hold out the same rows. With shares of 1/20 and 1/8 they agree on every
    40th row, with a share of 0 on none; a stage that reads a stream divides only its first file.
    """
    places = _places_of(source)
    readers = []
    for stage in run:
        if stage.info.data and places & _places_of(stage.values):
            readers.append(stage.values)
    shares = [values.get("validation_share", DataArguments.validation_share) for values in readers]
    # Values of a wrong type are reported by the stage itself.
    are_shares = all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares)
    if are_shares and len(set(shares)) > 1:
        common = 0.0
        if all(shares):
            common = 1 / math.lcm(*(round(1 / share) for share in shares))
        source = {**source, "validation_share": common}
    if any(values.get("dataset_streaming") is True for values in readers):
        source = {**source, "dataset_streaming": True}
    return source


def _further_sources(run: Iterable[TrainedStage], measured: Mapping[str, Values], home: Path) -> dict[str, Values]:
    """Return the further data of the user that stages train on, by the name of the stage.

    They are not measured by default. If the user names them in `evaluate.yaml`, only their held-out rows are.
    """
    covered: set[tuple[str, str]] = set()
    for source in measured.values():
        covered |= _places_of(source)
    further: dict[str, Values] = {}
    for stage in run:
        if not stage.info.data or not stage.values.get("dataset_name"):
            continue
        source = _source_of(stage.values)
        names = [str(name) for name in as_list(source["dataset_name"])]
        of_the_user = [name for name in names if not Path(name).is_relative_to(home)]
        if any(_place(name, source) not in covered for name in of_the_user):
            further[stage.name] = _with_common_division(source, run)
    return further


def _base_of(run: Sequence[TrainedStage], home: Path) -> Values:
    """Return the settings of the stage with which the run starts from a finished model.

    That is the first stage that names a model. Return {} if another stage of the run writes that model, or if no stage
    names one.
    """
    written = {str(home / stage.name) for stage in run}
    starts = [stage.values for stage in run if stage.values.get("model_name_or_path")]
    if not starts or str(starts[0]["model_name_or_path"]) in written:
        return {}
    return starts[0]


def _place(name: object, source: Values) -> tuple[str, str]:
    """Return what identifies a data set: its path or Hub id, and its configuration."""
    return os.path.realpath(str(name)), str(source.get("dataset_config"))


def _places_of(source: Values) -> set[tuple[str, str]]:
    """Return what identifies each data set of a source, which may name several or none."""
    return {_place(name, source) for name in as_list(source.get("dataset_name") or [])}


def complete(content: Values, facts: RunFacts, only_named: bool = False) -> dict[str, Any]:
    """Return the content of an `evaluate.yaml`, completed with defaults and with what follows from the run.

    The file takes precedence over the stages, and the stages over the defaults.

    Args:
        content: The content of the file.
        facts: What follows from the stages.
        only_named: Whether to omit the data that stages train on unless the file names them.

    Returns:
        The content. A key of data has the fields of `Source`, or None if the data are omitted; it is absent if neither
        the file nor a stage has such data.
    """
    completed = DEFAULTS | dict(content)
    completed["against"] = content.get("against") or facts.against
    if isinstance(completed["lm_eval_tasks"], str):
        completed["lm_eval_tasks"] = [completed["lm_eval_tasks"]]
    for key in HELD_OUT:
        source = content.get(key)
        if isinstance(source, str):
            source = {"dataset_name": source}
        if isinstance(source, Mapping):
            completed[key] = _division_of(source, facts) | dict(source)
        elif key not in content and only_named:
            completed[key] = None
        elif key not in content and key in facts.trained_on:
            completed[key] = first_of(facts.trained_on[key])
    problems = completed.get("problems")
    if "elicit" not in content and isinstance(problems, Mapping):
        data = problems.get("dataset_name")
        if data and not Path(str(data)).is_relative_to(facts.home):
            # The default is how generated solutions begin, and does not suit other data.
            completed["elicit"] = None
    return completed


def _division_of(source: Values, facts: RunFacts) -> dict[str, Any]:
    """Return how a data set is divided by the stage that trains on it, as fields of `Source`; {} if none does.

    The stage may name the same file by another path. Only the rows that it holds out are measured.
    """
    place = _place(source.get("dataset_name"), source)
    for trained_on in facts.trained_on.values():
        if place in _places_of(trained_on):
            return {name: trained_on[name] for name in DIVISION_FIELDS if name in trained_on}
    return {}


def first_of(source: Values) -> dict[str, Any]:
    """Return the part of a stage's training data that is measured by default: the first of several data sets."""
    return {**source, "dataset_name": as_list(source["dataset_name"])[0]}


def to_record(content: Values, facts: RunFacts) -> dict[str, Any]:
    """Return completed content and the facts as one mapping, as `run.json` has them among the values of a step."""
    return {**DEFAULTS, **facts.to_record(), **content}


def from_record(record: Values) -> tuple[dict[str, Any], RunFacts]:
    """Return the content and the facts of a record."""
    facts = RunFacts(home=record["home"]).recorded_in(record)
    return {key: value for key, value in record.items() if key not in FACTS or key == "against"}, facts


def read_record(run: Path, stage: str) -> tuple[dict[str, Any], RunFacts]:
    """Return the content and the facts that the runner recorded for the evaluation of RUN/STAGE, or for another one.

    Facts that it did not record follow from the arguments that the stages left in their directories.
    """
    steps: dict[str, Any] = read_run(run).get("steps", {})
    record: dict[str, Any] = {}
    # All evaluations of a run have the same settings.
    for name in (f"evaluate_{stage}", *steps):
        if name in steps and name.startswith("evaluate_"):
            record = steps[name].get("values", {})
            break
    if not record.keys() >= FACTS:
        record = {**_facts_on_disk(run).to_record(), **record}
    content, facts = from_record(record)
    return complete(content, facts), facts


def _facts_on_disk(run: Path) -> RunFacts:
    """Return what follows from the arguments in the directories of a run's stages."""
    stages = []
    homes = []
    paths = {path.parent.name: path for path in run.glob("[0-9]*_*/arguments.json")}
    for name in sorted(paths, key=stage_order):
        values = read_json(paths[name])
        stages.append((name, kind_in_name(name), values))
        if values.get("output_dir"):
            homes.append(Path(values["output_dir"]).parent)
    home = homes[0] if homes else run
    return RunFacts.of_stages(stages, home)


def relocated(content: Values, facts: RunFacts, run: Path) -> tuple[dict[str, Any], RunFacts]:
    """Return content and facts in which the paths inside the run's `home` lie inside `run`, where it is now."""
    # The name of a stage is not a path.
    moved = {key: value if key == "against" else relocate(value, facts.home, run) for key, value in content.items()}
    paths = {}
    for item in fields(facts):
        if item.name != "against":
            paths[item.name] = relocate(getattr(facts, item.name), facts.home, run)
    return moved, replace(facts, **paths)


def find_settings(run: Path, content: Values, facts: RunFacts) -> Settings:
    """Return the settings of an evaluation in RUN, from content that has been checked, with the paths of RUN.

    Data that the content lacks may lie in RUN: stages may be run by hand, and later ones may not have run yet. These
    are RUN/data, as written by `recipes.data`, RUN/3_preferences, and a stage to compare with.
    """
    in_layout: dict[str, Any] = {}
    for key, held_out in HELD_OUT.items():
        if held_out.config and (run / "data" / held_out.config / "test.parquet").is_file():
            in_layout[key] = {"dataset_name": str(run / "data"), "dataset_config": held_out.config}
    if (run / "3_preferences" / "test.parquet").is_file():
        in_layout["pairs"] = {"dataset_name": str(run / "3_preferences")}
    opponents = [path.parent.name for path in run.glob(f"[0-9]*_{OPPONENT}*/*.json")]

    requested = {**in_layout, **content}
    requested["against"] = content.get("against") or max(opponents, key=stage_order, default=None)
    names = {item.name for item in fields(EvaluationArguments)}
    arguments = EvaluationArguments(**{name: value for name, value in requested.items() if name in names})
    return Settings(run, arguments, replace(facts, trained_on={**in_layout, **facts.trained_on}))


def named_code(record: Values) -> list[str]:
    """Return the user's code that settings name: functions, as `module:function`, and files of lm-eval's tasks."""
    functions = [record.get("judge")]
    for key in HELD_OUT:
        source = record.get(key)
        if isinstance(source, Mapping):
            functions.append(source.get("grade"))
    for tools in (record.get("called") or {}).values():
        functions += [*as_list(tools.get("tools") or []), tools.get("environment")]
    names = [name for name in functions if isinstance(name, str) and ":" in name]
    names += [task for task in as_list(record.get("lm_eval_tasks") or []) if is_task_file(str(task))]
    return list(dict.fromkeys(names))


def is_task_file(task: str) -> bool:
    """Return whether a task of lm-eval is a file, which may name functions, rather than one of lm-eval's own."""
    return os.sep in task or task.endswith((".yaml", ".yml"))
