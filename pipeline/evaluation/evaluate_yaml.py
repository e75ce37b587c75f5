"""How the stages of a run are measured: `evaluate.yaml`, completed with the data and settings of the stages themselves.

    problems: {dataset_name: gsm8k-test.jsonl, prompt_column: question, grade: math}
    limit: 200

The file is optional, and so is each key. Data that it does not name are the held-out rows of the stages' own data sets;
`null` omits them. The runner completes the file before training and records the result in `run.json`.
"""

# `option` returns a field.
# ruff: noqa: RUF009

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipeline.data.arguments import DataArguments, option
from pipeline.errors import Problem, collect
from pipeline.files import as_list, is_missing_path, read_json, read_run, relocate
from pipeline.stages import HELD_OUT, OPPONENT, STAGES

FILE = "evaluate.yaml"
"""Name of the file in a recipe folder."""
BASE = "0_base"
"""Name for the model that the first stage starts from, if it does not come from a stage of the run."""
VOTES = "votes"
"""The judge that consists of people's votes."""
DEFAULT_LENGTH = 64
"""Maximum length of an answer in tokens if no stage sets one."""

GRADES = {"exact": "exact_answer", "math": "math_answer", "choice": "choice", "code": "code_tests"}
"""Short names of rewards that grade answers."""
ADDED = "chat_template_kwargs"
"""A key of completed settings that runs of earlier releases lack."""
CALLED = "called"
"""Key of completed settings: the tools that models may call, by the key of the data that they answer."""
DERIVED = ("home", "trained_on", "lengths", "against", "base", "base_tokenizer", "reward_models", ADDED, CALLED)
"""Keys of completed settings that follow from the stages; `evaluate.yaml` may also set `against`."""

TOOLS = ("tools", "environment")
"""Fields with the tools that a model may call."""
MAX_SAMPLES = 1000

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


SOURCE_FIELDS = tuple(item.name for item in fields(Source) if not item.name.startswith(("max_", "tokenizer_")))
DEFAULTS: dict[str, Any] = {one.name: one.default for one in fields(EvaluationArguments) if one.name not in HELD_OUT}
"""Default values of the keys that do not name data."""


def derive(stages: Iterable[tuple[str, str, Values]], home: Path) -> dict[str, Any]:
    """Derive from the settings of a run's stages how it is measured: the values of `DERIVED`.

    `stages` has the directory name, kind and settings of each, in order. Their paths refer to `home`, where they write.
    """
    stages = list(stages)
    last: dict[str, tuple[str, Values]] = {}
    templates: dict[str, Any] = {}
    for name, kind, values in stages:
        # The first reward model is the one that PPO is trained with; any other is a judge.
        if kind not in last or kind not in STAGES or STAGES[kind].generates:
            last[kind] = (name, values)
        template = values.get(ADDED)
        # It may be JSON, as on a command line. The stage itself reports invalid JSON.
        with contextlib.suppress(ValueError):
            template = json.loads(template) if isinstance(template, str) else template
        if template and isinstance(template, dict):
            templates[name] = template

    trained_on: dict[str, Any] = {}
    lengths: dict[str, Any] = {}
    called: dict[str, Any] = {}
    for key, held_out in HELD_OUT.items():
        # The last kind, in the order of training, whose own data serve this purpose.
        kinds = [kind for kind, about in reversed(STAGES.items()) if about.held_out == key and kind in last]
        name, values = last[kinds[0]] if kinds else ("", {})
        if not values.get("dataset_name"):
            continue
        source = _source_of(values)
        reward = next(iter(as_list(values.get("reward_funcs") or [])), "")
        if key == "problems" and reward not in ("exact_answer", "math_answer", "answer_format", "hidden_taste", ""):
            source["grade"] = reward
        trained_on[key] = _agree(source, stages)
        if held_out.length:
            lengths[key] = values.get(held_out.length)
            templates |= {key: templates[name]} if name in templates else {}
            called |= {key: given} if (given := {name: values[name] for name in TOOLS if values.get(name)}) else {}

    # Other data of the user that stages train on may not be measured either.
    covered = {_place(name, source) for source in trained_on.values() for name in as_list(source["dataset_name"])}
    for name, kind, values in stages:
        if kind in STAGES and STAGES[kind].data and values.get("dataset_name"):
            source = _source_of(values)
            names = [str(one) for one in as_list(source["dataset_name"]) if not Path(str(one)).is_relative_to(home)]
            if any(_place(one, source) not in covered for one in names):
                trained_on[name] = _agree(source, stages)

    # The run starts from the first model that a stage names, unless another stage writes it.
    outputs = {str(home / name) for name, _, _ in stages}
    first: Values = next((values for _, _, values in stages if values.get("model_name_or_path")), {})
    base = first if str(first.get("model_name_or_path")) not in outputs else {}
    scored = [values for _, kind, values in stages if kind in STAGES and STAGES[kind].has_critic]
    return {
        "home": str(home),
        "trained_on": trained_on,
        "lengths": lengths,
        "against": last[OPPONENT][0] if OPPONENT in last else BASE if base else None,
        "base": base.get("model_name_or_path"),
        "base_tokenizer": base.get("tokenizer_name_or_path"),
        "reward_models": [model for values in scored for model in as_list(values.get("reward_model_path") or [])],
        ADDED: templates or None,
        CALLED: called or None,
    }


