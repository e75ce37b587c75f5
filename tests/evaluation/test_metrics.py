"""Metrics and intervals against brute force and figures worked out by hand."""

import itertools
import json
import math
import socket
import statistics
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import intervals, metrics, reward_model, win_rate
from pipeline.evaluation.metric_info import metric_info, metric_order
from pipeline.evaluation.metrics import (
    BitsPerByte,
    InstructionAccuracy,
    MajorityVote,
    PassAtK,
    StepRate,
    StopRate,
    estimate_pass_at_k,
)
from pipeline.evaluation.reward_model import RewardAccuracy, calibration_error, squared_calibration_error
from pipeline.evaluation.win_rate import LastSentenceShare, WinRate
from pipeline.report.differences import judge_change, paired_difference
from recipes.worlds.pocket.annotators import judge_match

ROW = {"require": [["red"]], "reject": ["blue"], "max_words": 3, "test": ""}
INPUTS = {
    BitsPerByte: {"predictions": [1.0], "references": ["text"]},
    InstructionAccuracy: {"predictions": ["red"], "references": [ROW]},
    LastSentenceShare: {"predictions": ["red"]},
    MajorityVote: {"predictions": [["The answer is 3."]], "rows": [{"answer": "3"}]},
    PassAtK: {"predictions": [["The answer is 3."]], "rows": [{"answer": "3"}]},
    RewardAccuracy: {"predictions": [1.0], "references": [0.0]},
    StepRate: {"predictions": ["1 + 1 = 2. The answer is 2."]},
    StopRate: {"predictions": [[1, 2]], "eos_token_id": 2},
    WinRate: {"predictions": [0.5]},
}


def test_every_metric_has_inputs_here():
    modules = (win_rate, metrics, reward_model)
    defined = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    assert {value for value in defined if issubclass(value, evaluate.Metric)} == {
        *INPUTS,
        metrics.Metric,
        evaluate.Metric,
    }


