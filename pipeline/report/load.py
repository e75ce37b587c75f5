"""Load what a run has written: its record, evaluations, training logs and votes, and the shapes of its weights.

    runs/pocket/                            Run
      run.json                                record, steps, hardware, versions, commit
      evaluations/2_sft.json, 2_sft.jsonl     stages["2_sft"]: metrics, answers, and the value of each example
      evaluations/longer/2_sft.json           named_evaluations["longer"]["2_sft"]
      2_sft/trainer_state.json, config.json   stages["2_sft"]: training log, model configuration
      2_sft/model.safetensors                 stages["2_sft"]: number of weights
      votes/                                  stages["3_ppo"].metrics["win_rate_people"]

Everything readable is reported. A missing file means that a stage was not run; a damaged one becomes a note.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.config.weight_fields import newest_state
from pipeline.data.votes import OUTCOMES, VOTES_FILE, Vote, read_votes, valid_votes
from pipeline.errors import Problem, UserError, as_typed, refuse
from pipeline.evaluation.evaluate_yaml import BASE, VOTES
from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import ModelConfig, StageResult, TrainerState
from pipeline.files import STATE, read_json, read_run, read_shapes
from pipeline.files.json_types import with_right_types
from pipeline.preferences.aims import find_aims
from pipeline.stages import STAGES, find_baseline, kind_in_name, stage_order
from pipeline.stages.kinds import StageKind

EVALUATE = "evaluate_"
"""Prefix of the steps that evaluate a stage: `evaluate_2_sft` evaluates `2_sft`."""


def stage_kind(stage: str | StageResult) -> str:
    """Return the kind of a stage, which is a key of `STAGES` unless the kind is unknown.

    Args:
        stage: A stage, or the name of its directory, its step or its kind.
    """
    if isinstance(stage, str):
        return kind_in_name(stage)
    return kind_in_name(stage.written_by or stage.name)


def stage_info(stage: str | StageResult) -> StageKind:
    """Return the entry in `STAGES` for a stage, or for the name of its directory, such as "2_sft".

    For an unknown kind, or one that the report does not mention, return an entry that has only a name.
    """
    kind = stage_kind(stage)
    info = STAGES.get(kind)
    if info is not None and info.name:
        return info
    name = kind.replace("_", " ").capitalize()
    # A directory such as "5_" has no kind.
    if not name:
        name = stage if isinstance(stage, str) else stage.name
    return StageKind(name, trained=False)


def step_order(step: str) -> tuple[float, int, str, bool]:
    """Return a sort key for the steps of a run: in the order of `stage_order`, each followed by its evaluation."""
    is_evaluation = step.startswith(EVALUATE)
    return *stage_order(step.removeprefix(EVALUATE)), is_evaluation


@dataclass
class Run:
    """A run directory.

    Attributes:
        path: The directory.
        record: Content of run.json, {} if there is none.
        steps: Name of a step, such as "2_sft" or "evaluate_2_sft" -> its entry in run.json.
        hardware: The machine on which the last training step ran, {} if it was not recorded.
        versions: The versions of Python and of the libraries in that step, {} if they were not recorded.
        commit: The commit of this project in that step, None if it was not recorded.
        stages: Name of a stage's directory -> the stage, in the order of training.
        baselines: Name in `pipeline.stages.BASELINES` -> what is reached without training.
        named_evaluations: Evaluations with a name, on other data or with other settings: name -> stage -> metric ->
            estimate.
        notes: What could not be read, and which steps ran on other hardware; one line each.
        name: The name of the directory or, if several runs of a report share that, the path.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    stages: dict[str, StageResult] = field(default_factory=dict)
    baselines: dict[str, StageResult] = field(default_factory=dict)
    named_evaluations: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def is_smoke(self) -> bool:
        """Whether this is a run of `--smoke`, a miniature whose metrics mean nothing."""
        return bool(self.record.get("smoke"))

    @property
    def against(self) -> str:
        """The name of the stage that the others are compared with in win rates."""
        for stage in self.stages.values():
            if stage.against:
                return stage.against
        return "2_sft"

    @property
    def baselines_to_beat(self) -> list[StageResult]:
        """The baselines that the verdict expects every stage to beat.

        A baseline that is no longer in `BASELINES`, in a run of an older release, is not expected to be beaten.
        """
        results = []
        for name, result in self.baselines.items():
            baseline = find_baseline(name)
            if baseline is not None and baseline.is_bar:
                results.append(result)
        return results

    @property
    def judge(self) -> str:
        """Who compared the answers for the win rates, "" if there are none."""
        judges = []
        for stage in self.stages.values():
            if "win_rate" in stage.metrics:
                judges.append(stage.judge or "annotators who do not know which is which")
        return " or ".join(dict.fromkeys(judges))

    def info(self, name: str) -> StageKind:
        """Return the entry in `STAGES` for the stage `name`.

        Unlike `stage_info`, this also works for a directory whose name does not say the kind, if the run recorded which
        step wrote it.
        """
        return stage_info(self.stages.get(name, name))

    @property
    def other_architectures(self) -> list[str]:
        """The names of all pretrainings from random weights but the first one.

        They show what another architecture reaches. No later stage starts from them, and they are not judged.
        """
        pretrained = [name for name in sorted(self.stages, key=stage_order) if self.info(name).from_scratch]
        return [name for name in pretrained[1:] if not self.settings_of(self.stages[name]).get("model_name_or_path")]

    def baseline_title(self, baseline: StageResult) -> str:
        """Return the title of a baseline with its texts, such as "2_sft, prompted with “Let us think.”"."""
        entry = find_baseline(baseline.name)
        if entry is None:
            title = baseline.name
        else:
            title = entry.title.replace("{against}", self.against)
        # A text may be just a line break.
        texts = [str(text).replace("\n", "⏎") for text in baseline.texts.get(baseline.name, {}).values()]
        return f"{title} {_list_texts(dict.fromkeys(texts))}".strip()

    def directory_of(self, step: str) -> str:
        """Return the name of the directory that a step wrote, which may differ from the name of the step."""
        output = self.steps[step].get("values", {}).get("output_dir")
        return Path(str(output)).name if output else step

    def settings_of(self, stage: StageResult) -> dict[str, Any]:
        """Return the settings of the step that wrote a stage, or the stage's own arguments if none is recorded."""
        for name, step in self.steps.items():
            values: dict[str, Any] = step.get("values", {})
            if not name.startswith(EVALUATE) and self.directory_of(name) == stage.name:
                return values
        return stage.arguments

    def aims_of(self, stage: StageResult) -> tuple[str, ...]:
        """Return the metrics that a stage is trained to improve, the main one first."""
        steps = []
        problems = None
        for name, step in self.steps.items():
            values: dict[str, Any] = step.get("values", {})
            if name.startswith(EVALUATE):
                # All evaluations of a run have the same settings.
                problems = problems or values.get("problems")
            else:
                steps.append((stage_kind(name), values))
        return find_aims((stage_kind(stage), self.settings_of(stage)), steps, problems)

    def main_aim(self, stage: StageResult) -> str | None:
        """Return the first of the metrics that a stage is trained to improve that was measured, or None.

        A metric that is neither better if it rises nor if it falls, such as the share of answers with steps, is no main
        aim.
        """
        for name in self.aims_of(stage):
            if name in stage.metrics and metric_info(name).better:
                return name
        return None

    def start_of(self, stage: StageResult) -> str:
        """Return the model from which the training of a stage started, "" if that is unknown.

        Example:
            "1_pretrain", the name of a stage of the same run; "HuggingFaceTB/SmolLM2-135M", any other path or Hub id

        If no settings are recorded, the stage is assumed to have started from the one before it.
        """
        settings = self.settings_of(stage)
        model = str(settings.get("model_name_or_path") or "")
        if not model:
            return self._assumed_start(stage)
        # Recorded paths are relative to the directory in which the step ran, so they are compared with each other, and
        # not with `self.path`. All stages of a run are written to one directory.
        output = str(settings.get("output_dir") or "")
        run_dir = os.path.dirname(output or model) or os.curdir
        parts = Path(os.path.relpath(model, run_dir)).parts
        # A stage may also start from a checkpoint of another one, "2_sft/checkpoint-100".
        if parts and (parts[0] in self.stages or (output and parts[0] != os.pardir)):
            return parts[0]
        return model

    def _assumed_start(self, stage: StageResult) -> str:
        """Return the last stage before `stage` that others may start from, or else random weights for a pretraining.

        "" if neither applies.
        """
        start = ""
        for earlier in self._stages_before(stage):
            if stage_info(earlier).generates and earlier.name not in self.other_architectures:
                start = earlier.name
        if not start and stage_info(stage).from_scratch:
            return STAGES["random"].directory
        return start

    def parent_stage(self, stage: StageResult) -> StageResult | None:
        """Return the stage from which the training of `stage` started, or None if that was not measured."""
        start = self.start_of(stage)
        if start == self.settings_of(stage).get("model_name_or_path") and start not in self.stages:
            # The start is not a stage of this run. The first such model is measured as 0_base.
            base = self.steps.get(EVALUATE + BASE, {}).get("values", {}).get("base")
            if base not in (None, start):
                return None
            start = BASE
        parent = self.stages.get(start)
        if parent is None or not parent.metrics:
            return None
        return parent

    def first_variant(self, stage: StageResult) -> StageResult | None:
        """Return the first measured stage that has the kind and the start of `stage`, or None if that is `stage`.

        Example:
            4_grpo for 4_grpo_dapo, if both were trained with GRPO from 3_ppo
        """
        start = self.start_of(stage)
        if not start:
            return None
        for earlier in self._stages_before(stage):
            if earlier.metrics and stage_kind(earlier) == stage_kind(stage) and self.start_of(earlier) == start:
                return earlier
        return None

    def _stages_before(self, stage: StageResult) -> list[StageResult]:
        """Return the stages that come before `stage` in the order of training."""
        return list(takewhile(lambda other: other.name != stage.name, self.stages.values()))


