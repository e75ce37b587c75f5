"""Load what a run has written: its record, evaluations, training logs and votes, and the shapes of its weights.

Everything readable is reported. A missing file means that a stage was not run; a damaged one becomes a note.
"""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.config.weight_fields import newest_state
from pipeline.data.votes import OTHER, OUTCOMES, VOTES_FILE, read_votes, valid_votes
from pipeline.errors import Problem, UserError, as_typed, refuse
from pipeline.evaluation.evaluate_yaml import BASE, VOTES
from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult
from pipeline.files import read_json, read_run, read_shapes
from pipeline.stages import STAGES, find_baseline
from pipeline.stages.kinds import StageKind

EVALUATE = "evaluate_"
"""Prefix of the steps that evaluate a stage."""


def stage_kind(stage: str | StageResult) -> str:
    """Return the kind of a stage or of a directory: "sft" for "2_sft" and "2_sft_again", and also for "sft"."""
    name = stage if isinstance(stage, str) else stage.written_by or stage.name
    kind = re.sub(r"^\d+_", "", name)
    first = kind.partition("_")[0]
    return first if first in STAGES else kind


def stage_info(stage: str | StageResult) -> StageKind:
    """Return the entry in `STAGES` for a stage, or for a directory such as "2_sft".

    An unknown kind, or one that the report does not mention, is its own title.
    """
    kind = stage_kind(stage)
    info = STAGES.get(kind)
    if info is not None and info.name:
        return info
    title = kind.replace("_", " ").capitalize() or (stage if isinstance(stage, str) else stage.name)
    return StageKind(title, trained=False)


def stage_order(stage: str) -> tuple[int, int, str]:
    """Return a key that sorts stages by the number of their directory, then by the order of training."""
    number = re.match(r"\d+", stage)
    kind = stage_kind(stage)
    # A kind that is not in the table comes after those that are.
    kinds = [*STAGES, kind]
    return int(number.group()) if number else 1000, kinds.index(kind), stage


def step_order(step: str) -> tuple[int, int, str, bool]:
    """Return a key that sorts the steps of a run: first the data, then the stages, each followed by its evaluation."""
    return *stage_order(step.removeprefix(EVALUATE)), step.startswith(EVALUATE)