@pytest.mark.parametrize("metric", INPUTS, ids=lambda metric: metric.__name__)
def test_every_metric_computes_offline(metric, monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric wants the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    result = metric().compute(**INPUTS[metric])
    assert len(result["values"]) == result["n"] == 1
    if result["ci95"] is None:
        assert metric in (BitsPerByte, WinRate), "a bootstrap over one example says nothing about others"
    else:
        assert result["ci95"][0] <= result["value"] <= result["ci95"][1]
    assert metric().description
    assert result == metric.measure(*INPUTS[metric].values())


WITHOUT_EVALUATE = """
import json, sys
sys.modules["evaluate"] = None
from pipeline.evaluation import metrics, reward_model, stage, win_rate
results = {}
for name, inputs in json.load(sys.stdin).items():
    module = next(module for module in (metrics, reward_model, win_rate) if hasattr(module, name))
    results[name] = getattr(module, name).measure(*inputs.values())
print(json.dumps(results))
"""


def test_every_metric_computes_without_the_library_evaluate():
    inputs = {metric.__name__: values for metric, values in INPUTS.items()}
    command = [sys.executable, "-c", WITHOUT_EVALUATE]
    printed = subprocess.run(command, input=json.dumps(inputs), capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == {metric.__name__: metric().compute(**values) for metric, values in INPUTS.items()}


def interval(estimate):
    return estimate.low, estimate.high


@settings(deadline=None)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_sets_with_a_right_sample(case):
    n, correct, k = case
    samples = [1] * correct + [0] * (n - correct)
    sets = [any(chosen) for chosen in itertools.combinations(samples, k)]
    assert estimate_pass_at_k(n, correct, k) == pytest.approx(sum(sets) / len(sets))


@pytest.mark.parametrize(("n", "correct", "k"), [(8, 9, 1), (8, -1, 1), (8, 1, 0), (8, 1, 9)])
def test_pass_at_k_refuses_impossible_counts(n, correct, k):
    with pytest.raises(ValueError):
        estimate_pass_at_k(n, correct, k)


def test_pass_at_k_averages_over_problems():
    answers = [["The answer is 3.", "The answer is 4."], ["The answer is 1.", "The answer is 2."]]
    rows = [{"answer": "3"}, {"answer": "9"}]
    one = PassAtK().compute(predictions=answers, rows=rows, k=1)
    two = PassAtK().compute(predictions=answers, rows=rows, k=2)
    assert one["values"] == [0.5, 0.0] and one["value"] == 0.25 and one["n"] == 2
    assert two["values"] == [1.0, 0.0] and two["value"] == 0.5
    assert two["ci95"] == pytest.approx(intervals.wilson(1, 2))


@pytest.mark.parametrize(
    ("finals", "reference", "right"),
    [
        (["3", "4", "4"], "4", True),
        (["3", "4", "4"], "3", False),
        # If two answers are equally frequent, the one drawn first counts.
        (["3", "4"], "3", True),
        (["4", "3"], "3", False),
        # Equal numbers are one answer, however they are written.
        (["1/2", "3", "0.5"], "0.5", True),
        (["0", "5", "0.0"], "0", True),
        (["East", "west", "the east"], "east", True),
        # A completion without a final answer does not vote.
        ([None, None, "3"], "3", True),
        ([None, None], "3", False),
    ],
)
def test_the_majority_of_the_samples_decides(finals, reference, right):
    answers = ["I do not know 3." if final is None else f"1+1=2. The answer is {final}." for final in finals]
    assert MajorityVote().compute(predictions=[answers], rows=[{"answer": reference}])["values"] == [right]


@pytest.mark.parametrize(
    ("answers", "share"),
    [
        (["A fox. Have a nice day.", "A cat. have a nice day!", "Have a nice day. A dog.", "Have a nice day"], 0.75),
        (["A fox. Yes.", "A cat. No.", "A dog.", "A hen. Well."], 0.25),
        (["", "", "A fox."], 2 / 3),
        (["It is 3.5 m long. Bye.", "Bye."], 1.0),
    ],
)
def test_how_many_answers_end_alike(answers, share):
    assert LastSentenceShare().compute(predictions=answers)["value"] == pytest.approx(share)


@pytest.mark.parametrize(("samples", "problems"), [(1, 512), (4, 128), (8, 64), (100, 64)])
def test_fewer_samples_are_drawn_for_more_problems(samples, problems):
    rows = [{"answer": number} for number in range(600)]
    assert len(metrics.sampled_problems(rows, samples)) == problems
    assert metrics.sampled_problems(rows[:60], samples) == rows[:60]


def test_wilson_by_hand():
    # 8 of 10: (0.8 + 1.92/10 -+ 1.96 sqrt(0.016 + 0.9604/100)) / (1 + 3.8415/10)
    assert intervals.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert intervals.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert intervals.wilson(0, 0) == (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_solves_its_equation(case):
    successes, n = case
    low, high = intervals.wilson(successes, n)
    share = successes / n
    assert 0 <= low <= share <= high <= 1
    # At both ends, unless they are 0 or 1, |share - p| = z sqrt(p (1 - p) / n).
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    result = intervals.mean(list(values))
    half = 1.96 * values.std() / 20
    assert result.value == pytest.approx(values.mean())
    assert interval(result) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    assert result == intervals.mean(list(values))


def test_bootstrap_resamples_whole_units():
    # One long document decides the ratio: resampling tokens instead of documents would hide how much.
    low, high = interval(intervals.ratio([1.0, 1.0, 1000.0], [1.0, 1.0, 100.0]))
    assert low == pytest.approx(1.0) and high == pytest.approx(10.0)


def test_bootstrap_of_many_units_is_computed_in_parts_that_fit_into_memory(monkeypatch):
    values = [i % 7 for i in range(500)]
    whole = intervals.mean(values)
    monkeypatch.setattr(intervals, "MOST_COUNTS", 3 * 500)
    tracemalloc.start()
    assert interval(intervals.mean(values)) == pytest.approx(interval(whole))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000, "all draws together have 8 MB"


def test_one_unit_has_no_interval():
    found = [
        intervals.mean([1.0, 2.0], units=["a", "a"]),
        intervals.outcome_mean([0.5, 1.0], units=["a", "a"]),
        intervals.ratio([3.0], [2.0]),
        intervals.statistic(lambda index: 1.5, ["a", "a"]),
        calibration_error(np.array([1.0, -2.0]), ["a", "a"]),
    ]
    assert [(estimate.low, estimate.high) for estimate in found] == [(None, None)] * 5
    assert [estimate.value for estimate in found[:4]] == [1.5, 0.75, 1.5, 1.5]
    before, after = {("row", "1", ""): (0.2, 1.0, "")}, {("row", "1", ""): (0.9, 1.0, "")}
    change = paired_difference(before, after)
    assert change is not None and change.value == pytest.approx(0.7)
    assert judge_change("mean_length", change) == judge_change("pass@1", change) == "same"


def test_bits_per_byte_weighs_by_bytes():
    # Both texts have two bytes.
    texts = ["ab", "é"]
    result = BitsPerByte().compute(predictions=[math.log(2) * 8, math.log(2) * 2], references=texts)
    assert result["value"] == pytest.approx(10 / 4)
    assert result["values"] == pytest.approx([4.0, 1.0])


def test_instruction_accuracy_grades_by_each_row():
    row = {"require": [["red"]], "reject": ["blue"], "max_words": 3, "test": ""}
    result = InstructionAccuracy().compute(predictions=["red", "red blue", "not it"], references=[row] * 3)
    assert result["values"] == [1.0, 0.0, 0.0] and result["value"] == pytest.approx(1 / 3)
    assert result["ci95"] == pytest.approx(intervals.wilson(1, 3))


def test_stop_and_step_rates_count():
    # Padding after an end token does not matter.
    assert StopRate().compute(predictions=[[5, 2, 0, 0], [5, 6], []], eos_token_id=2)["values"] == [1.0, 0.0, 0.0]
    assert StopRate().compute(predictions=[[5, 7], [5, 6]], eos_token_id=[2, 7])["values"] == [1.0, 0.0]
    steps = StepRate().compute(predictions=["1+1=2. The answer is 2.", "The answer is 2."])
    assert steps["value"] == 0.5 and steps["n"] == 2


def test_reward_accuracy_by_hand():
    result = RewardAccuracy().compute(predictions=[2.0, 0.0, 1.0], references=[1.0, 1.0, 1.0])
    assert result["values"] == [1.0, 0.0, 0.5] and result["value"] == pytest.approx(0.5)
    assert result["margin"]["value"] == pytest.approx(0.0)


def test_calibration_error_by_hand():
    # sigmoid(log 3) = 0.75, and three of four pairs are in order: perfectly calibrated.
    margins = np.log(3) * np.array([1.0, 1.0, 1.0, -1.0])
    assert squared_calibration_error(margins, debiased=False) == pytest.approx(0.0, abs=1e-9)
    assert squared_calibration_error(margins) == pytest.approx(-(0.75 * 0.25) / 3)
    assert squared_calibration_error(-np.log(3) * np.ones(4), debiased=False) == pytest.approx(0.75**2)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50), st.booleans())
def test_calibration_error_equals_a_loop_over_bins(margins, debiased):
    agrees = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
    confidence = [1 / (1 + math.exp(-abs(margin))) for margin in margins]
    total = count = 0.0
    for b in range(10):
        inside = [i for i, c in enumerate(confidence) if min(9, int((c - 0.5) * 2 * 10)) == b]
        if len(inside) > debiased:
            of_bin = [agrees[i] for i in inside]
            gap = sum(confidence[i] for i in inside) / len(inside) - sum(of_bin) / len(inside)
            chance = statistics.variance(of_bin) / len(inside) if debiased else 0.0
            total += (gap**2 - chance) * len(inside)
            count += len(inside)
    found = squared_calibration_error(np.array(margins), debiased=debiased)
    assert found == pytest.approx(total / count if count else 0.0, abs=1e-9)


@pytest.mark.parametrize("sharpness", [1.0, 1.8, 0.5])
def test_calibration_intervals_cover_the_true_error(sharpness):
    """Scores whose differences are the log odds of the labels, times `sharpness`: 1 is calibrated."""
    rng = np.random.default_rng(0)

    def sample(n):
        odds = rng.normal(1.8, 1.6, n)
        agrees = np.where(rng.random(n) < 1 / (1 + np.exp(-odds)), odds > 0, odds <= 0)
        return np.abs(odds) * sharpness * np.where(agrees, 1, -1)

    truth = squared_calibration_error(sample(500_000)) ** 0.5 if sharpness != 1 else 0.0
    results = [calibration_error(sample(260), range(260), seed) for seed in range(60)]
    held = [result.low <= truth <= result.high for result in results]
    assert sum(held) / 60 >= 0.85
    assert np.mean([result.value for result in results]) == pytest.approx(truth, abs=0.03)
    assert all(result.high < truth + 0.2 for result in results)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 9))
