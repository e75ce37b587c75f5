"""The interval of a mean over seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.intervals import Estimate, mean_difference, over_seeds, simultaneous, student_t

SHARES = st.floats(0, 1)
RUNS = st.lists(
    st.tuples(SHARES, SHARES, SHARES).map(sorted).map(lambda x: Estimate(x[1], x[0], x[2], 100)), min_size=2
)


@pytest.mark.parametrize(
    ("degrees", "half"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_students_interval_is_that_of_the_tables(degrees: int, half: float) -> None:
    assert student_t(degrees) == pytest.approx(half, abs=5e-4)


def test_the_interval_over_seeds_by_hand() -> None:
    mean = over_seeds([Estimate(value, value - 0.01, value + 0.01, 300) for value in (0.6, 0.7, 0.8)])
    half = 4.3027 * 0.1 / 3**0.5
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.7, 0.7 - half, 0.7 + half), abs=1e-4)
    assert mean.n == 3


def test_one_seed_has_the_interval_over_its_rows() -> None:
    only = Estimate(0.6, 0.5, 0.7, 300)
    assert over_seeds([only]) == only


@given(RUNS)
def test_it_is_never_narrower_than_that_of_any_run_except_at_the_bounds(runs: list[Estimate]) -> None:
    mean = over_seeds(runs, 0.0, 1.0)
    assert 0 <= mean.low <= mean.value <= mean.high <= 1
    for run in runs:
        assert mean.low <= max(0.0, mean.value - (run.value - run.low)) + 1e-12
        assert mean.high >= min(1.0, mean.value + (run.high - run.value)) - 1e-12


@pytest.mark.parametrize(("between", "shared"), [(0.0, True), (0.0, False), (0.03, True), (0.03, False)])
def test_it_covers_the_truth_whether_or_not_seeds_vary_or_share_their_rows(between: float, shared: bool) -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        rows = np.full(3, rng.normal(0, 0.02)) if shared else rng.normal(0, 0.02, 3)
        values = 0.5 + rows + rng.normal(0, between, 3)
        mean = over_seeds([Estimate(value, value - 1.96 * 0.02, value + 1.96 * 0.02, 600) for value in values])
        covered += mean.low <= 0.5 <= mean.high
    assert covered >= 0.94 * 2000


def test_the_intervals_of_twenty_tests_are_those_of_the_tables() -> None:
    """99.75%, or 0.00125 in each tail: 3.0233 standard errors instead of 1.9600, and Student's for two degrees."""
    estimate = Estimate(0.1, 0.1 - 1.96 * 0.02, 0.1 + 1.96 * 0.03, 300)
    wider = simultaneous(estimate, 20)
    assert (wider.low, wider.high) == pytest.approx((0.1 - 3.0233 * 0.02, 0.1 + 3.0233 * 0.03), abs=1e-5)
    assert (wider.value, wider.n) == (0.1, 300)
    assert simultaneous(estimate, 1) == estimate
    assert simultaneous(Estimate(0.95, 0.9, 1.0), 20, -1.0, 1.0).high == 1
    mean = over_seeds([Estimate(value) for value in (0.6, 0.7, 0.8)], tests=20)
    assert (mean.high - 0.7) / (0.1 / 3**0.5) == pytest.approx(19.962, abs=0.01)


def test_of_twenty_equal_models_rarely_one_looks_different() -> None:
    rng = np.random.default_rng(0)
    families = 100
    missed = {1: 0, 20: 0}
    for _ in range(families):
        # Shares of right answers of eight, to 150 problems, by two models that are equally good.
        differences = rng.normal(0, 0.2, (20, 150)).round(2)
        estimates = [mean_difference(list(row), [1.0] * 150, True) for row in differences]
        for tests in missed:
            widened = [simultaneous(estimate, tests) for estimate in estimates]
            missed[tests] += any(not estimate.low <= 0 <= estimate.high for estimate in widened)
    assert missed[1] > 0.5 * families
    assert missed[20] <= 0.12 * families