def _source_of(values: Values) -> dict[str, Any]:
    """Return how a stage reads its data, as the fields of `Source`."""
    source = {name: values[name] for name in SOURCE_FIELDS if values.get(name) is not None}
    # People's votes, which may be combined with preferences, have their own metric.
    names = as_list(source["dataset_name"])
    named = [one for one in names if Path(str(one)).name != VOTES] or names
    source["dataset_name"] = named if len(named) > 1 else named[0]
    source.setdefault("validation_share", DataArguments.validation_share)
    # Training was evaluated on this split, perhaps to choose a checkpoint. A split `test` is better.
    if source.get("dataset_test_split") == DataArguments.dataset_test_split:
        del source["dataset_test_split"]
    return source


def _agree(source: dict[str, Any], stages: Sequence[tuple[str, str, Values]]) -> dict[str, Any]:
    """Return the source of a stage with the division that holds out no row on which any of the stages trains.

    Stages that read the same data set usually hold out the same rows. With shares of 1/20 and 1/8 they agree on every
    40th row, with a share of 0 on none; a stage that reads a stream divides only its first file.
    """
    places = {_place(name, source) for name in as_list(source["dataset_name"])}
    others = [
        values
        for _, kind, values in stages
        if kind in STAGES
        and STAGES[kind].data
        and places & {_place(name, values) for name in as_list(values.get("dataset_name") or [])}
    ]
    shares = [values.get("validation_share", DataArguments.validation_share) for values in others]
    # Values of a wrong type are reported by the stage itself.
    if all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares) and len(set(shares)) > 1:
        source = {**source, "validation_share": 0.0}
        if all(shares):
            source["validation_share"] = 1 / math.lcm(*(round(1 / share) for share in shares))
    if any(values.get("dataset_streaming") is True for values in others):
        source = {**source, "dataset_streaming": True}
    return source


def _place(name: object, source: Values) -> tuple[str, str]:
    """Return what identifies a data set: its path or Hub id, and its configuration."""
    return os.path.realpath(str(name)), str(source.get("dataset_config"))


def template_arguments(settings: Values, stage: str, key: str) -> dict[str, Any]:
    """Return the chat template arguments for asking a stage the prompts of `key`."""
    # These are the stage's own. A stage without any, such as instruction tuning, is asked like the stage that trains on
    # such data; otherwise, a gain of that stage could be due to a different prompt.
    found = settings.get(ADDED) or {}
    return found.get(stage) or found.get(key) or {}


