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
from pipeline.data.votes import OTHER, OUTCOMES, VOTES_FILE, read_votes, standing
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
    name = stage if isinstance(stage, str) else stage.step or stage.name
    kind = re.sub(r"^\d+_", "", name)
    first = kind.partition("_")[0]
    return first if first in STAGES else kind


def stage_info(stage: str | StageResult) -> StageKind:
    """Return what is known about a stage, or about a directory such as "2_sft"; an unknown kind is its own title."""
    kind = stage_kind(stage)
    known = STAGES.get(kind)
    if known and known.name:
        return known
    title = kind.replace("_", " ").capitalize() or (stage if isinstance(stage, str) else stage.name)
    return StageKind(title, trained=False)


def stage_order(stage: str) -> tuple[int, int, str]:
    """Sort stages by the number of their directory, then by the order of training."""
    number = re.match(r"\d+", stage)
    kinds = [*STAGES, stage_kind(stage)]
    return int(number.group()) if number else 1000, kinds.index(kinds[-1]), stage


def step_order(step: str) -> tuple[int, int, str, bool]:
    """Sort the steps of a run: making data comes first, then the stages, each followed by its evaluation."""
    return *stage_order(step.removeprefix(EVALUATE)), step.startswith(EVALUATE)


@dataclass
class Run:
    """A run directory; `record` is its run.json, with an entry for each of its `steps`.

    The last training step ran on `hardware`. Stages are in the order of training. `others` are evaluations with a name,
    as name -> stage -> metric -> estimate. `notes` say what could not be read, and which steps ran on other hardware.
    """

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    stages: dict[str, StageResult] = field(default_factory=dict)
    baselines: dict[str, StageResult] = field(default_factory=dict)
    others: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def is_smoke(self) -> bool:
        return bool(self.record.get("smoke"))

    @property
    def against(self) -> str:
        """The stage that others are compared with."""
        return next((stage.against for stage in self.stages.values() if stage.against), "2_sft")

    @property
    def bars(self) -> list[StageResult]:
        """The baselines that a stage has to beat. Older or modified runs may have baselines that are unknown here."""
        return [one for name, one in self.baselines.items() if (known := find_baseline(name)) and known.is_bar]

    @property
    def judge(self) -> str:
        """The judge of the win rates, "" if there are none."""
        judged = [stage for stage in self.stages.values() if "win_rate" in stage.metrics]
        unnamed = "annotators who do not know which is which"
        return " or ".join(dict.fromkeys(stage.judge or unnamed for stage in judged))

    def info(self, name: str) -> StageKind:
        """Return what is known about the stage `name`; unlike `stage_info`, it uses the record of the run."""
        return stage_info(self.stages.get(name, name))

    @property
    def twins(self) -> list[str]:
        """The stages that only show another architecture's results: further pretrainings from random weights."""
        pretrained = [name for name in sorted(self.stages, key=stage_order) if self.info(name).from_scratch]
        return [name for name in pretrained[1:] if not self.settings_of(self.stages[name]).get("model_name_or_path")]

    def baseline_title(self, baseline: StageResult) -> str:
        """Return the title of a baseline, with the text or texts that its answers share."""
        # A text may be just a line break.
        texts = dict.fromkeys(str(text).replace("\n", "⏎") for text in baseline.texts.get(baseline.name, {}).values())
        known = find_baseline(baseline.name)
        title = (known.title if known else baseline.name).replace("{against}", self.against)
        return f"{title} {_list_texts(texts)}".strip()

    def directory_of(self, step: str) -> str:
        """Return the name of the directory that a step wrote, which may differ from the step's."""
        output = self.steps[step].get("values", {}).get("output_dir")
        return Path(str(output)).name if output else step

    def settings_of(self, stage: StageResult) -> dict[str, Any]:
        """Return the settings of the step that wrote a stage, {} if there is no record of it."""
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
        if model := settings.get("model_name_or_path"):
            output = settings.get("output_dir")
            home = os.path.dirname(str(output or model))
            # A stage may also start from a checkpoint of another one, "2_sft/checkpoint-100".
            stage_name = next(iter(Path(os.path.relpath(str(model), home or os.curdir)).parts), os.pardir)
            is_in_run = stage_name in self.stages or (output and stage_name != os.pardir)
            return stage_name if is_in_run else str(model)
        earlier = takewhile(lambda other: other.name != stage.name, self.stages.values())
        chain = [other.name for other in earlier if stage_info(other).generates and other.name not in self.twins]
        if chain:
            return chain[-1]
        return STAGES["random"].directory if stage_info(stage).from_scratch else ""

    def origin(self, stage: StageResult) -> StageResult | None:
        """Return the stage that another one started from, or None if that was not measured."""
        start = self.start_of(stage)
        if start == self.settings_of(stage).get("model_name_or_path") and start not in self.stages:
            # It is not a stage of this run. The first such model is measured as 0_base.
            base = self.steps.get(EVALUATE + BASE, {}).get("values", {}).get("base")
            start = BASE if base in (None, start) else ""
        named = self.stages.get(start)
        return named if named and named.metrics else None

    def first_variant(self, stage: StageResult) -> StageResult | None:
        """Return the first measured stage of the same kind and start, or None if that is `stage` itself."""
        start, kind = self.start_of(stage), stage_kind(stage)
        if not start:
            return None
        for other in takewhile(lambda other: other is not stage, self.stages.values()):
            if other.metrics and stage_kind(other) == kind and self.start_of(other) == start:
                return other
        return None


