"""The verdict on a run: what did not work, according to its metrics, and what to do about it.

Each stage is judged by its main aim, the first metric of `Run.aims_of` that was measured. The report then shows:

    find_failures   what did not work, such as a main aim without a significant gain or data that were mostly dropped
    find_unjudged   stages that cannot be judged, because they or what they started from were not measured
    conclude        both in one line
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from pipeline.errors import as_typed
from pipeline.evaluation.intervals import Estimate
from pipeline.evaluation.metric_info import metric_info
from pipeline.evaluation.results import StageResult, copies_in
from pipeline.report.curves import logged
from pipeline.report.differences import judge_change, paired_difference
from pipeline.report.load import EVALUATE, Run, stage_info
from pipeline.report.text import counted, interval, number, signed
from pipeline.stages import HELD_OUT, SMOKE, stage_order

MAX_LOST = 0.1
"""Share of a data set's rows that may be cut, dropped or copies of training rows."""
CHANCE = 0.5
"""Accuracy and win rate of a random guess."""
MIN_STOP_RATE = 0.5
"""Below it, most answers run into the limit (`MAX_CUT_OFF` of rl.alarms)."""
MAX_EQUAL_GROUPS = 0.95
"""Little is learned if the rewards within 19 of 20 groups are equal."""
MIN_REWARD_DEVIATION = 1e-3
"""Rewards with a smaller standard deviation count as equal."""
TOO_FEW = "was not judged (too few examples for an interval)"
ENVIRONMENT = "environment_reward"
"""The metric of the reward that an environment returns for an episode."""
NUMBER_WORDS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")


@dataclass(frozen=True)
class Finding:
    """Something that did not work.

    Attributes:
        stage: Name of the stage or step.
        what: What is wrong, with its values.
        value: The main value.
        remedy: What to do about it, in the imperative, without a full stop.
    """

    stage: str
    what: str
    value: float
    remedy: str

    def __str__(self) -> str:
        return f"{self.stage}: {self.what}. {self.remedy[:1].upper()}{self.remedy[1:]}."


@dataclass(frozen=True)
class Judgement:
    """Whether a stage gained in its main aim, compared with what it started from.

    Attributes:
        stage: The stage.
        aim: Its main aim, a metric; None if none of its aims was measured.
        gained: Whether the stage is significantly better than what it started from. None if that is unknown.
        what: If `gained` is None, why it is unknown, as a predicate: "was not measured". Otherwise the values, for a
            finding that says that nothing was gained: "pass@1 went from 0.500 (3_ppo) to 0.480, no significant gain".
    """

    stage: StageResult
    aim: str | None
    gained: bool | None
    what: str


def find_failures(run: Run) -> list[Finding]:
    """Return what did not work, in the order of training; nothing for a miniature."""
    if run.is_smoke:
        return []
    findings = [*_lost_rows(run), *_copied_rows(run)]
    for stage in run.stages.values():
        info = stage_info(stage)
        if not info.generates:
            findings += _guesses(stage)
        elif info.aims and stage.name not in run.other_architectures:
            findings += _uninformative_rewards(stage)
            findings += _endless_answers(run, stage)
            findings += _missed_aims(run, stage)
    order = [*run.steps, *run.stages]
    return sorted(findings, key=lambda finding: order.index(finding.stage) if finding.stage in order else len(order))


