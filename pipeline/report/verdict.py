"""The verdict on a run: what did not work, according to its figures, and what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.errors import as_typed
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult, copies_in
from pipeline.report.curves import logged
from pipeline.report.differences import judge, paired
from pipeline.report.load import EVALUATE, Run, main_aim, stage_info, stage_order
from pipeline.report.text import counted, interval, number, signed
from pipeline.stages import HELD_OUT, SMOKE

MAX_LOST = 0.1
"""Share of a data set's rows that may be cut, dropped or copies of training rows."""
CHANCE = 0.5
"""Accuracy and win rate of a random guess."""
NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


@dataclass(frozen=True)
class Finding:
    """Something that did not work in a stage or a step: a text with figures, the main figure, and a remedy."""

    stage: str
    what: str
    value: float
    remedy: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.what}. {self.remedy[:1].upper()}{self.remedy[1:]}."


@dataclass(frozen=True)
class Judgement:
    """Whether a stage gained in its main aim, compared with what it started from.

    `aim` is None if none of its aims was measured; `gained` is None if it could not be compared. `what` then says why,
    and otherwise gives the figures.
    """

    stage: StageResult
    aim: str | None
    gained: bool | None
    what: str


def find_failures(run: Run) -> list[Finding]:
    """Return what did not work, in the order of training; nothing for a miniature."""
    if run.is_smoke:
        return []
    found = []
    # Data sets with many rows truncated or dropped by a step.
    for step, entry in run.steps.items():
        for lost in entry.get("lost", []):
            if lost["rows"] >= MAX_LOST * lost["of"] > 0:
                share, what = lost["rows"] / lost["of"], f"{lost['rows']:,} of {lost['of']:,} {lost['what']}"
                found.append(Finding(step, what, share, lost["remedy"]))
    # Held-out data that the run trains on. Several pairs may share a prompt, which does not say which answer is better.
    for key in [key for key in HELD_OUT if key != "pairs"]:
        # The stage that these data are meant for, or else the last one that was measured on them.
        seen = [stage for stage in run.stages.values() if stage.overlap.get(key, {}).get("rows")]
        seen.sort(key=lambda stage: stage_info(stage).held_out == key)
        copies = seen[-1].overlap[key] if seen else {"found": 0, "rows": 1}
        if (share := copies["found"] / copies["rows"]) >= MAX_LOST:
            remedy = "figures measured on them partly reflect memorisation: remove these rows from training "
            remedy += f"(`{as_typed('check-overlap')}` names them), or measure on other data (evaluate.yaml)"
            what = f"{copies['found']:,} of {copies['rows']:,} held-out {key} are among the training rows"
            found.append(Finding(seen[-1].name, what + copies_in(copies), share, remedy))
    for stage in run.stages.values():
        info = stage_info(stage)
        if not info.generates:
            found += _chance(stage)
        elif info.aims and stage.name not in run.twins:
            found += _training(run, stage)
    order = [*run.steps, *run.stages]
    return sorted(found, key=lambda finding: order.index(finding.stage) if finding.stage in order else len(order))


def shown(run: Run) -> dict[str, Any]:
    found = find_failures(run)
    # The conclusion of a run in which nothing failed names what was not judged.
    unjudged = find_unjudged(run) if found else []
    return {
        "verdict": list(map(str, found)),
        "unjudged": unjudged,
        "conclusion": conclude(run, found),
        "praised": not (found or run.is_smoke or find_unjudged(run)),
    }


def conclude(run: Run, found: list[Finding]) -> str:
    """Return the verdict in one line: what failed, what a successful run reached, or that it is a miniature."""
    if run.is_smoke:
        return f"{run.record.get('recipe') or run.name}, {SMOKE}"
    if found:
        failed = dict.fromkeys(finding.stage for finding in found)
        return f"{counted(len(found), 'thing')} did not work, in {', '.join(failed)}"
    judgements = [judge_stage(run, stage) for stage in _trained(run) if stage_info(stage).generates]
    gained = [judgement for judgement in judgements if judgement.gained]
    lines = find_unjudged(run)
    if gained:
        # Variants of a stage have the same aim.
        aims = dict.fromkeys(metric_info(judgement.aim).label.lower() for judgement in gained if judgement.aim)
        lines = [f"{_subject(len(gained), len(judgements))} for: better {', '.join(aims)}", *lines]
    return "; ".join(lines)


