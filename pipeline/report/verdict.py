"""The verdict on a run: what did not work, by the figures that it recorded, and what to do about it.

    3_reward: reward accuracy is 0.500 (0.315 to 0.685, n = 24), no better than chance. PPO would optimise noise: …

What a run did not record is not judged, and a miniature (`run --smoke`) is not judged at all.
"""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.evaluation.intervals import Estimate, finite
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult, copies_in
from pipeline.report.curves import logged
from pipeline.report.differences import judge, paired
from pipeline.report.load import Run
from pipeline.report.stage_order import stage_info, stage_kind, twins
from pipeline.report.text import counted, interval, number, signed
from pipeline.stages import BASELINES, HELD_OUT, SMOKE

MIN_STOP_RATE = 0.5
"""Below it, most answers of a stage that was taught to answer run into the limit (`MAX_CUT_OFF` of rl.alarms)."""

MAX_WITHOUT_SPREAD = 0.95
"""Share of groups with equal rewards, over all of training: above it, 19 of 20 samples taught nothing."""

MIN_SPREAD = 1e-3
"""Standard deviation of a batch's rewards, below which PPO sees them as equal."""

MAX_LOST = 0.1
"""Share of a data set's rows that may be cut, dropped or copies of training rows."""

CHANCE = 0.5
"""Accuracy and win rate of who guesses."""

REMEDIES = {
    "pretrain": "train longer (max_steps), on more text, or raise learning_rate",
    "sft": "train longer (max_steps, num_train_epochs), on more conversations, or raise learning_rate",
    "ppo": "PPO is as good as its reward model: check that one first, then train longer (max_steps), raise "
    "learning_rate or lower kl_coef",
    "grpo": "train longer (max_steps), raise learning_rate or num_generations, or start from a stage that already "
    "solves some of these problems",
}
"""What to do about a stage that does not reach its aim, by its kind."""


@dataclass(frozen=True)
class Finding:
    """Something that did not work.

    Attributes:
        stage: The stage, or the step, that it is about.
        what: What is wrong, with its figures.
        value: The main one of these.
        remedy: What to do.
    """

    stage: str
    what: str
    value: float
    remedy: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.what}. {self.remedy[:1].upper()}{self.remedy[1:]}."


def find_failures(run: Run) -> list[Finding]:
    """Return what did not work, in the order of training; nothing of a miniature."""
    if is_smoke(run):
        return []
    found = [*_rows_lost(run), *_copies(run)]
    for stage in run.stages.values():
        info = stage_info(stage.name)
        if not info.generates:
            found += _chance(stage)
        elif info.aims and stage.name not in twins(run.stages):
            before = _origin(run, stage)
            found += [*_no_spread(stage), *_same_weights(run, stage, before), *_endless(stage, before)]
            found += _aim(run, stage, before)
    order = [*run.steps, *run.stages]
    return sorted(found, key=lambda finding: order.index(finding.stage) if finding.stage in order else len(order))


def shown(run: Run, found: list[Finding]) -> dict[str, Any]:
    """Return what verdict.html.jinja shows."""
    return {"verdict": list(map(str, found)), "conclusion": conclude(run, found), "smoke": is_smoke(run)}


def is_smoke(run: Run) -> bool:
    """Return whether a run is a miniature, whose figures mean nothing."""
    return bool(run.record.get("smoke"))


def conclude(run: Run, found: list[Finding]) -> str:
    """Return the verdict in one line: what failed, what a run without failures reached, or that it is a miniature."""
    if is_smoke(run):
        return f"{run.record.get('recipe') or run.name}, {SMOKE}"
    if found:
        failed = list(dict.fromkeys(finding.stage for finding in found))
        return f"{counted(len(found), 'thing')} did not work, in {', '.join(failed)}"
    aims = [_aim_of(stage) for stage in run.stages.values() if stage_info(stage.name).generates]
    reached = [metric_info(aim).label.lower() for aim in aims if aim]
    if not reached:
        return ""
    stages = {1: "The stage", 2: "Both stages", 3: "All three stages", 4: "All four stages"}
    subject, are = stages.get(len(reached), f"All {len(reached)} stages"), "they are" if reached[1:] else "it is"
    return f"{subject} did what {are} for: better {', '.join(reached)}"


def _aim_of(stage: StageResult) -> str | None:
    """Return the main metric that a stage is trained for and was measured by, if there is one."""
    return next((name for name in stage_info(stage.name).aims if name in stage.metrics), None)