def verdict_content(run: Run, findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the content of verdict.html.jinja; `findings` are the failures from `find_failures`."""
    unjudged = find_unjudged(run)
    return {
        "verdict": list(map(str, findings)),
        # The conclusion of a run in which nothing failed names what was not judged.
        "unjudged": unjudged if findings else [],
        "conclusion": conclude(run, findings),
        "praised": not (findings or run.is_smoke or unjudged),
    }


def conclude(run: Run, findings: Sequence[Finding]) -> str:
    """Return the verdict in one line: that the run is a miniature, which stages failed, or else what was gained.

    What could not be judged follows the gains. The line is "" for a run without any stage to judge.
    """
    if run.is_smoke:
        return f"{run.record.get('recipe') or run.name}, {SMOKE}"
    if findings:
        failed = dict.fromkeys(finding.stage for finding in findings)
        return f"{counted(len(findings), 'thing')} did not work, in {', '.join(failed)}"
    judgements = [judge_stage(run, stage) for stage in _judged_stages(run) if stage_info(stage).generates]
    gained = [judgement for judgement in judgements if judgement.gained]
    lines = find_unjudged(run)
    if gained:
        # Variants of a stage have the same aim.
        aims = dict.fromkeys(metric_info(judgement.aim).label.lower() for judgement in gained if judgement.aim)
        lines = [f"{_subject(len(gained), len(judgements))} for: better {', '.join(aims)}", *lines]
    return "; ".join(lines)


def _subject(gained: int, stages: int) -> str:
    """Return "All four stages did what they are", "Three of four stages did what they are" and the like.

    Args:
        gained: How many stages gained in their main aim.
        stages: How many stages there are.
    """
    if gained < stages:
        verb = "it is" if gained == 1 else "they are"
        return f"{_number_word(gained)} of {_number_word(stages).lower()} stages did what {verb}"
    if stages == 1:
        return "The stage did what it is"
    if stages == 2:
        return "Both stages did what they are"
    return f"All {_number_word(stages).lower()} stages did what they are"


def _number_word(number: int) -> str:
    """Return "Four" for 4, and digits from 11 on."""
    return NUMBER_WORDS[number] if number < len(NUMBER_WORDS) else str(number)


def _judged_stages(run: Run) -> list[StageResult]:
    """Return the stages that are to be judged, in the order of training: those whose kind has an aim.

    These include stages without a file of results, which only run.json names, so that they are reported as unmeasured.
    """
    stages = [stage for stage in run.stages.values() if stage.name not in run.other_architectures]
    steps = {run.directory_of(step): step for step in run.steps if not step.startswith(EVALUATE)}
    for directory, step in steps.items():
        if directory not in run.stages:
            stages.append(StageResult(directory, written_by=step))
    stages = [stage for stage in stages if stage_info(stage).aims]
    return sorted(stages, key=lambda stage: stage_order(stage.name))


def find_unjudged(run: Run) -> list[str]:
    """Return a line for each stage that could not be judged, and for each baseline without a common example."""
    if run.is_smoke:
        return []
    lines = []
    for stage in _judged_stages(run):
        judgement = judge_stage(run, stage)
        if judgement.gained is None:
            lines.append(f"{stage.name} {judgement.what}")
        if not stage.metrics:
            continue
        for baseline in run.baselines_to_beat:
            shared = [name for name in run.aims_of(stage) if name in stage.metrics and name in baseline.metrics]
            if any(paired_difference(baseline.outcomes(name), stage.outcomes(name), name) is None for name in shared):
                lines.append(f"{stage.name} was not compared with {baseline.name} (they have no example in common)")
    return lines


def judge_stage(run: Run, stage: StageResult) -> Judgement:
    """Judge a stage by its main aim.

    A reward model is compared with chance. So is a win rate against the stage's own start. Any other stage is compared
    with the stage that it started from.
    """
    aim = run.main_aim(stage)
    if aim is None:
        labels = [metric_info(name).label for name in run.aims_of(stage)]
        what = f"was not measured in its aim ({labels[0]})" if stage.metrics else "was not measured"
        return Judgement(stage, None, None, what)
    starts = [run.start_of(stage)]
    parent = run.parent_stage(stage)
    if parent is not None:
        starts.append(parent.name)
    is_win_rate_against_start = aim == "win_rate" and run.against in starts
    if is_win_rate_against_start or not stage_info(stage).generates:
        return _judge_against_chance(run, stage, aim)
    return _judge_against_parent(run, stage, aim)


def _judge_against_chance(run: Run, stage: StageResult, aim: str) -> Judgement:
    """Judge a stage by whether a share, its accuracy or win rate, is significantly above one half."""
    estimate = stage.metrics[aim]
    if estimate.low is None:
        return Judgement(stage, aim, None, TOO_FEW)
    what = f"{_label(aim)} against {run.against} is {_with_interval(aim, estimate)}, which does not exclude one half"
    return Judgement(stage, aim, estimate.low > CHANCE, what)


def _judge_against_parent(run: Run, stage: StageResult, aim: str) -> Judgement:
    """Judge a stage by whether it is significantly better in `aim` than the stage that it started from."""
    start = run.start_of(stage)
    parent = run.parent_stage(stage)
    label = metric_info(aim).label
    if parent is None:
        return Judgement(stage, aim, None, f"was not compared ({start or 'what it started from'} was not measured)")
    if aim not in parent.metrics:
        return Judgement(stage, aim, None, f"was not compared ({start} was not measured in {label})")
    change = paired_difference(parent.outcomes(aim), stage.outcomes(aim), aim)
    if change is None:
        what = f"was not compared with {parent.name} (they have no example of {label} in common)"
        return Judgement(stage, aim, None, what)
    if change.low is None:
        return Judgement(stage, aim, None, TOO_FEW)
    is_better = judge_change(aim, change) == "better"
    return Judgement(stage, aim, is_better, _describe_change(aim, parent, stage, change))


def _label(metric: str) -> str:
    """Return the label of a metric as it is written within a sentence."""
    label = metric_info(metric).label
    return label[:1].lower() + label[1:]


def _describe_change(metric: str, start: StageResult, stage: StageResult, change: Estimate) -> str:
    """Return "pass@1 went from 0.500 (3_ppo) to 0.480, no significant gain (−0.020, −0.060 to +0.020, n = 300)"."""
    digits = metric_info(metric).digits
    was = number(start.metrics[metric].value, digits)
    now = number(stage.metrics[metric].value, digits)
    verdict = "a loss" if judge_change(metric, change) == "worse" else "no significant gain"
    difference = f"{signed(change.value, digits)}, {_interval_and_n(metric, change, sign=True)}"
    return f"{_label(metric)} went from {was} ({start.name}) to {now}, {verdict} ({difference})"


def _interval_and_n(metric: str, estimate: Estimate, sign: bool = False) -> str:
    """Return "0.315 to 0.685, n = 24", without what the estimate lacks; the ends are signed if `sign`."""
    parts = []
    ends = interval(estimate, metric_info(metric).digits, sign)
    if ends:
        parts.append(ends)
    if estimate.n:
        parts.append(f"n = {estimate.n:,}")
    return ", ".join(parts)


def _with_interval(metric: str, estimate: Estimate) -> str:
    """Return "0.500 (0.315 to 0.685, n = 24)"."""
    return f"{number(estimate.value, metric_info(metric).digits)} ({_interval_and_n(metric, estimate)})"


def _lost_rows(run: Run) -> Iterator[Finding]:
    """Find steps that dropped or truncated many rows of a data set."""
    for step, entry in run.steps.items():
        for lost in entry.get("lost", []):
            if lost["rows"] >= MAX_LOST * lost["of"] > 0:
                what = f"{lost['rows']:,} of {lost['of']:,} {lost['what']}"
                yield Finding(step, what, lost["rows"] / lost["of"], lost["remedy"])


def _copied_rows(run: Run) -> Iterator[Finding]:
    """Find held-out data of which at least a tenth are also training rows of the run."""
    for key in HELD_OUT:
        # Several pairs may share a prompt, which does not say which answer is better.
        if key == "pairs":
            continue
        stages = [stage for stage in run.stages.values() if stage.overlap.get(key, {}).get("rows")]
        if not stages:
            continue
        # The finding is about the stage that these data are meant for, or else about the last one measured on them.
        # The sort is stable and puts the former at the end.
        stages.sort(key=lambda stage: stage_info(stage).held_out == key)
        copies = stages[-1].overlap[key]
        share = copies["found"] / copies["rows"]
        if share >= MAX_LOST:
            remedy = (
                "metrics measured on them partly reflect memorisation: remove these rows from training "
                f"(`{as_typed('check-overlap')}` names them), or measure on other data (evaluate.yaml)"
            )
            what = f"{copies['found']:,} of {copies['rows']:,} held-out {key} are among the training rows"
            yield Finding(stages[-1].name, what + copies_in(copies), share, remedy)


def _guesses(stage: StageResult) -> Iterator[Finding]:
    """Find a reward model whose accuracy is not significantly above chance."""
    accuracy = stage.metrics.get("reward_accuracy")
    if accuracy is None or accuracy.low is None or accuracy.low > CHANCE:
        return
    figure = f"reward accuracy is {_with_interval('reward_accuracy', accuracy)}"
    if accuracy.high is not None and accuracy.high < CHANCE:
        remedy = "chosen and rejected may be swapped"
        yield Finding(stage.name, f"{figure}, below chance", accuracy.value, remedy)
    else:
        what = f"{figure}, which chance alone may reach"
        yield Finding(stage.name, what, accuracy.value, stage_info(stage).remedy)


def _uninformative_rewards(stage: StageResult) -> Iterator[Finding]:
    """Find training in which the rewards of the answers to a prompt were nearly always equal, which teaches nothing.

    GRPO logs in how many of its groups they are equal, PPO only the standard deviation of a batch's rewards.
    """
    shares = [value for _, value in logged(stage, "frac_reward_zero_std")]
    rewards = [value for _, value in logged(stage, "reward")]
    deviations = [value for _, value in logged(stage, "reward_std")]
    if shares and fmean(shares) >= MAX_EQUAL_GROUPS:
        share = fmean(shares)
        what = f"in {share:.0%} of the groups all rewards were equal"
        if rewards:
            what += f", reward {number(fmean(rewards))}"
        remedy = (
            "no answer was better than another: take easier problems if all were wrong, harder ones if all were right, "
            "raise num_generations, or start from a stage that solves some of them"
        )
        yield Finding(stage.name, what, share, remedy)
    elif not shares and deviations and max(deviations) < MIN_REWARD_DEVIATION:
        remedy = "the reward does not distinguish answers: check it, and the reward model's accuracy"
        yield Finding(stage.name, "all rewards were equal", max(deviations), remedy)


def _endless_answers(run: Run, stage: StageResult) -> Iterator[Finding]:
    """Find a stage that learned not to end its answers: most run into the limit, unlike those of its parent."""
    rate = stage.metrics.get("stop_rate")
    if rate is None or rate.value >= MIN_STOP_RATE or not stage_info(stage).chats:
        return
    parent = run.parent_stage(stage)
    if parent is not None and stage_info(parent).chats:
        inherited = parent.metrics.get("stop_rate")
        if inherited is not None and inherited.value < MIN_STOP_RATE:
            return
    remedy = (
        "its answers run into the limit: train longer, keep the ends of conversations (max_length), or raise the limit "
        "(max_new_tokens in evaluate.yaml)"
    )
    yield Finding(stage.name, f"stop rate is {_with_interval('stop_rate', rate)}", rate.value, remedy)


def _missed_aims(run: Run, stage: StageResult) -> Iterator[Finding]:
    """Find a main aim that did not improve, an environment's reward that fell, and baselines that were not beaten."""
    judgement = judge_stage(run, stage)
    aim = judgement.aim
    if aim is None:
        return
    estimate = stage.metrics[aim]
    # If no answer is right, the stage gained nothing, whatever it started from.
    if judgement.gained is None and _is_share_to_raise(aim) and estimate.value == 0:
        judgement = replace(judgement, gained=False, what=f"{_label(aim)} is {_with_interval(aim, estimate)}")
    yield from _missed_main_aim(judgement, aim)
    # If right answers are the main aim, the environment's reward is a second one.
    if aim != ENVIRONMENT:
        yield from _fallen_rewards(run, stage)
    yield from _unbeaten_baselines(run, judgement)


def _is_share_to_raise(metric: str) -> bool:
    """Return whether a metric is a share, such as an accuracy, and better if higher."""
    info = metric_info(metric)
    return info.share and info.better == "up"


def _missed_main_aim(judgement: Judgement, aim: str) -> Iterator[Finding]:
    """Find a main aim in which a stage gained nothing, or in which nearly all answers are wrong."""
    stage = judgement.stage
    estimate = stage.metrics[aim]
    remedy = stage_info(stage).remedy
    upper_end = estimate.value if estimate.high is None else estimate.high
    if judgement.gained is False:
        yield Finding(stage.name, judgement.what, estimate.value, remedy)
    # With fewer than a tenth right, the next stage has little to start from, whatever this one gained.
    elif aim != "win_rate" and _is_share_to_raise(aim) and upper_end < 0.1:
        what = f"{_label(aim)} is {_with_interval(aim, estimate)}: nearly all answers are wrong"
        yield Finding(stage.name, what, estimate.value, remedy)


def _fallen_rewards(run: Run, stage: StageResult) -> Iterator[Finding]:
    """Find an environment whose reward is significantly lower than in the stage's parent."""
    parent = run.parent_stage(stage)
    if parent is None or ENVIRONMENT not in parent.metrics or ENVIRONMENT not in stage.metrics:
        return
    change = paired_difference(parent.outcomes(ENVIRONMENT), stage.outcomes(ENVIRONMENT), ENVIRONMENT)
    if change is not None and judge_change(ENVIRONMENT, change) == "worse":
        what = _describe_change(ENVIRONMENT, parent, stage, change)
        yield Finding(stage.name, what, stage.metrics[ENVIRONMENT].value, stage_info(stage).remedy)


def _unbeaten_baselines(run: Run, judgement: Judgement) -> Iterator[Finding]:
    """Find baselines, such as the untrained model, that a stage does not beat in one of its aims.

    A baseline that is as good is only reported if the stage gained or was not compared. Otherwise its missing gain is
    reported already.
    """
    stage = judgement.stage
    for baseline in run.baselines_to_beat:
        for metric in run.aims_of(stage):
            change = paired_difference(baseline.outcomes(metric), stage.outcomes(metric), metric)
            if change is None:
                continue
            verdict = judge_change(metric, change)
            is_equal = verdict == "same" and judgement.gained is not False and metric_info(metric).better
            if verdict == "worse" or is_equal:
                reached = _with_interval(metric, stage.metrics[metric])
                untrained = _with_interval(metric, baseline.metrics[metric])
                what = (
                    f"{metric_info(metric).label.lower()} is {reached}, not better than {untrained} without training "
                    f"({run.baseline_title(baseline)})"
                )
                yield Finding(stage.name, what, stage.metrics[metric].value, stage_info(stage).remedy)