def _list_texts(texts: Iterable[str]) -> str:
    """Return the quoted texts of a baseline; "…" stands for the answer in those that are added to one."""
    by_place: dict[str, list[str]] = {}
    for text in texts:
        place = ""
        if text.startswith("…"):
            text, place = text.removeprefix("…").lstrip(" "), " after the answer"
        elif text.endswith("…"):
            text, place = text.removesuffix("…").rstrip(" "), " before the answer"
        by_place.setdefault(place, []).append(f"“{text}”")
    return " or ".join(" or ".join(quoted) + place for place, quoted in by_place.items())


def main_aim(stage: StageResult) -> str | None:
    """Return the first metric that a stage is trained for and that was measured, or None.

    A metric of which neither more nor less is better, such as the share of answers with steps, is no main aim.
    """
    measured = [name for name in stage_info(stage).aims if name in stage.metrics and metric_info(name).better]
    return measured[0] if measured else None


def load_runs(paths: Sequence[Path]) -> list[Run]:
    """Load every run, or raise a `UserError` that names each path without an evaluation or a training log."""
    remedy = f"no such directory; make it with `{as_typed('run', 'RECIPE')}`"
    refuse(*(Problem("RUN", path, remedy) for path in paths if not path.is_dir()))
    problems, runs = [], [load_run(path) for path in paths]
    names = [run.name for run in runs]
    for run in runs:
        if not any(stage.metrics or stage.history for stage in run.stages.values()):
            reason = f" ({run.notes[0]})" if run.notes else ""
            remedy = f"has neither an evaluation nor a training log{reason}; run `{as_typed('evaluate', run.path)}`"
            problems.append(Problem("RUN", run.path, remedy))
        if names.count(run.name) > 1:
            run.name = str(run.path)
    refuse(*problems)
    return runs


def is_stage(path: Path) -> bool:
    """Return whether a path is the directory of a stage that was measured, and not of a run."""
    is_run = (path / "run.json").exists() or (path / "evaluations").exists()
    stage = path.resolve()
    return not is_run and (stage.parent / "evaluations" / f"{stage.name}.json").is_file()