def _subject(gained: int, stages: int) -> str:
    """Return "All four stages did what they are", "Three of four stages did what they are" and the like."""
    of, of_all = (NUMBERS[n].lower() if n < len(NUMBERS) else f"{n}" for n in (gained, stages))
    if gained < stages:
        return f"{of.capitalize()} of {of_all} stages did what {'it is' if gained == 1 else 'they are'}"
    subject = {1: "The stage", 2: "Both stages"}.get(stages, f"All {of_all} stages")
    return f"{subject} did what {'it is' if stages == 1 else 'they are'}"


def _trained(run: Run) -> list[StageResult]:
    """Return the stages that are to be judged: all that have an aim, also if only the record names them."""
    stages = [stage for stage in run.stages.values() if stage.name not in run.twins]
    names = {run.directory_of(step): step for step in run.steps if not step.startswith(EVALUATE)}
    stages += [StageResult(name, written_by=step) for name, step in names.items() if name not in run.stages]
    stages = [stage for stage in stages if stage_info(stage).aims]
    return sorted(stages, key=lambda stage: stage_order(stage.name))


def find_unjudged(run: Run) -> list[str]:
    """Return a line for each stage that was not measured or not compared, and for each missing comparison."""
    if run.is_smoke:
        return []
    lines = []
    for stage in _trained(run):
        judgement = judge_stage(run, stage)
        if judgement.gained is None:
            lines.append(f"{stage.name} {judgement.what}")
        for baseline in run.bars if stage.metrics else ():
            shared = [name for name in stage_info(stage).aims if name in stage.metrics and name in baseline.metrics]
            if any(paired(baseline.outcomes(name), stage.outcomes(name), name) is None for name in shared):
                lines.append(f"{stage.name} was not compared with {baseline.name} (they have no example in common)")
    return lines


def judge_stage(run: Run, stage: StageResult) -> Judgement:
    """Judge a stage by its main aim: a reward model against chance, another one against what it started from."""
    aim, start, before = main_aim(stage), run.start_of(stage), run.origin(stage)
    if aim is None:
        labels = [metric_info(name).label for name in stage_info(stage).aims]
        what = f"was not measured in its aim ({labels[0]})" if stage.metrics else "was not measured"
        return Judgement(stage, None, None, what)
    info, now = metric_info(aim), stage.metrics[aim]
    label = info.label[:1].lower() + info.label[1:]
    few = "was not judged (too few examples for an interval)"
    is_match = aim == "win_rate" and run.against in (start, before.name if before else "")
    if is_match or not stage_info(stage).generates:
        # One half would be chance, or an opponent that is as good.
        if now.low is None:
            return Judgement(stage, aim, None, few)
        what = f"{label} against {run.against} is {_shown(aim, now)}, which does not exclude one half"
        return Judgement(stage, aim, now.low > CHANCE, what)
    if before is None or aim not in before.metrics:
        missing = f"{start or 'what it started from'} was not measured" + (f" in {info.label}" if before else "")
        return Judgement(stage, aim, None, f"was not compared ({missing})")
    change = paired(before.outcomes(aim), stage.outcomes(aim), aim)
    if change is None:
        what = f"was not compared with {before.name} (they have no example of {info.label} in common)"
        return Judgement(stage, aim, None, what)
    if change.low is None:
        return Judgement(stage, aim, None, few)
    return Judgement(stage, aim, judge(aim, change) == "better", _change(aim, before, stage, change))


def _change(metric: str, before: StageResult, stage: StageResult, change: Estimate) -> str:
    """Return "pass@1 went from 0.500 (3_ppo) to 0.480, no significant gain (−0.020, −0.060 to +0.020, n = 300)"."""
    info = metric_info(metric)
    label = info.label[:1].lower() + info.label[1:]
    was, is_now = (number(side.metrics[metric].value, info.digits) for side in (before, stage))
    lost = "a loss" if judge(metric, change) == "worse" else "no significant gain"
    by = f"{signed(change.value, info.digits)}, {_known(metric, change, sign=True)}"
    return f"{label} went from {was} ({before.name}) to {is_now}, {lost} ({by})"


def _known(metric: str, estimate: Estimate, sign: bool = False) -> str:
    """Return "0.315 to 0.685, n = 24", or the known part of that."""
    ends = interval(estimate, metric_info(metric).digits, sign)
    return ", ".join(filter(None, (ends, f"n = {estimate.n:,}" if estimate.n else "")))


def _shown(metric: str, estimate: Estimate) -> str:
    """Return "0.500 (0.315 to 0.685, n = 24)"."""
    return f"{number(estimate.value, metric_info(metric).digits)} ({_known(metric, estimate)})"


