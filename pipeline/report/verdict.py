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
from pipeline.report.load import Run, main_aim, stage_info, stage_kind, twins
from pipeline.report.text import counted, interval, number, signed
from pipeline.stages import HELD_OUT, SMOKE

MAX_LOST = 0.1
"""Share of a data set's rows that may be cut, dropped or copies of training rows."""
CHANCE = 0.5
"""Accuracy and win rate of a random guess."""
REMEDIES = {
    "pretrain": "train longer (max_steps), on more text, or raise learning_rate",
    "sft": "train longer (max_steps, num_train_epochs), on more conversations, or raise learning_rate",
    "ppo": "PPO is as good as its reward model: check that one first, then train longer (max_steps), raise "
    "learning_rate or lower kl_coef",
    "grpo": "train longer (max_steps), raise learning_rate or num_generations, or start from a stage that already "
    "solves some of these problems",
}
"""What to do about a stage that misses its aim, by its kind."""


@dataclass(frozen=True)
class Finding:
    """Something that did not work in a stage or a step: a text with figures, the main figure, and a remedy."""

    stage: str
    what: str
    value: float
    remedy: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.what}. {self.remedy[:1].upper()}{self.remedy[1:]}."


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
        seen.sort(key=lambda stage: stage_info(stage.name).held_out == key)
        copies = seen[-1].overlap[key] if seen else {"found": 0, "rows": 1}
        if (share := copies["found"] / copies["rows"]) >= MAX_LOST:
            remedy = "figures measured on them partly reflect memorisation: remove these rows from training "
            remedy += f"(`{as_typed('check-overlap')}` names them), or measure on other data (evaluate.yaml)"
            what = f"{copies['found']:,} of {copies['rows']:,} held-out {key} are among the training rows"
            found.append(Finding(seen[-1].name, what + copies_in(copies), share, remedy))
    for stage in run.stages.values():
        info = stage_info(stage.name)
        if not info.generates:
            found += _chance(stage)
        elif info.aims and stage.name not in twins(run.stages):
            found += _training(run, stage)
    order = [*run.steps, *run.stages]
    return sorted(found, key=lambda finding: order.index(finding.stage) if finding.stage in order else len(order))


def shown(run: Run) -> dict[str, Any]:
    found = find_failures(run)
    return {"verdict": list(map(str, found)), "conclusion": conclude(run, found), "smoke": run.is_smoke}