def _list_texts(texts: Iterable[str]) -> str:
    """Return the texts of a baseline as a list in words.

    Example:
        "Let us think.", "… Thanks!", "Sure: …" -> “Let us think.” or “Thanks!” after the answer or “Sure:” before the
        answer

    Args:
        texts: The texts. In a text that is added to an answer, "…" stands for the answer.
    """
    quotes: list[str] = []
    quotes_after: list[str] = []
    quotes_before: list[str] = []
    # The order of the three groups is that of their first texts.
    groups: dict[str, list[str]] = {}
    for text in texts:
        if text.startswith("…"):
            groups.setdefault(" after the answer", quotes_after).append(f"“{text.removeprefix('…').lstrip(' ')}”")
        elif text.endswith("…"):
            groups.setdefault(" before the answer", quotes_before).append(f"“{text.removesuffix('…').rstrip(' ')}”")
        else:
            groups.setdefault("", quotes).append(f"“{text}”")
    return " or ".join(" or ".join(quoted) + place for place, quoted in groups.items())


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Load the runs in some directories, and give each a name that no other one has.

    Raises:
        UserError: If a path is not a directory, or a run has neither an evaluation nor a training log.
    """
    remedy = f"no such directory; make it with `{as_typed('run', 'RECIPE')}`"
    refuse(*(Problem("RUN", path, remedy) for path in paths if not path.is_dir()))
    runs = [load_run(path) for path in paths]
    names = [run.name for run in runs]
    problems = []
    for run in runs:
        if not any(stage.metrics or stage.history for stage in run.stages.values()):
            fault = "has neither an evaluation nor a training log"
            if run.notes:
                fault += f" ({run.notes[0]})"
            problems.append(Problem("RUN", run.path, f"{fault}; run `{as_typed('evaluate', run.path)}`"))
        if names.count(run.name) > 1:
            run.name = str(run.path)
    refuse(*problems)
    return runs


def is_stage(path: Path) -> bool:
    """Return whether a path is the directory of a measured stage, rather than of a run."""
    is_run = (path / "run.json").exists() or (path / "evaluations").exists()
    stage = path.resolve()
    return not is_run and (stage.parent / "evaluations" / f"{stage.name}.json").is_file()


def with_only_stage(run: Run, path: Path, label: str) -> Run:
    """Return a copy of a run in which the stage in the directory `path` is the only one, and is named `label`."""
    stage = run.stages[path.resolve().name]
    return replace(run, path=path, stages={label: stage}, baselines={})


def load_run(path: Path) -> Run:
    """Load the run in the directory `path`. What cannot be read becomes one of its `notes`."""
    run = Run(path, name=path.resolve().name)
    try:
        run.record = read_run(path)
    except UserError as error:
        run.notes.append(f"{path / 'run.json'}: {error.problems[0].remedy}; skipped")
    run.steps = run.record.get("steps", {})
    _set_machine(run)
    for name in sorted(_stage_names(path), key=stage_order):
        run.stages[name] = _load_stage(run, name)
    # People may vote at any time, so their win rates are not part of an evaluation.
    for name, rate in win_rates(path, run.against, run.notes).items():
        if name in run.stages:
            run.stages[name].metrics["win_rate_people"] = rate
    for file in sorted(path.glob("evaluations/*/*.json"), key=lambda file: (file.parent.name, *stage_order(file.stem))):
        evaluation = file.parent.name
        metrics = StageResult.read(file, run.notes).metrics
        run.named_evaluations.setdefault(evaluation, {})[file.stem] = metrics
    return run


def _set_machine(run: Run) -> None:
    """Set the hardware, versions and commit of a run to those of its last training step.

    Steps may have run on different machines. A note names the steps that differ.
    """
    keys = ("hardware", "versions", "commit")
    machines = {}
    for name, step in run.steps.items():
        machine = {key: step.get(key) for key in keys}
        if name != "report" and any(machine.values()):
            machines[name] = machine
    if not machines:
        return
    trained = [name for name in machines if stage_info(name).trained]
    last = max(trained or machines, key=lambda name: run.steps[name].get("finished_at") or "")
    run.hardware = machines[last]["hardware"] or {}
    run.versions = machines[last]["versions"] or {}
    run.commit = machines[last]["commit"]
    differing_steps = [name for name in machines if machines[name] != machines[last]]
    if not differing_steps:
        return
    differing_keys = []
    for key in keys:
        if any(machines[name][key] != machines[last][key] for name in differing_steps):
            differing_keys.append(key)
    note = f"{', '.join(differing_steps)} ran with different {' and '.join(differing_keys)} from {last}"
    earlier = sorted({_other_versions(machines[name]["versions"], run.versions) for name in differing_steps} - {""})
    if earlier:
        note += f" ({'; '.join(earlier)})"
    run.notes.append(f"{run.path / 'run.json'}: {note}; the report shows those of {last}")


def _other_versions(versions: Mapping[str, Any] | None, reference: Mapping[str, Any]) -> str:
    """Return the versions of a step that differ from those of another, such as "torch 2.12, trl 1.15"."""
    differing = [f"{name} {version}" for name, version in (versions or {}).items() if reference.get(name) != version]
    return ", ".join(differing)


def _stage_names(path: Path) -> set[str]:
    """Return the names of the stages in a run: of each directory with an evaluation, a model or a training log."""
    names = {file.stem for file in path.glob("evaluations/*.json")}
    # While a stage is training, its log is in a checkpoint.
    for pattern in ("config.json", "trainer_state.json", "checkpoint-*/trainer_state.json"):
        names |= {file.relative_to(path).parts[0] for file in path.glob(f"[0-9]*_*/{pattern}")}
    return names


def _load_stage(run: Run, name: str) -> StageResult:
    """Load a stage, and add the baselines that were measured together with it to the baselines of the run."""
    folder = run.path / name
    stage = StageResult.read(run.path / "evaluations" / f"{name}.json", run.notes)
    # Baselines are measured together with the stage that others are compared with, but the report lists them apart.
    run.baselines |= stage.take_baselines()
    # Until training ends, the log is only in checkpoints.
    state_file = folder / STATE
    state = read_json(state_file, run.notes) or newest_state(folder)
    stage.state = with_right_types(state, TrainerState, state_file, run.notes)
    config_file = folder / "config.json"
    stage.config = with_right_types(read_json(config_file, run.notes), ModelConfig, config_file, run.notes)
    stage.arguments = read_json(folder / "arguments.json", run.notes)
    # The file `4_grpo_dapo.yaml` may write `4_dapo`, whose name is not a kind of stage.
    if stage_kind(name) not in STAGES:
        stage.written_by = next((step for step in run.steps if run.directory_of(step) == name), "")
    _count_parameters(stage, folder, run.notes)
    return stage


def win_rates(run: Path, against: str, notes: list[str]) -> dict[str, Estimate]:
    """Return the win rate of each stage by name: the share of people's votes for it, where a tie is half a vote.

    The rate is against the stage `against` or, for a stage that was never compared with that, against the opponent that
    it was most often compared with. If there are other opponents, `by_kind` has the rate against each of them.

    Args:
        run: Directory of the run.
        against: Name of the usual opponent.
        notes: A line is appended if the votes are damaged.
    """
    try:
        votes = valid_votes(read_votes(run / VOTES / VOTES_FILE))
    except UserError as error:
        notes.append(f"people's votes are omitted: {error}")
        return {}
    rates = {}
    for stage, comparisons in _comparisons_by_stage(votes, against).items():
        by_opponent = {}
        for opponent, outcomes in comparisons.items():
            wins = [outcome for outcome, _ in outcomes]
            prompts = [prompt for _, prompt in outcomes]
            by_opponent[opponent] = outcome_mean(wins, units=prompts)
        main = max(by_opponent, key=lambda opponent: (opponent == against, by_opponent[opponent].n or 0))
        kinds = {}
        if list(by_opponent) != [against]:
            kinds = {f"against {opponent}": rate for opponent, rate in by_opponent.items()}
        rates[stage] = replace(by_opponent[main], by_kind=kinds)
    return rates


def _comparisons_by_stage(votes: Sequence[Vote], against: str) -> dict[str, dict[str, list[tuple[float, str]]]]:
    """Return stage -> opponent -> (outcome, prompt) of each vote; the outcome is 1 for a win, 0.5 for a tie, else 0.

    The opponent is `against` if that is one of the two stages, and the earlier stage otherwise.
    """
    comparisons: dict[str, dict[str, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    for vote in votes:
        stage = vote["model_a"]
        opponent = vote["model_b"]
        if vote["choice"] not in OUTCOMES or stage == opponent:
            continue
        outcome = OUTCOMES[vote["choice"]]
        if opponent != against and (stage == against or stage_order(stage) < stage_order(opponent)):
            stage, opponent = opponent, stage
            outcome = 1 - outcome
        comparisons[stage][opponent].append((outcome, json.dumps(vote["prompt"])))
    return comparisons


def _count_parameters(stage: StageResult, directory: Path, notes: list[str]) -> None:
    """Set the number of weights of a stage, and of those that each token uses, from its safetensors files.

    The weights of an adapter include its base model. Without readable files, nothing is set.
    """
    shapes: list[tuple[str, list[int]]] = []
    for file in _weight_files(directory):
        try:
            shapes += read_shapes(file).items()
        except (OSError, SafetensorError) as error:
            notes.append(f"{file}: its header cannot be read, parameters skipped: {' '.join(str(error).split())}")
            return
    if not shapes:
        return
    stage.parameters = sum(math.prod(shape) for _, shape in shapes)
    # In a mixture of experts, a token only uses the experts that it is routed to.
    experts = stage.config.get("num_local_experts") or stage.config.get("num_experts") or 1
    experts_per_token = stage.config.get("num_experts_per_tok") or experts
    expert_parameters = sum(math.prod(shape) for name, shape in shapes if ".experts." in name)
    unused = expert_parameters * (1 - experts_per_token / experts)
    stage.active_parameters = round(stage.parameters - unused)


def _weight_files(directory: Path) -> list[Path]:
    """Return the files with the weights of a stage.

    For an adapter, these are the files of its base model and its own, or none if the base model is not on this machine.
    """
    base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        return sorted(directory.glob("model*.safetensors"))
    # The name may be anything, even an impossible path.
    if not os.path.isdir(str(base)):
        return []
    base_files = sorted(Path(str(base)).glob("model*.safetensors"))
    if not base_files:
        return []
    return base_files + sorted(directory.glob("adapter_model*.safetensors"))