@dataclass
class Run:
    """A run directory.

    Attributes:
        path: The directory.
        record: Content of its run.json, {} if there is none.
        steps: The entries of the steps in run.json, by name.
        hardware: The machine of the last training step, {} if it was not recorded.
        versions: Its packages, {} if they were not recorded.
        commit: Its commit of this project, None if it was not recorded.
        stages: The stages by the name of their directory, in the order of training.
        baselines: What is reached without training, by the names in `pipeline.stages.BASELINES`.
        named_evaluations: Evaluations with a name, on other data or with other settings, as name -> stage -> metric ->
            estimate.
        notes: What could not be read, and which steps ran on other hardware; one line each.
        name: What it is called: the name of the directory or, if several runs share that, the path.
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
        """Whether it is a miniature, whose metrics mean nothing."""
        return bool(self.record.get("smoke"))

    @property
    def against(self) -> str:
        """The stage that others are compared with."""
        return next((stage.against for stage in self.stages.values() if stage.against), "2_sft")

    @property
    def baselines_to_beat(self) -> list[StageResult]:
        """The baselines that the verdict expects a stage to beat; a baseline of another release is not among them."""
        results = []
        for name, result in self.baselines.items():
            baseline = find_baseline(name)
            if baseline is not None and baseline.is_bar:
                results.append(result)
        return results

    @property
    def judge(self) -> str:
        """The judge of the win rates, "" if there are none."""
        judged = [stage for stage in self.stages.values() if "win_rate" in stage.metrics]
        unnamed = "annotators who do not know which is which"
        return " or ".join(dict.fromkeys(stage.judge or unnamed for stage in judged))

    def info(self, name: str) -> StageKind:
        """Return the entry in `STAGES` for the stage `name`; unlike `stage_info`, it uses the record of the run."""
        return stage_info(self.stages.get(name, name))

    @property
    def other_architectures(self) -> list[str]:
        """The pretrainings from random weights after the first one, which show what another architecture reaches.

        No later stage starts from them, and they are not judged.
        """
        pretrained = [name for name in sorted(self.stages, key=stage_order) if self.info(name).from_scratch]
        return [name for name in pretrained[1:] if not self.settings_of(self.stages[name]).get("model_name_or_path")]

    def baseline_title(self, baseline: StageResult) -> str:
        """Return the title of a baseline, with the text or texts that its answers share."""
        # A text may be just a line break.
        texts = dict.fromkeys(str(text).replace("\n", "⏎") for text in baseline.texts.get(baseline.name, {}).values())
        entry = find_baseline(baseline.name)
        title = entry.title.replace("{against}", self.against) if entry is not None else baseline.name
        return f"{title} {_list_texts(texts)}".strip()

    def directory_of(self, step: str) -> str:
        """Return the name of the directory that a step wrote, which may differ from the step's."""
        output = self.steps[step].get("values", {}).get("output_dir")
        return Path(str(output)).name if output else step

    def settings_of(self, stage: StageResult) -> dict[str, Any]:
        """Return the settings of the step that wrote a stage, or the stage's own arguments if none is recorded."""
        for name, step in self.steps.items():
            values: dict[str, Any] = step.get("values", {})
            if not name.startswith(EVALUATE) and self.directory_of(name) == stage.name:
                return values
        return stage.arguments

    def start_of(self, stage: StageResult) -> str:
        """Return the name of the stage that another one started from, or the path or Hub id of another model.

        Without a record, that is the stage before it; "" if there is none.
        """
        settings = self.settings_of(stage)
        model = settings.get("model_name_or_path")
        if model:
            output = settings.get("output_dir")
            home = os.path.dirname(str(output or model))
            # A stage may also start from a checkpoint of another one, "2_sft/checkpoint-100".
            stage_name = next(iter(Path(os.path.relpath(str(model), home or os.curdir)).parts), os.pardir)
            is_in_run = stage_name in self.stages or (output and stage_name != os.pardir)
            return stage_name if is_in_run else str(model)
        start = ""
        for other in self._stages_before(stage):
            if stage_info(other).generates and other.name not in self.other_architectures:
                start = other.name
        if not start and stage_info(stage).from_scratch:
            return STAGES["random"].directory
        return start

    def parent_stage(self, stage: StageResult) -> StageResult | None:
        """Return the stage that another one started from, or None if that was not measured."""
        start = self.start_of(stage)
        if start == self.settings_of(stage).get("model_name_or_path") and start not in self.stages:
            # It is not a stage of this run. The first such model is measured as 0_base.
            base = self.steps.get(EVALUATE + BASE, {}).get("values", {}).get("base")
            if base not in (None, start):
                return None
            start = BASE
        parent = self.stages.get(start)
        if parent is None or not parent.metrics:
            return None
        return parent

    def first_variant(self, stage: StageResult) -> StageResult | None:
        """Return the first measured stage of the same kind and start, or None if that is `stage` itself."""
        start = self.start_of(stage)
        if not start:
            return None
        for other in self._stages_before(stage):
            if other.metrics and stage_kind(other) == stage_kind(stage) and self.start_of(other) == start:
                return other
        return None

    def _stages_before(self, stage: StageResult) -> list[StageResult]:
        """Return the stages that come before another one in the order of training."""
        return list(takewhile(lambda other: other.name != stage.name, self.stages.values()))


def _list_texts(texts: Iterable[str]) -> str:
    """Return the quoted texts of a baseline; "…" stands for the answer in those that are added to one."""
    by_place: dict[str, list[str]] = {}
    for text in texts:
        if text.startswith("…"):
            by_place.setdefault(" after the answer", []).append(f"“{text.removeprefix('…').lstrip(' ')}”")
        elif text.endswith("…"):
            by_place.setdefault(" before the answer", []).append(f"“{text.removesuffix('…').rstrip(' ')}”")
        else:
            by_place.setdefault("", []).append(f"“{text}”")
    return " or ".join(" or ".join(quoted) + place for place, quoted in by_place.items())


def main_aim(stage: StageResult) -> str | None:
    """Return the first metric that a stage is trained for and that was measured, or None.

    A metric of which neither more nor less is better, such as the share of answers with steps, is no main aim.
    """
    for name in stage_info(stage).aims:
        if name in stage.metrics and metric_info(name).better:
            return name
    return None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Load every run, or raise a `UserError` that names each path without an evaluation or a training log."""
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
    """Return whether a path is the directory of a stage that was measured, and not of a run."""
    is_run = (path / "run.json").exists() or (path / "evaluations").exists()
    stage = path.resolve()
    return not is_run and (stage.parent / "evaluations" / f"{stage.name}.json").is_file()


def with_only_stage(run: Run, path: Path, label: str) -> Run:
    """Return a run with only the stage in the directory `path`, under the name `label`."""
    return replace(run, path=path, stages={label: run.stages[path.resolve().name]}, baselines={})


def load_run(path: Path) -> Run:
    """Load the run in the directory `path`; what cannot be read goes into its `notes`."""
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
        metrics = StageResult.read(file, run.notes).metrics
        run.named_evaluations.setdefault(file.parent.name, {})[file.stem] = metrics
    return run


def _set_machine(run: Run) -> None:
    """Set hardware, versions and commit to those of the last training, which costs the most.

    Steps may have run on different machines; those that differ become a note.
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
    differing = [name for name in machines if machines[name] != machines[last]]
    if differing:
        different = [key for key in keys if any(machines[name][key] != machines[last][key] for name in differing)]
        note = f"{', '.join(differing)} ran with different {' and '.join(different)} from {last}"
        run.notes.append(f"{run.path / 'run.json'}: {note}; the report shows those of {last}")