def complete(content: Values, derived: Values, only_named: bool = False) -> dict[str, Any]:
    """Complete an `evaluate.yaml` with what `derive` returned or earlier settings, except for data if `only_named`."""
    own: Values = derived["trained_on"]
    # The file takes precedence over the stages, and the stages over the defaults.
    settings = DEFAULTS | {name: derived[name] for name in DERIVED} | dict(content)
    settings["against"] = content.get("against") or derived["against"]
    if isinstance(tasks := settings["lm_eval_tasks"], str):
        settings["lm_eval_tasks"] = [tasks]
    for key in HELD_OUT:
        named = content.get(key)
        named = {"dataset_name": named} if isinstance(named, str) else named
        if isinstance(named, Mapping):
            # If a stage trains on this data set, perhaps by another path, only the rows that it holds out are measured.
            trained = [(_place(name, one), one) for one in own.values() for name in as_list(one["dataset_name"])]
            place = _place(named.get("dataset_name"), named)
            shared: Values = next((one for other, one in trained if other == place), {})
            division = ("validation_share", "dataset_train_split", "dataset_streaming", "document", "keep_rows")
            settings[key] = {name: shared[name] for name in division if name in shared} | dict(named)
        elif key not in content and (only_named or key in own):
            settings[key] = None if only_named else first_of(own[key])
    source = settings.get("problems")
    data = source.get("dataset_name") if isinstance(source, Mapping) else None
    if "elicit" not in content and data and not Path(str(data)).is_relative_to(settings["home"]):
        # The default is how generated solutions begin, and does not suit other data.
        settings["elicit"] = None
    return settings


def first_of(source: Values) -> dict[str, Any]:
    """Return the part of a stage's training data that is measured by default: the first of several data sets."""
    return {**source, "dataset_name": as_list(source["dataset_name"])[0]}


def without_derived(settings: Values) -> dict[str, Any]:
    """Return the completed settings that could be in `evaluate.yaml`."""
    return {key: value for key, value in settings.items() if key not in DERIVED or key == "against"}


def named_code(settings: Values) -> list[str]:
    """Return the code of a user's that settings name: functions, as `module:function`, and files of lm-eval's tasks."""
    sources = [settings.get(key) for key in HELD_OUT]
    functions = [source.get("grade") for source in sources if isinstance(source, Mapping)]
    functions.append(settings.get("judge"))
    for tools in (settings.get(CALLED) or {}).values():
        functions += [*as_list(tools.get("tools") or []), tools.get("environment")]
    names = [name for name in functions if isinstance(name, str) and ":" in name]
    names += [task for task in as_list(settings.get("lm_eval_tasks") or []) if is_task_file(str(task))]
    return list(dict.fromkeys(names))


def is_task_file(task: str) -> bool:
    """Return whether a task of lm-eval is a file, which may name functions, rather than one of lm-eval's own."""
    return os.sep in task or task.endswith((".yaml", ".yml"))


def move(settings: Values, run: Path) -> dict[str, Any]:
    """Return the settings with the paths in `home` in the directory `run`."""
    home = settings["home"]
    # The other paths are relative to `home`, and `against` is a name.
    return {key: value if key in ("home", "against") else relocate(value, home, run) for key, value in settings.items()}


def recorded(run: Path, stage: str) -> dict[str, Any]:
    """Return the settings that the runner recorded for the evaluation of RUN/STAGE, or for another one of the run.

    Settings that it did not record follow from the arguments that the stages left in their directories.
    """
    steps: dict[str, Any] = read_run(run).get("steps", {})
    # All evaluations of a run have the same settings.
    names = [f"evaluate_{stage}", *(name for name in steps if name.startswith("evaluate_"))]
    settings: dict[str, Any] = next((steps[name].get("values", {}) for name in names if name in steps), {})
    # The kind of a stage is in the name of its directory: "sft" in "2_sft_again".
    paths = sorted(run.glob("[0-9]*_*/arguments.json"))
    stages = [(path.parent.name, path.parent.name.split("_")[1], read_json(path)) for path in paths]
    known = {name: settings[name] for name in DERIVED if name in settings}
    if len(known) < len(DERIVED):
        home = next((Path(values["output_dir"]).parent for _, _, values in stages if values.get("output_dir")), run)
        settings = complete(settings, derive(stages, home) | known)
    # Earlier releases did not have every key.
    return DEFAULTS | settings


def with_layout(settings: Values, run: Path) -> dict[str, Any]:
    """Add data in RUN that the settings lack: stages may be run by hand, and later ones may not have run yet.

    These are RUN/data, as written by `recipes.data`, RUN/3_preferences, and a stage to compare with.
    """
    found: dict[str, Any] = {
        key: {"dataset_name": str(run / "data"), "dataset_config": held_out.config}
        for key, held_out in HELD_OUT.items()
        if held_out.config and (run / "data" / held_out.config / "test.parquet").is_file()
    }
    if (run / "3_preferences" / "test.parquet").is_file():
        found["pairs"] = {"dataset_name": str(run / "3_preferences")}
    opponents = (path.parent.name for path in run.glob(f"[0-9]*_{OPPONENT}*/*.json"))
    against = settings["against"] or max(opponents, default=None)
    return {**found, **settings, "trained_on": found | settings["trained_on"], "against": against}