def _chance(stage: StageResult) -> Iterator[Finding]:
    """Find a reward model that may be guessing."""
    accuracy = stage.metrics.get("reward_accuracy")
    if accuracy is None or accuracy.low is None or accuracy.low > CHANCE:
        return
    what, remedy = "which chance alone may reach", stage_info(stage).remedy
    if accuracy.high is not None and accuracy.high < CHANCE:
        what, remedy = "below chance", "chosen and rejected may be swapped"
    shown = f"reward accuracy is {_shown('reward_accuracy', accuracy)}, {what}"
    yield Finding(stage.name, shown, accuracy.value, remedy)


def _training(run: Run, stage: StageResult) -> Iterator[Finding]:
    """Find equal rewards, answers that do not end, an aim that is not improved, and baselines that are not beaten."""
    # If 19 of 20 groups have equal rewards, little is learned. PPO's count as equal if they deviate by less than 0.001.
    keys = ("frac_reward_zero_std", "reward", "reward_std")
    useless, rewards, spread = ([value for _, value in logged(stage, key)] for key in keys)
    if useless and (share := fmean(useless)) >= 0.95:
        reward = f", reward {number(fmean(rewards))}" if rewards else ""
        remedy = "no answer was better than another: take easier problems if all were wrong, harder ones if all were "
        remedy += "right, raise num_generations, or start from a stage that solves some of them"
        yield Finding(stage.name, f"in {share:.0%} of the groups all rewards were equal{reward}", share, remedy)
    elif not useless and spread and max(spread) < 1e-3:
        remedy = "the reward does not distinguish answers: check it, and the reward model's accuracy"
        yield Finding(stage.name, "all rewards were equal", max(spread), remedy)

    # Below a stop rate of one half, most answers run into the limit (`MAX_CUT_OFF` of rl.alarms). If that is also true
    # of the stage before, it is not the fault of this one.
    before, rate = run.origin(stage), stage.metrics.get("stop_rate")
    inherited = before.metrics.get("stop_rate") if before and stage_info(before).chats else None
    endless, was_endless = (found is not None and found.value < 0.5 for found in (rate, inherited))
    if rate and stage_info(stage).chats and endless and not was_endless:
        remedy = "its answers run into the limit: train longer, keep the ends of conversations (max_length), or raise "
        remedy += "the limit (max_new_tokens in evaluate.yaml)"
        yield Finding(stage.name, f"stop rate is {_shown('stop_rate', rate)}", rate.value, remedy)

    judgement = judge_stage(run, stage)
    aim = judgement.aim
    if aim is None:
        return
    info, now = metric_info(aim), stage.metrics[aim]
    label = info.label[:1].lower() + info.label[1:]
    remedy = stage_info(stage).remedy
    gained, what = judgement.gained, judgement.what
    is_share_to_raise = info.share and info.better == "up"
    # An accuracy of 0 needs no comparison.
    if gained is None and is_share_to_raise and now.value == 0:
        gained, what = False, f"{label} is {_shown(aim, now)}"
    if gained is False:
        yield Finding(stage.name, what, now.value, remedy)
    # With fewer than a tenth right, the next stage has little to start from, whatever this one gained.
    elif aim != "win_rate" and is_share_to_raise and (now.value if now.high is None else now.high) < 0.1:
        yield Finding(stage.name, f"{label} is {_shown(aim, now)}: nearly all answers are wrong", now.value, remedy)
    # What an environment pays is an aim next to right answers.
    reward = "environment_reward"
    if aim != reward and before and reward in before.metrics and reward in stage.metrics:
        change = paired(before.outcomes(reward), stage.outcomes(reward), reward)
        if change and judge(reward, change) == "worse":
            what = _change(reward, before, stage, change)
            yield Finding(stage.name, what, stage.metrics[reward].value, remedy)
    for baseline in run.bars:
        for metric in stage_info(stage).aims:
            other = paired(baseline.outcomes(metric), stage.outcomes(metric), metric)
            verdict = "better" if other is None else judge(metric, other)
            # A stage that gained nothing is not reported again for each baseline.
            if verdict == "worse" or (verdict == "same" and gained is not False and metric_info(metric).better):
                reached = f"{metric_info(metric).label.lower()} is {_shown(metric, stage.metrics[metric])}"
                figure, title = _shown(metric, baseline.metrics[metric]), run.baseline_title(baseline)
                than = f"not better than {figure} without training ({title})"
                yield Finding(stage.name, f"{reached}, {than}", stage.metrics[metric].value, remedy)