def _stage_names(path: Path) -> set[str]:
    """Return the directories of the stages in a run: each has an evaluation, a model or a training log."""
    names = {file.stem for file in path.glob("evaluations/*.json")}
    # While a stage is training, its log is in a checkpoint.
    for pattern in ("config.json", "trainer_state.json", "checkpoint-*/trainer_state.json"):
        names |= {file.relative_to(path).parts[0] for file in path.glob(f"[0-9]*_*/{pattern}")}
    return names


def _load_stage(run: Run, name: str) -> StageResult:
    """Load a stage, and add the baselines that were measured with it to those of the run."""
    folder = run.path / name
    stage = StageResult.read(run.path / "evaluations" / f"{name}.json", run.notes)
    # Baselines are measured together with the opponent, and are results of their own in the report.
    run.baselines |= stage.take_baselines()
    # Until training ends, the log is only in checkpoints.
    stage.state = read_json(folder / "trainer_state.json", run.notes) or newest_state(folder)
    stage.config = read_json(folder / "config.json", run.notes)
    stage.arguments = read_json(folder / "arguments.json", run.notes)
    # The file `4_grpo_dapo.yaml` may write `4_dapo`, whose name is not a kind of stage.
    if stage_kind(name) not in STAGES:
        stage.written_by = next((step for step in run.steps if run.directory_of(step) == name), "")
    _count_parameters(stage, folder, run.notes)
    return stage


def win_rates(run: Path, against: str, notes: list[str]) -> dict[str, Estimate]:
    """Return how often people preferred each stage to `against`, or else to another stage; ties count one half.

    `by_kind` has a rate for each opponent, unless that is `against` alone. Damaged votes become a note.
    """
    # The outcome of each comparison and its prompt, by stage and opponent.
    outcomes: dict[str, dict[str, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    try:
        votes = valid_votes(read_votes(run / VOTES / VOTES_FILE))
    except UserError as error:
        notes.append(f"people's votes are omitted: {error}")
        return {}
    for vote in votes:
        models = {"a": vote["model_a"], "b": vote["model_b"]}
        if vote["choice"] not in OUTCOMES or models["a"] == models["b"]:
            continue
        # The vote counts for the stage that is not the opponent or, between two others, for the later one.
        side = max(models, key=lambda side: (models[side] != against, models[side]))
        outcome = OUTCOMES[vote["choice"]] if side == "a" else 1 - OUTCOMES[vote["choice"]]
        outcomes[models[side]][models[OTHER[side]]].append((outcome, json.dumps(vote["prompt"])))
    rates = {}
    for stage, opponents in outcomes.items():
        by_opponent = {}
        for opponent, comparisons in opponents.items():
            wins, prompts = zip(*comparisons, strict=True)
            by_opponent[opponent] = outcome_mean(wins, units=prompts)
        main = max(by_opponent, key=lambda opponent: (opponent == against, by_opponent[opponent].n or 0))
        kinds = {}
        if list(by_opponent) != [against]:
            kinds = {f"against {opponent}": rate for opponent, rate in by_opponent.items()}
        rates[stage] = replace(by_opponent[main], by_kind=kinds)
    return rates


def _count_parameters(stage: StageResult, directory: Path, notes: list[str]) -> None:
    """Count the weights in safetensors files, and those that a token passes; adapters include their base model."""
    shapes: list[tuple[str, list[int]]] = []
    for file in _weight_files(directory):
        try:
            shapes += read_shapes(file).items()
        except (OSError, SafetensorError) as error:
            notes.append(f"{file}: its header cannot be read, parameters skipped: {' '.join(str(error).split())}")
            return
    if not shapes:
        return
    # A token only passes the experts that it is routed to.
    available = stage.config.get("num_local_experts") or stage.config.get("num_experts") or 1
    chosen = stage.config.get("num_experts_per_tok") or available
    experts = sum(math.prod(shape) for name, shape in shapes if ".experts." in name)
    stage.parameters = sum(math.prod(shape) for _, shape in shapes)
    stage.active_parameters = round(stage.parameters - experts * (1 - chosen / available))


def _weight_files(directory: Path) -> list[Path]:
    """Return the files with a stage's weights: for an adapter, its base model's and its own, or none without a base."""
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