def only_stage(run: Run, path: Path, label: str) -> Run:
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
    # Steps may have run on different machines. The report shows the machine of the last training, which costs the most.
    described = ("hardware", "versions", "commit")
    facts = {name: {key: step.get(key) for key in described} for name, step in run.steps.items() if name != "report"}
    facts = {name: found for name, found in facts.items() if any(found.values())}
    trained = [name for name in facts if stage_info(name).trained]
    last = max(trained or facts, key=lambda name: run.steps[name].get("finished_at") or "", default=None)
    # In the record of an older run, these keys are shared by all steps.
    shown = facts[last] if last else run.record
    run.hardware, run.versions = shown.get("hardware") or {}, shown.get("versions") or {}
    run.commit = shown.get("commit")
    if others := [name for name, found in facts.items() if found != shown]:
        keys = " and ".join(key for key in described if any(facts[name][key] != shown[key] for name in others))
        note = f"{', '.join(others)} ran with different {keys} from {last}; the report shows those of {last}"
        run.notes.append(f"{path / 'run.json'}: {note}")
    # A stage has an evaluation, a model or a training log. While it is training, the log is in a checkpoint.
    names = {file.stem for file in path.glob("evaluations/*.json")}
    for pattern in ("config.json", "trainer_state.json", "checkpoint-*/trainer_state.json"):
        names |= {file.relative_to(path).parts[0] for file in path.glob(f"[0-9]*_*/{pattern}")}
    for name in sorted(names, key=stage_order):
        stage = StageResult.read(path / "evaluations" / f"{name}.json", run.notes)
        # Baselines are measured together with the opponent, and are results of their own in the report.
        run.baselines |= stage.take_baselines()
        # Until training ends, the log is only in checkpoints.
        stage.state = read_json(path / name / "trainer_state.json", run.notes) or newest_state(path / name)
        stage.config = read_json(path / name / "config.json", run.notes)
        stage.arguments = read_json(path / name / "arguments.json", run.notes)
        # The file `4_grpo_dapo.yaml` may write `4_dapo`, whose name is not a kind of stage.
        if stage_kind(name) not in STAGES:
            writers = [step for step in run.steps if run.directory_of(step) == name]
            stage.step = writers[0] if writers else ""
        _count_parameters(stage, path / name, run.notes)
        run.stages[name] = stage
    # People may vote at any time, so their win rates are not part of an evaluation.
    for name, rate in win_rates(path, run.against, run.notes).items():
        if name in run.stages:
            run.stages[name].metrics["win_rate_people"] = rate
    for file in sorted(path.glob("evaluations/*/*.json"), key=lambda file: (file.parent.name, *stage_order(file.stem))):
        run.others.setdefault(file.parent.name, {})[file.stem] = StageResult.read(file, run.notes).metrics
    return run


def win_rates(run: Path, against: str, notes: list[str]) -> dict[str, Estimate]:
    """Return how often people preferred each stage to `against`, or else to another stage; ties count one half.

    `by_kind` has a rate for each opponent, unless that is `against` alone.
    """
    outcomes: dict[str, dict[str, list[tuple[float, str]]]] = defaultdict(lambda: defaultdict(list))
    try:
        votes = standing(read_votes(run / VOTES / VOTES_FILE))
    except UserError as error:
        notes.append(f"people's votes are omitted: {error}")
        return {}
    for vote in votes:
        models = {"a": vote["model_a"], "b": vote["model_b"]}
        if vote["choice"] not in OUTCOMES or models["a"] == models["b"]:
            continue
        # The vote counts for the stage that is not the opponent or, between two others, for the later one.
        own = max(models, key=lambda side: (models[side] != against, models[side]))
        outcome = OUTCOMES[vote["choice"]] if own == "a" else 1 - OUTCOMES[vote["choice"]]
        outcomes[models[own]][models[OTHER[own]]].append((outcome, json.dumps(vote["prompt"])))
    rates = {}
    for stage, opponents in outcomes.items():
        found = {}
        for name, comparisons in opponents.items():
            won, prompts = zip(*comparisons, strict=True)
            found[name] = outcome_mean(won, units=prompts)
        main = max(found, key=lambda name: (name == against, found[name].n or 0))
        kinds = {} if list(found) == [against] else {f"against {name}": rate for name, rate in found.items()}
        rates[stage] = replace(found[main], by_kind=kinds)
    return rates


def _count_parameters(stage: StageResult, directory: Path, notes: list[str]) -> None:
    """Count the weights in safetensors files, and those that a token passes; adapters include their base model."""
    files = sorted(directory.glob("model*.safetensors"))
    if base := read_json(directory / "adapter_config.json").get("base_model_name_or_path"):
        # The name may be anything, even an impossible path.
        of_base = sorted(Path(str(base)).glob("model*.safetensors")) if os.path.isdir(str(base)) else []
        files = [*of_base, *sorted(directory.glob("adapter_model*.safetensors"))] if of_base else []
    shapes: list[tuple[str, list[int]]] = []
    for file in files:
        try:
            shapes += read_shapes(file).items()
        except (OSError, SafetensorError) as error:
            notes.append(f"{file}: its header cannot be read, parameters skipped: {' '.join(str(error).split())}")
            return
    if shapes:
        # A token only passes the experts that it is routed to.
        available = stage.config.get("num_local_experts") or stage.config.get("num_experts") or 1
        chosen = stage.config.get("num_experts_per_tok") or available
        experts = sum(math.prod(shape) for name, shape in shapes if ".experts." in name)
        stage.parameters = sum(math.prod(shape) for _, shape in shapes)
        stage.active_parameters = round(stage.parameters - experts * (1 - chosen / available))