def test_a_bootstrap_sample_has_as_many_units_as_the_data_and_all_rows_of_each(units, seed):
    of_unit = [np.flatnonzero(np.array(units) == unit) for unit in dict.fromkeys(units)]
    rng, samples = np.random.default_rng(seed), []
    intervals.resample(lambda index: samples.append(index) or 0.0, units, seed)
    assert len(samples) == 500
    for sample in samples:
        drawn = rng.integers(0, len(of_unit), len(of_unit))
        assert sample.tolist() == np.concatenate([of_unit[unit] for unit in drawn]).tolist()


def test_identical_outcomes_of_one_prompt_count_as_one():
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(100), 4)
    alike = np.repeat(rng.random(100) < 0.8, 4).astype(float)
    alone = intervals.outcome_mean(alike.tolist())
    grouped = intervals.outcome_mean(alike.tolist(), units=prompts.tolist())
    once = intervals.outcome_mean(alike[::4].tolist())
    assert grouped.value == alone.value and grouped.n == alone.n == 400
    # Four times the same outcome counts as one.
    assert interval(grouped) == pytest.approx(interval(once), abs=0.003)
    assert grouped.high - grouped.low > 1.8 * (alone.high - alone.low)
    all_right = intervals.outcome_mean([1.0] * 40, units=[i // 4 for i in range(40)])
    # Ten units whose outcomes are all alike are ten outcomes.
    assert interval(all_right) == intervals.wilson(10, 10)
    margins = rng.normal(size=100).repeat(4)
    spread = interval(intervals.mean(margins.tolist(), units=prompts.tolist()))
    assert spread == pytest.approx(interval(intervals.mean(margins[::4].tolist())), abs=1e-9)
    reference = interval(intervals.statistic(lambda index: float(margins[index].mean()), prompts.tolist()))
    assert reference == pytest.approx(spread, abs=0.05)


def test_intervals_of_independent_pairs_do_not_get_narrower():
    outcomes = [float(i % 5 > 0) for i in range(200)]
    own = intervals.outcome_mean(outcomes, units=list(range(200)))
    assert interval(own) == pytest.approx(interval(intervals.outcome_mean(outcomes)), abs=1e-12)


def test_win_rate_prefers_the_right_answer_and_ties_with_itself():
    rows = [{"require": [["red"]], "reject": [], "max_words": 0, "test": ""}] * 40
    right, wrong = ["A fox is red."] * 40, ["A fox is blue."] * 40
    assert WinRate().compute(predictions=judge_match(right, wrong, rows))["value"] == 1.0
    assert WinRate().compute(predictions=judge_match(wrong, right, rows))["value"] == 0.0
    assert WinRate().compute(predictions=judge_match(right, right, rows))["value"] == 0.5


NUMBERS = st.floats(-1e6, 1e6)
OUTCOMES = st.sampled_from([0.0, 0.5, 1.0])
UNITS = st.integers(0, 5)


def contains_its_value(estimate, units):
    if estimate.low is None:
        return estimate.high is None and len(set(units)) == 1
    return estimate.low <= estimate.value <= estimate.high


@settings(deadline=None)
@given(st.lists(st.tuples(NUMBERS, OUTCOMES, st.integers(0, 1), UNITS, st.integers(1, 1000)), min_size=1, max_size=60))
def test_every_interval_contains_its_estimate(rows):
    values, outcomes, binary, units, weights = map(list, zip(*rows, strict=True))
    array = np.array(values)
    for estimate in (
        intervals.outcome_mean(binary),
        intervals.mean(values),
        intervals.outcome_mean(outcomes),
        intervals.ratio(values, weights),
        intervals.ratio(values, [*weights[1:], 0] if len(weights) > 1 else weights),
    ):
        assert contains_its_value(estimate, range(len(rows)))
    for estimate in (
        intervals.mean(values, units=units),
        intervals.outcome_mean(outcomes, units=units),
        intervals.outcome_mean(binary, units=units),
        intervals.statistic(lambda index: float(np.median(array[index])), units),
    ):
        assert contains_its_value(estimate, units)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(-8, 8), UNITS), min_size=1, max_size=40))