def _origin(run: Run, stage: StageResult) -> StageResult | None:
    """Return the stage that another one started from, None if the run does not have it."""
    values = run.steps.get(stage.name, {}).get("values")
    named = Path(str(values.get("model_name_or_path") or "")).name if isinstance(values, dict) else ""
    if named in run.stages and named != stage.name:
        return run.stages[named]
    before = None
    for other in run.stages.values():
        if other.name == stage.name:
            return before
        if stage_info(other.name).generates and other.metrics and other.name not in twins(run.stages):
            before = other
    return None


def _shown(metric: str, estimate: Estimate) -> str:
    """Return "0.500 (0.315 to 0.685, n = 24)"."""
    digits = metric_info(metric).digits
    known = filter(None, (interval(estimate, digits), f"n = {estimate.n:,}" if estimate.n else ""))
    return f"{number(estimate.value, digits)} ({', '.join(known)})"


def _chance(stage: StageResult) -> Iterator[Finding]:
    """Find a reward model that may be guessing."""
    accuracy = stage.metrics.get("reward_accuracy")
    if accuracy is None or accuracy.low is None or accuracy.low > CHANCE:
        return
    shown = f"reward accuracy is {_shown('reward_accuracy', accuracy)}"
    if accuracy.high is not None and accuracy.high < CHANCE:
        yield Finding(stage.name, f"{shown}, below chance", accuracy.value, "chosen and rejected may be swapped")
        return
    remedy = "PPO would optimise noise: give it more pairs, or train it longer (num_train_epochs, learning_rate)"
    if stage_kind(stage.name) == "judge":
        remedy = "the win rates that it judges are noise: give it more pairs, or train it longer (num_train_epochs)"
    yield Finding(stage.name, f"{shown}, which chance alone may reach", accuracy.value, remedy)


def _aim(run: Run, stage: StageResult, before: StageResult | None) -> Iterator[Finding]:
    """Find an aim that a stage does not improve, and baselines that it does not beat."""
    aim = _aim_of(stage)
    if aim is None:
        return
    label = metric_info(aim).label[:1].lower() + metric_info(aim).label[1:]
    now, remedy = stage.metrics[aim], REMEDIES.get(stage_kind(stage.name), "train longer")
    change = paired(before.outcomes(aim), stage.outcomes(aim), aim) if before else None
    gained = True
    if aim == "win_rate" and before and run.against == before.name:
        gained = now.low is None or now.low > CHANCE
        what = f"{label} against {before.name} is {_shown(aim, now)}, which does not exclude one half"
    elif change is not None and before:
        gained = judge(aim, change) == "better"
        digits = metric_info(aim).digits
        went = f"{label} went from {number(before.metrics[aim].value, digits)} ({before.name}) to "
        went += f"{number(now.value, digits)}"
        lost = judge(aim, change) == "worse"
        of = ", ".join(filter(None, (interval(change, digits, sign=True), f"n = {change.n:,}" if change.n else "")))
        what = f"{went}, {'a loss' if lost else 'no significant gain'} ({signed(change.value, digits)}, {of})"
    elif metric_info(aim).share and metric_info(aim).better == "up":
        gained = now.value > 0
        what = f"{label} is {_shown(aim, now)}"
    if not gained:
        yield Finding(stage.name, what, now.value, remedy)
    for name, baseline in run.baselines.items():
        for metric in stage_info(stage.name).aims:
            other = paired(baseline.outcomes(metric), stage.outcomes(metric), metric)
            verdict = "better" if other is None else judge(metric, other)
            # What does not gain at all is not named again for each baseline that is no better.
            if verdict == "worse" or (verdict == "same" and gained):
                reached = f"{metric_info(metric).label.lower()} is {_shown(metric, stage.metrics[metric])}"
                title = BASELINES[name].title.format(against=run.against) if name in BASELINES else name
                texts = baseline.texts.get(name, {})
                text = texts.get(metric.replace("win_rate", "text")) or texts.get("text", "")
                title += f" “{text.strip()}”" if text.strip() else ""
                than = f"not better than {_shown(metric, baseline.metrics[metric])} without training ({title})"
                yield Finding(stage.name, f"{reached}, {than}", stage.metrics[metric].value, remedy)