def conclude(run: Run, found: list[Finding]) -> str:
    """Return the verdict in one line: what failed, what a successful run reached, or that it is a miniature."""
    if run.is_smoke:
        return f"{run.record.get('recipe') or run.name}, {SMOKE}"
    if found:
        failed = dict.fromkeys(finding.stage for finding in found)
        return f"{counted(len(found), 'thing')} did not work, in {', '.join(failed)}"
    reached: list[str] = []
    unmeasured: list[str] = []
    uncompared: list[str] = []
    for stage in run.stages.values():
        info = stage_info(stage.name)
        # An untrained model has no aim.
        if not info.generates or not info.aims:
            continue
        aim = main_aim(stage)
        if aim is None:
            unmeasured.append(stage.name)
        elif is_compared(run, stage, aim):
            reached.append(metric_info(aim).label.lower())
        else:
            uncompared.append(stage.name)
    parts = []
    if reached:
        # Only a run whose every stage was compared is praised as a whole.
        missing = [*unmeasured, *uncompared]
        stages = {1: "The stage", 2: "Both stages", 3: "All three stages", 4: "All four stages"}
        subject = stages.get(len(reached), f"All {len(reached)} stages")
        compared = " that was compared" if reached[1:] == [] else " that were compared"
        are = "they are" if reached[1:] else "it is"
        # PPO and DPO of one run have the same aim.
        aims = ", ".join(dict.fromkeys(reached))
        parts.append(f"{subject}{compared if missing else ''} did what {are} for: better {aims}")
    if uncompared:
        parts.append(f"not compared with an earlier stage: {', '.join(uncompared)}")
    if unmeasured:
        parts.append(f"not measured: {', '.join(unmeasured)}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def is_compared(run: Run, stage: StageResult, aim: str) -> bool:
    """Return whether the aim of a stage was measured on rows that the stage before, or an opponent, answered too."""
    before = run.origin(stage)
    # A win rate compares with its opponent.
    if aim == "win_rate" and before and run.against == before.name:
        return True
    return before is not None and paired(before.outcomes(aim), stage.outcomes(aim), aim) is not None


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
    what, remedy = "which chance alone may reach", "PPO would optimise noise: give it more pairs, or train it longer "
    remedy += "(num_train_epochs, learning_rate)"
    if accuracy.high is not None and accuracy.high < CHANCE:
        what, remedy = "below chance", "chosen and rejected may be swapped"
    elif stage_kind(stage.name) == "judge":
        remedy = "the win rates that it judges are noise: give it more pairs, or train it longer (num_train_epochs)"
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
    inherited = before.metrics.get("stop_rate") if before and stage_info(before.name).chats else None
    endless, was_endless = (found is not None and found.value < 0.5 for found in (rate, inherited))
    if rate and stage_info(stage.name).chats and endless and not was_endless:
        remedy = "its answers run into the limit: train longer, keep the ends of conversations (max_length), or raise "
        remedy += "the limit (max_new_tokens in evaluate.yaml)"
        yield Finding(stage.name, f"stop rate is {_shown('stop_rate', rate)}", rate.value, remedy)

    aim = main_aim(stage)
    if aim is None:
        return
    info, now = metric_info(aim), stage.metrics[aim]
    label = info.label[:1].lower() + info.label[1:]
    remedy = REMEDIES.get(stage_kind(stage.name), "train longer")
    change = paired(before.outcomes(aim), stage.outcomes(aim), aim) if before else None
    is_share_to_raise = info.share and info.better == "up"
    gained, what = True, f"{label} is {_shown(aim, now)}"
    if aim == "win_rate" and before and run.against == before.name:
        gained = now.low is None or now.low > CHANCE
        what = f"{label} against {before.name} is {_shown(aim, now)}, which does not exclude one half"
    elif change is not None and before:
        verdict = judge(aim, change)
        gained = verdict == "better"
        was, is_now = (number(side.metrics[aim].value, info.digits) for side in (before, stage))
        lost = "a loss" if verdict == "worse" else "no significant gain"
        by = f"{signed(change.value, info.digits)}, {_known(aim, change, sign=True)}"
        what = f"{label} went from {was} ({before.name}) to {is_now}, {lost} ({by})"
    elif is_share_to_raise:
        gained = now.value > 0
    if not gained:
        yield Finding(stage.name, what, now.value, remedy)
    # With fewer than a tenth right, the next stage has little to start from, whatever this one gained.
    elif aim != "win_rate" and is_share_to_raise and (now.value if now.high is None else now.high) < 0.1:
        yield Finding(stage.name, f"{label} is {_shown(aim, now)}: nearly all answers are wrong", now.value, remedy)
    for baseline in run.bars:
        for metric in stage_info(stage.name).aims:
            other = paired(baseline.outcomes(metric), stage.outcomes(metric), metric)
            verdict = "better" if other is None else judge(metric, other)
            # A stage that gained nothing is not reported again for each baseline.
            if verdict == "worse" or (verdict == "same" and gained):
                reached = f"{metric_info(metric).label.lower()} is {_shown(metric, stage.metrics[metric])}"
                figure, title = _shown(metric, baseline.metrics[metric]), run.baseline_title(baseline)
                than = f"not better than {figure} without training ({title})"
                yield Finding(stage.name, f"{reached}, {than}", stage.metrics[metric].value, remedy)
