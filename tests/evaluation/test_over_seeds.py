"""The interval of a mean over seeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.intervals import Estimate, over_seeds, student_t

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
