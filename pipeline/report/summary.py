"""metrics.json: every metric of a run, for scripts.

`summarise` returns its content. The HTML and the Markdown of the report show the same numbers.
"""

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


def summarise(run: Run, changes: Sequence[Difference], targets: Sequence[Target]) -> dict[str, Any]:
    """Return the content of metrics.json.

    An estimate is `{"value", "ci95", "n"}`, and `by_kind` where there are kinds of examples. `stages` and `baselines`
    have one for each metric. `expert_load` has `layers` as well, the load of each expert, and `pass@1_by_length` an
    estimate for each length of a problem. `other` are evaluations with a name. `metrics` says what each metric is
    called, which direction is better and on which data it was measured. Memory is in bytes of a step's largest process.

    Args:
        run: The run.
        changes: Its differences between stages.
        targets: What the recipe promises.
    """
    failures = find_failures(run)
    promises = check_targets(run, changes, targets)
    checked = [promise["promise"] for promise in promises]
    tokens = {}
    flops = {}
    for name, stage in run.stages.items():
        stage_tokens, stage_flops = training_cost(stage)
        if stage_tokens:
            tokens[name] = round(stage_tokens)
        if stage_flops:
            flops[name] = stage_flops
    return {
        "run": run.name,
        "stages": _stages(run),
        "baselines": {
            name: _to_json(baseline.metrics) | baseline.texts.get(name, {}) for name, baseline in run.baselines.items()
        },
        "other": _named_evaluations(run),
        "metrics": _descriptions(run),
        "judge": run.judge,
        "left_out": {name: stage.left_out for name, stage in run.stages.items() if stage.left_out},
        "cut_off": {name: stage.cut_off for name, stage in run.stages.items() if stage.cut_off},
        "overlap": {name: stage.overlap for name, stage in run.stages.items() if stage.overlap},
        "alarms": _alarms(run),
        "seconds": seconds(run),
        "peak_memory": {name: int(peak) for name, peak in recorded(run, "peak_memory").items() if peak},
        "hardware": run.hardware,
        "versions": run.versions,
        "seed": run.record.get("seed"),
        "commit": run.commit,
        "parameters": {name: stage.parameters for name, stage in run.stages.items() if stage.parameters},
        "tokens": tokens,
        "flops": flops,
        "differences": list(map(_change_to_json, changes)),
        "promises": promises,
        "promises_not_measured": [str(target) for target in targets if str(target) not in checked],
        "verdict": list(map(asdict, failures)),
        "not_judged": find_unjudged(run),
        "conclusion": conclude(run, failures),
        "notes": list(run.notes),
    }


def _to_json(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    """Return the JSON of each estimate."""
    return {metric: estimate.to_json() for metric, estimate in metrics.items()}


def _stages(run: Run) -> dict[str, dict[str, Any]]:
    """Return the estimates of each stage that was measured, by metric."""
    entries = {}
    for name, stage in run.stages.items():
        if not stage.metrics:
            continue
        entry = _to_json(stage.metrics)
        lengths = by_length(stage)
        if lengths:
            entry["pass@1_by_length"] = _to_json(lengths)
        if "expert_load" in entry:
            entry["expert_load"]["layers"] = stage.experts.get("layers", [])
        entries[name] = entry
    return entries


def _named_evaluations(run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Return the estimates of the named evaluations, by name, stage and metric."""
    entries: dict[str, dict[str, dict[str, Any]]] = {}
    for name, stages in run.named_evaluations.items():
        entries[name] = {stage: _to_json(metrics) for stage, metrics in stages.items()}
    return entries


def _descriptions(run: Run) -> dict[str, dict[str, str]]:
    """Return the label, the better direction and the data of each metric that a stage has."""
    entries = {}
    for stage in run.stages.values():
        for name in stage.metrics:
            info = metric_info(name)
            entries[name] = {"label": info.label, "better": info.better, "data": info.data}
    return entries


def _alarms(run: Run) -> list[dict[str, Any]]:
    """Return the alarms of training, such as {"stage": "3_ppo", "step": 40, "what": "kl", "value": 31.5}.

    Trainers log them as `alarm/<what>`.
    """
    alarms = []
    for stage in run.stages.values():
        keys = dict.fromkeys(key for record in stage.history for key in record if key.startswith("alarm/"))
        for key in keys:
            for step, value in logged(stage, key):
                what = key.removeprefix("alarm/")
                alarms.append({"stage": stage.name, "step": int(step), "what": what, "value": value})
    return alarms


def _change_to_json(change: Difference) -> dict[str, Any]:
    return {
        "stage": change.stage,
        "before": change.reference,
        "metric": change.metric,
        "aim": change.aim,
        "verdict": change.verdict,
        **change.change.to_json(),
    }


def by_length(stage: StageResult) -> dict[str, Estimate]:
    """Return pass@1 by the length of the problems (a number of steps), as text; {} if the data have no lengths."""
    values: dict[int, list[float]] = {}
    for example in stage.examples:
        if example["metric"] == "pass@1" and "length" in example:
            values.setdefault(example["length"], []).append(example["value"])
    return {str(length): outcome_mean(values[length]) for length in sorted(values)}


def seconds(run: Run) -> dict[str, float]:
    """Return the seconds of each step.

    They are in run.json. For a stage that was not trained by `run`, they are in its training log.
    """
    durations = recorded(run, "seconds")
    for name, stage in run.stages.items():
        runtime = last_logged(stage, "train_runtime")
        if runtime is not None:
            durations.setdefault(name, runtime)
    return durations


def recorded(run: Run, key: str) -> dict[str, float]:
    """Return the number that run.json records under `key` for each step, such as its "seconds".

    A training step is named by the directory of its stage, another one by its own name. Steps without the number are
    omitted, and so is the report, which cannot measure itself.
    """
    numbers: dict[str, float] = {}
    for name, step in run.steps.items():
        if name != "report" and step.get(key) is not None:
            directory = Path(str(step.get("values", {}).get("output_dir"))).name
            numbers[directory if directory in run.stages else name] = float(step[key])
    return numbers


def training_cost(stage: StageResult) -> tuple[float | None, float | None]:
    """Return the number of tokens that the stage trained on and its floating-point operations, None where unknown.

    The operations are 6 x active parameters x tokens (forward and backward; Kaplan et al. 2020). If the tokens or the
    parameters are unknown, as for an adapter, whose base model is elsewhere, they are the trainer's own count.
    """
    # TRL's trainers log `num_tokens`; others count the tokens of their inputs.
    tokens = last_logged(stage, "num_tokens") or last_logged(stage, "num_input_tokens_seen")
    tokens = tokens or stage.state.get("num_input_tokens_seen") or None
    if tokens and stage.active_parameters and stage.config:
        return tokens, 6.0 * stage.active_parameters * tokens
    return tokens, stage.state.get("total_flos") or None
