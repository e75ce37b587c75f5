"""metrics.json: every figure of a run, for scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult
from pipeline.report.curves import last_logged, logged
from pipeline.report.differences import Difference
from pipeline.report.load import Run
from pipeline.report.targets import Target, check_targets
from pipeline.report.verdict import conclude, find_failures, find_unjudged


def _to_json(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {metric: estimate.to_json() for metric, estimate in metrics.items()}


def summarise(run: Run, found: Sequence[Difference], targets: Sequence[Target]) -> dict[str, Any]:
    """Return the content of metrics.json.

    A figure is `{"value", "ci95", "n"}`, and `by_kind` where there are kinds of examples. `stages` and `baselines` have
    them by metric; `expert_load` has `layers`, the load of each expert, and `pass@1_by_length` an estimate for each
    length of a problem. `other` are evaluations with a name. Memory is in bytes of a step's largest process.
    """
    stages = {name: _to_json(stage.metrics) for name, stage in run.stages.items() if stage.metrics}
    for name, figures in stages.items():
        if lengths := by_length(run.stages[name]):
            figures["pass@1_by_length"] = _to_json(lengths)
        if "expert_load" in figures:
            figures["expert_load"]["layers"] = run.stages[name].experts.get("layers", [])
    costs = {name: training_cost(stage) for name, stage in run.stages.items()}
    infos = {name: metric_info(name) for stage in run.stages.values() for name in stage.metrics}
    failures = find_failures(run)
    promises = check_targets(run, found, targets)
    checked = [promise["promise"] for promise in promises]
    return {
        "run": run.name,
        "stages": stages,
        "baselines": {name: _to_json(one.metrics) | one.texts.get(name, {}) for name, one in run.baselines.items()},
        "other": {name: {stage: _to_json(of) for stage, of in stages.items()} for name, stages in run.others.items()},
        "metrics": {
            name: {"label": info.label, "better": info.better, "data": info.data} for name, info in infos.items()
        },
        "judge": run.judge,
        "left_out": {name: stage.left_out for name, stage in run.stages.items() if stage.left_out},
        "cut_off": {name: stage.cut_off for name, stage in run.stages.items() if stage.cut_off},
        "overlap": {name: stage.overlap for name, stage in run.stages.items() if stage.overlap},
        # Trainers log an alarm as `alarm/<what>`.
        "alarms": [
            {"stage": stage.name, "step": int(step), "what": key.removeprefix("alarm/"), "value": value}
            for stage in run.stages.values()
            for key in dict.fromkeys(key for record in stage.history for key in record if key.startswith("alarm/"))
            for step, value in logged(stage, key)
        ],
        "seconds": seconds(run),
        "peak_memory": {name: int(peak) for name, peak in recorded(run, "peak_memory").items() if peak},
        "hardware": run.hardware,
        "versions": run.versions,
        "seed": run.record.get("seed"),
        "commit": run.commit,
        "parameters": {name: stage.parameters for name, stage in run.stages.items() if stage.parameters},
        "tokens": {name: round(tokens) for name, (tokens, _) in costs.items() if tokens},
        "flops": {name: flops for name, (_, flops) in costs.items() if flops},
        "differences": [
            {name: getattr(item, name) for name in ("stage", "before", "metric", "aim", "verdict")}
            | item.change.to_json()
            for item in found
        ],
        "promises": promises,
        "promises_not_measured": [str(target) for target in targets if str(target) not in checked],
        "verdict": list(map(asdict, failures)),
        "not_judged": find_unjudged(run),
        "conclusion": conclude(run, failures),
        "notes": list(run.notes),
    }


def by_length(stage: StageResult) -> dict[str, Estimate]:
    """Return pass@1 by the length of the problems, if the data have lengths."""
    values: dict[int, list[float]] = {}
    for example in stage.examples:
        if example["metric"] == "pass@1" and "length" in example:
            values.setdefault(example["length"], []).append(example["value"])
    return {str(length): outcome_mean(values[length]) for length in sorted(values)}


def seconds(run: Run) -> dict[str, float]:
    """Return the seconds of each step from the record, or of training from the log of the stage."""
    taken = recorded(run, "seconds")
    for name, stage in run.stages.items():
        if (runtime := last_logged(stage, "train_runtime")) is not None:
            taken.setdefault(name, runtime)
    return taken


def recorded(run: Run, key: str) -> dict[str, float]:
    """Return a figure from each step's record that has it, by the name of the stage's directory or of the step."""
    found: dict[str, float] = {}
    for name, step in run.steps.items():
        # The report cannot measure itself.
        if name != "report" and step.get(key) is not None:
            # A stage's directory may be named differently from its step.
            written = Path(str(step.get("values", {}).get("output_dir"))).name
            found[written if written in run.stages else name] = float(step[key])
    return found


def training_cost(stage: StageResult) -> tuple[float | None, float | None]:
    """Return the number of tokens that the stage trained on and its floating-point operations, None where unknown.

    The operations are 6 x active parameters x tokens (forward and backward; Kaplan et al. 2020). If no tokens were
    logged, or an adapter was saved without its base's weights, they are what the trainer counted.
    """
    # TRL's trainers log `num_tokens`; others count the tokens of their inputs.
    tokens = last_logged(stage, "num_tokens") or last_logged(stage, "num_input_tokens_seen")
    tokens = tokens or stage.state.get("num_input_tokens_seen") or None
    if tokens and stage.active_parameters and stage.config:
        return tokens, 6.0 * stage.active_parameters * tokens
    return tokens, stage.state.get("total_flos") or None
