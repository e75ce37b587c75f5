"""Metrics and intervals against brute force and figures worked out by hand."""

import itertools
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation import intervals
from pipeline.evaluation.metrics.bits_per_byte import BitsPerByte
from pipeline.evaluation.metrics.instruction_accuracy import InstructionAccuracy
from pipeline.evaluation.metrics.pass_at_k import PassAtK, estimate_pass_at_k
from pipeline.evaluation.metrics.reward_accuracy import RewardAccuracy, expected_calibration_error
from pipeline.evaluation.metrics.step_rate import StepRate
from pipeline.evaluation.metrics.stop_rate import StopRate
from pipeline.evaluation.metrics.win_rate import WinRate

METRIC_FILES = sorted((Path(intervals.__file__).parent / "metrics").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", METRIC_FILES, ids=lambda path: path.stem)
def test_every_metric_loads_offline_from_its_file(path):
    metric = evaluate.load(str(path))
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == path.stem


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
    one = PassAtK().compute(predictions=answers, references=["3", "9"], k=1)
    two = PassAtK().compute(predictions=answers, references=["3", "9"], k=2)
    assert one["values"] == [0.5, 0.0] and one["value"] == 0.25 and one["n"] == 2
    assert two["values"] == [1.0, 0.0] and two["value"] == 0.5
    assert two["ci95"] == pytest.approx(intervals.wilson(1, 2))


def test_wilson_by_hand():
    # 8 of 10: (0.8 + 1.92/10 -+ 1.96 sqrt(0.016 + 0.9604/100)) / (1 + 3.8415/10)
    assert intervals.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert intervals.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert intervals.wilson(0, 0) == (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_solves_its_equation(case):
    successes, n = case
    low, high = intervals.wilson(successes, n)
    share = successes / n
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):  # |share - p| = z sqrt(p (1 - p) / n) at both ends, except where they are 0 or 1
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    result = intervals.mean(list(values))
    half = 1.96 * values.std() / 20
    assert result["value"] == pytest.approx(values.mean())
    assert result["ci95"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.03)
    assert result == intervals.mean(list(values))


def test_bootstrap_resamples_whole_units():
    # One long document decides the ratio: resampling tokens instead of documents would hide how much.
    low, high = intervals.bootstrap([1.0, 1.0, 1000.0], [1.0, 1.0, 100.0])
    assert low == pytest.approx(1.0) and high == pytest.approx(10.0)


def test_bootstrap_of_one_unit_has_no_width():
    assert intervals.bootstrap([3.0], [2.0]) == (1.5, 1.5)


def test_paired_differences_use_shared_examples_only():
    before = {1: 0.0, 2: 1.0, 3: 0.0, 9: 1.0}
    after = {1: 1.0, 2: 1.0, 3: 1.0, 8: 0.0}
    result = intervals.paired_difference(before, after)
    assert result["n"] == 3 and result["value"] == pytest.approx(2 / 3)
    assert result["ci95"][0] <= result["value"] <= result["ci95"][1]


def test_bits_per_byte_weighs_by_bytes():
    texts = ["ab", "é"]  # two bytes each
    result = BitsPerByte().compute(predictions=[math.log(2) * 8, math.log(2) * 2], references=texts)
    assert result["value"] == pytest.approx(10 / 4)
    assert result["values"] == pytest.approx([4.0, 1.0])


def test_instruction_accuracy_grades_by_each_row():
    row = {"require": [["red"]], "reject": ["blue"], "max_words": 3, "test": ""}
    result = InstructionAccuracy().compute(predictions=["red", "red blue", "not it"], references=[row] * 3)
    assert result["values"] == [1.0, 0.0, 0.0] and result["value"] == pytest.approx(1 / 3)
    assert result["ci95"] == pytest.approx(intervals.wilson(1, 3))


def test_stop_and_step_rates_count():
    assert StopRate().compute(predictions=[[1, 2], [3], []], eos_token_id=2)["values"] == [1.0, 0.0, 0.0]
    steps = StepRate().compute(predictions=["1+1=2. The answer is 2.", "The answer is 2."])
    assert steps["value"] == 0.5 and steps["n"] == 2


def test_reward_accuracy_by_hand():
    result = RewardAccuracy().compute(predictions=[2.0, 0.0, 1.0], references=[1.0, 1.0, 1.0])
    assert result["values"] == [1.0, 0.0, 0.5] and result["value"] == pytest.approx(0.5)
    assert result["margin"]["value"] == pytest.approx(0.0)


def test_calibration_error_by_hand():
    # sigmoid(log 3) = 0.75 for four pairs of which three are in order: perfectly calibrated
    margins = np.log(3) * np.array([1.0, 1.0, 1.0, -1.0])
    assert expected_calibration_error(margins, np.array([1.0, 1, 1, 0])) == pytest.approx(0.0, abs=1e-9)
    assert expected_calibration_error(margins, np.zeros(4)) == pytest.approx(0.75)


@settings(deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=50))
def test_calibration_error_equals_a_loop_over_bins(margins):
    agrees = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
    confidence = [1 / (1 + math.exp(-abs(margin))) for margin in margins]
    expected = 0.0
    for b in range(10):
        inside = [i for i, c in enumerate(confidence) if min(9, int((c - 0.5) * 2 * 10)) == b]
        if inside:
            gap = sum(confidence[i] for i in inside) / len(inside) - sum(agrees[i] for i in inside) / len(inside)
            expected += abs(gap) * len(inside) / len(margins)
    assert expected_calibration_error(np.array(margins), np.array(agrees)) == pytest.approx(expected, abs=1e-9)


def test_win_rate_prefers_the_right_answer_and_ties_with_itself():
    rows = [{"require": [["red"]], "reject": [], "max_words": 0, "test": ""}] * 40
    right, wrong = ["A fox is red."] * 40, ["A fox is blue."] * 40
    assert WinRate().compute(predictions=right, references=wrong, rows=rows)["value"] == 1.0
    assert WinRate().compute(predictions=wrong, references=right, rows=rows)["value"] == 0.0
    assert WinRate().compute(predictions=right, references=right, rows=rows)["value"] == 0.5