def test_the_interval_of_a_calibration_error_contains_it(rows):
    margins, units = np.array([margin for margin, _ in rows]), [unit for _, unit in rows]
    assert contains_its_value(calibration_error(margins, units), units)


def test_an_end_on_the_wrong_side_of_the_value_is_moved_to_it():
    assert interval(intervals.Estimate(0.0, 5e-9, 0.1)) == (0.0, 0.1)
    assert interval(intervals.Estimate(-1e-9, 0.0, 0.0)) == (-1e-9, 0.0)
    assert interval(intervals.Estimate(0.5)) == (None, None)


ESTIMATES = st.builds(intervals.Estimate, NUMBERS, NUMBERS, NUMBERS, st.integers(0, 10**6))


@given(ESTIMATES, st.dictionaries(st.text(max_size=5), ESTIMATES, max_size=3))
def test_an_estimate_is_read_as_it_was_written(estimate, kinds):
    whole = replace(estimate, by_kind=kinds)
    assert intervals.Estimate.from_json(json.loads(json.dumps(whole.to_json()))) == whole


@pytest.mark.parametrize("entry", [None, "high", {}, {"value": None}, {"value": float("nan")}, {"value": 10**400}])
def test_an_entry_without_a_number_is_not_an_estimate(entry):
    with pytest.raises(ValueError, match="no number"):
        intervals.Estimate.from_json(entry)


def test_groups_whose_outcomes_cancel_have_the_interval_of_independent_ones():
    grouped = intervals.outcome_mean([0, 1, 0, 1], units=["a", "a", "b", "b"])
    assert interval(grouped) == intervals.wilson(2, 4)


def test_other_numbers_of_samples_are_shown_as_eight_are():
    assert metric_info("pass@4").meaning == "at least one of 4 samples is right (unbiased estimate)"
    assert metric_info("maj@16").label == "maj@16" and metric_info("maj@16").share
    assert sorted(["step_rate", "maj@4", "pass@4", "pass@1"], key=metric_order)[1:3] == ["pass@4", "maj@4"]
    assert metric_info("pass@1_longer").label == "pass@1, longer problems"