def check(settings: Values, prefix: str = "") -> list[Problem]:
    """Check settings: keys of `evaluate.yaml`, its data and its judge. `prefix` precedes the field in a message."""
    # Imported here, because these import transformers and TRL.
    from pipeline.config.parser import check_values
    from pipeline.data.sources import BUILDERS, COMPRESSIONS
    from pipeline.models.vllm_sampler import validate_vllm
    from pipeline.rewards.loading import check_trust, load_rewards

    def is_missing(path: str) -> bool:
        # "data.jsonl" is a file, whereas "org/data" is an id on the Hub.
        is_file = Path(path).suffix in (*BUILDERS, *COMPRESSIONS) and not Path(path).exists()
        return (is_file or is_missing_path(path)) and not Path(path).is_relative_to(Path(settings["home"]))

    _, problems = check_values(without_derived(settings), [EvaluationArguments])
    if isinstance(samples := settings.get("samples"), int) and samples > MAX_SAMPLES:
        problems.append(Problem("samples", samples, f"must be at most {MAX_SAMPLES}"))
    best_of = settings.get("best_of") or []
    for number in filter(lambda item: isinstance(item, int), as_list(best_of)):
        # A single negative number has already been reported. In a list, each must be a number of answers.
        if number > MAX_SAMPLES or (isinstance(best_of, list) and number < 1):
            problems.append(Problem("best_of", number, f"must be from 1 to {MAX_SAMPLES}; omit it for none"))
    if settings.get("vllm") and (fault := validate_vllm()):
        problems.append(Problem("vllm", True, fault))
    if isinstance(tasks := settings.get("lm_eval_tasks"), list):
        # Imported here, because the harness imports torch, and an installed lm-eval takes seconds to list its tasks.
        from pipeline.evaluation.harness import check_tasks

        trusted: list[str] = []
        for task in map(str, tasks):
            with collect(problems):
                # A task's file may name functions, which lm-eval calls.
                if is_task_file(task):
                    check_trust(task, "lm_eval_tasks")
                trusted.append(task)
        problems += check_tasks(trusted)
    functions: dict[str, str] = {}
    for key in HELD_OUT:
        source = settings.get(key)
        # A stage's own data are checked with the stage.
        own = settings["trained_on"].get(key)
        if not isinstance(source, Mapping) or (own and source == first_of(own)):
            continue
        _, found = check_values(source, [Source])
        name, grade = source.get("dataset_name"), source.get("grade")
        if isinstance(name, list):
            found.append(Problem("dataset_name", ", ".join(map(str, name)), "name one data set to measure on"))
        elif not isinstance(name, str) or is_missing(name):
            found.append(Problem("dataset_name", name, "there is no such file or folder; give another, or a Hub id"))
        if isinstance(grade, str):
            functions[f"{key}: grade"] = GRADES.get(grade, grade)
        problems += [replace(problem, field=f"{key}: {problem.field}") for problem in found]

    # A judge may be a function, people, or a reward model that PPO does not use: otherwise, PPO would be judged by the
    # model that it is trained to please. The model may be written by a later step of the run.
    judge = settings.get("judge")
    if isinstance(judge, str):
        models = [Path(os.path.realpath(model)) for model in (judge, *settings["reward_models"])]
        models = [path.parent if path.name.startswith("checkpoint-") else path for path in models]
        if ":" in judge:
            functions["judge"] = judge
        elif models[0] in models[1:]:
            remedy = "PPO is trained to please this model; give one that it does not use"
            problems.append(Problem("judge", judge, remedy))
        elif judge != VOTES and is_missing(judge):
            problems.append(Problem("judge", judge, "no such folder; give a reward model, votes or a function"))
    for field, name in functions.items():
        with collect(problems):
            load_rewards([name], field)
    return [replace(problem, field=f"{prefix}{problem.field}") for problem in problems]