def _endless(stage: StageResult, before: StageResult | None) -> Iterator[Finding]:
    """Find a stage whose answers do not end, unless it has that from the stage before it."""
    rate = stage.metrics.get("stop_rate")
    if rate is None or not stage_info(stage.name).chats or rate.value >= MIN_STOP_RATE:
        return
    inherited = before.metrics.get("stop_rate") if before and stage_info(before.name).chats else None
    if inherited is None or inherited.value >= MIN_STOP_RATE:
        remedy = "its answers run into the limit: train longer, keep the ends of conversations (max_length), or raise "
        remedy += "the limit (max_new_tokens in evaluate.yaml)"
        yield Finding(stage.name, f"stop rate is {_shown('stop_rate', rate)}", rate.value, remedy)


def _no_spread(stage: StageResult) -> Iterator[Finding]:
    """Find rewards that were nearly always equal, so that there was nothing to learn from them."""
    useless = [value for _, value in logged(stage, "frac_reward_zero_std")]
    rewards = [value for _, value in logged(stage, "reward")]
    spread = [value for _, value in logged(stage, "reward_std")]
    if useless and fmean(useless) >= MAX_WITHOUT_SPREAD:
        share, reward = fmean(useless), f", reward {number(fmean(rewards))}" if rewards else ""
        what = f"in {share:.0%} of the groups all rewards were equal{reward}"
        remedy = "no answer was better than another: take easier problems if all were wrong, harder ones if all were "
        remedy += "right, raise num_generations, or start from a stage that solves some of them"
        yield Finding(stage.name, what, share, remedy)
    elif not useless and spread and max(spread) < MIN_SPREAD:
        remedy = "the reward tells no answer from another: check it, and the reward model's accuracy"
        yield Finding(stage.name, "all rewards were equal", max(spread), remedy)


def _same_weights(run: Run, stage: StageResult, before: StageResult | None) -> Iterator[Finding]:
    """Find a stage whose weights are the ones that it started from."""
    files = sorted(path.name for path in (run.path / stage.name).glob("model*.safetensors"))
    if before is None or not files:
        return
    pairs = [(run.path / before.name / name, run.path / stage.name / name) for name in files]
    try:
        # Files that differ do so in their first blocks, so that even large ones take no time.
        same = all(one.is_file() and filecmp.cmp(one, other, shallow=False) for one, other in pairs)
    except OSError:
        return
    if same:
        remedy = "training changed nothing: rewards without spread, or a learning_rate of 0, have no gradient"
        yield Finding(stage.name, f"its weights equal those of {before.name} to the bit", 0.0, remedy)


def _rows_lost(run: Run) -> Iterator[Finding]:
    """Find data sets of which a step has cut or dropped many rows."""
    for step, entry in run.steps.items():
        for lost in lost_rows(entry):
            if lost["rows"] >= MAX_LOST * lost["of"] > 0:
                share = lost["rows"] / lost["of"]
                yield Finding(step, f"{lost['rows']:,} of {lost['of']:,} {lost['what']}", share, lost["remedy"])


def lost_rows(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Return `{"rows", "of", "what", "remedy"}` for each kind of rows that a step of run.json has cut or dropped."""
    lost = entry.get("lost")
    keys = {"rows": int, "of": int, "what": str, "remedy": str}
    return [
        item
        for item in (lost if isinstance(lost, list) else ())
        if isinstance(item, dict) and all(isinstance(item.get(key), kind) for key, kind in keys.items())
    ]


def _copies(run: Run) -> Iterator[Finding]:
    """Find held-out data that the run trains on."""
    for key in HELD_OUT:
        # Several pairs may share a prompt, which does not say which answer is better.
        if key == "pairs":
            continue
        # The stage that is judged by these data, or else the last one that was measured on them.
        seen = [stage for stage in run.stages.values() if finite(stage.overlap.get(key, {}).get("rows"))]
        own = [stage for stage in seen if stage_info(stage.name).held_out == key]
        if not seen:
            continue
        stage = (own or seen)[-1]
        found = stage.overlap[key]
        if (share := (finite(found["found"]) or 0) / found["rows"]) >= MAX_LOST:
            remedy = "figures that are measured on them are partly memory: remove these rows from training "
            remedy += "(`python -m pipeline check-overlap` names them), or measure on other data (evaluate.yaml)"
            what = f"{found['found']:,} of {found['rows']:,} held-out {key} are among the training rows"
            what += copies_in(found)
            yield Finding(stage.name, what, share, remedy)
