"""PPO's arithmetic against the same written as slow loops over Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.rl import ppo_math

Rows = list[list[float]]
Masks = list[list[int]]

number = st.floats(-3, 3, allow_nan=False, width=32)
unit = st.floats(0, 1, allow_nan=False)


@st.composite
def batches(draw: st.DrawFn, tensors: int) -> tuple[Masks, list[Rows]]:
    """Draw a mask of any pattern (padding at the end, tool text in the middle, empty), and tensors of its shape."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    mask = draw(st.lists(st.lists(st.integers(0, 1), min_size=length, max_size=length), min_size=rows, max_size=rows))
    row = st.lists(number, min_size=length, max_size=length)
    return mask, [draw(st.lists(row, min_size=rows, max_size=rows)) for _ in range(tensors)]


def tensor(rows: Rows) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def assert_equal(got: Tensor, expected: Rows) -> None:
    torch.testing.assert_close(got.double(), tensor(expected), rtol=1e-6, atol=1e-6)


def reference_advantages(
    rewards: list[float], values: list[float], mask: list[int], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Sum all later TD errors, each discounted by how many unmasked tokens later it is."""
    real = [t for t in range(len(mask)) if mask[t]]
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for place, t in enumerate(real):
        for later in range(place, len(real)):
            after = values[real[later + 1]] if later + 1 < len(real) else 0.0
            error = rewards[real[later]] + gamma * after - values[real[later]]
            advantages[t] += (gamma * lam) ** (later - place) * error
        returns[t] = advantages[t] + values[t]
    return advantages, returns


@settings(max_examples=200, deadline=None)
@given(batches(2), unit, unit)
def test_advantages_and_returns(batch: tuple[Masks, list[Rows]], gamma: float, lam: float) -> None:
    mask, (rewards, values) = batch
    rewards = [[r * m for r, m in zip(*row, strict=True)] for row in zip(rewards, mask, strict=True)]
    expected = [reference_advantages(r, v, m, gamma, lam) for r, v, m in zip(rewards, values, mask, strict=True)]
    advantages, returns = ppo_math.generalized_advantages(
        tensor(rewards), tensor(values), torch.tensor(mask), gamma, lam
    )
    assert_equal(advantages, [row[0] for row in expected])
    assert_equal(returns, [row[1] for row in expected])


@settings(max_examples=100, deadline=None)
@given(batches(2))
def test_masked_tokens_do_not_count(batch: tuple[Masks, list[Rows]]) -> None:
    mask_rows, (first, second) = batch
    mask, values = torch.tensor(mask_rows), tensor(first)
    garbage = torch.where(mask > 0, values, 1000.0 + tensor(second))
    scores = torch.ones(len(mask), dtype=torch.float64)
    for a, b in [
        (ppo_math.token_rewards(scores, values, mask), ppo_math.token_rewards(scores, garbage, mask)),
        (ppo_math.masked_whiten(values, mask), ppo_math.masked_whiten(garbage, mask)),
        (ppo_math.masked_mean(values, mask), ppo_math.masked_mean(garbage, mask)),
        *zip(
            ppo_math.generalized_advantages(values * mask, values, mask, 0.9, 0.9),
            ppo_math.generalized_advantages(values * mask, garbage, mask, 0.9, 0.9),
            strict=True,
        ),
    ]:
        torch.testing.assert_close(a, b)


@settings(max_examples=100, deadline=None)
@given(batches(1), number)
def test_token_rewards(batch: tuple[Masks, list[Rows]], score: float) -> None:
    mask, (penalty,) = batch
    expected = []
    for p, m in zip(penalty, mask, strict=True):
        row = [-x * y for x, y in zip(p, m, strict=True)]
        if any(m):
            row[max(t for t in range(len(m)) if m[t])] += score
        expected.append(row)
    scores = torch.full((len(mask),), score, dtype=torch.float64)
    assert_equal(ppo_math.token_rewards(scores, tensor(penalty), torch.tensor(mask)), expected)


@settings(max_examples=100, deadline=None)
@given(batches(1))
def test_whitening(batch: tuple[Masks, list[Rows]]) -> None:
    mask, (x,) = batch
    real = [v for row, m in zip(x, mask, strict=True) for v, keep in zip(row, m, strict=True) if keep]
    mean = sum(real) / max(len(real), 1)
    variance = sum((v - mean) ** 2 for v in real) / max(len(real), 1)
    expected = [
        [(v - mean) / math.sqrt(variance + 1e-8) * keep for v, keep in zip(row, m, strict=True)]
        for row, m in zip(x, mask, strict=True)
    ]
    assert_equal(ppo_math.masked_whiten(tensor(x), torch.tensor(mask)), expected)


@settings(max_examples=50, deadline=None)
@given(batches(1), st.data())
def test_whitening_over_processes_equals_whitening_on_one(batch: tuple[Masks, list[Rows]], data: st.DataObject) -> None:
    mask, x = torch.tensor(batch[0]), tensor(batch[1][0])
    cut = data.draw(st.integers(0, len(mask)))
    parts = [(x[:cut], mask[:cut]), (x[cut:], mask[cut:])]
    whole = ppo_math.masked_whiten(x, mask)

    def sums() -> list[Tensor]:
        """Return the results of the reductions over both processes, in order."""
        total = sum(torch.stack([(p * m).sum(), m.sum().double()]) for p, m in parts)
        mean = total[0] / total[1].clamp(min=1)
        squares = sum(((p - mean) ** 2 * m).sum() for p, m in parts)
        return [total, torch.stack([squares, total[1]])]

    whitened = []
    for part in parts:
        answers = iter(sums())
        whitened.append(ppo_math.masked_whiten(*part, reduce=lambda _, answers=answers: next(answers)))
    torch.testing.assert_close(torch.cat(whitened), whole)


@settings(max_examples=100, deadline=None)
@given(batches(3), st.floats(0.01, 1))
def test_the_value_loss(batch: tuple[Masks, list[Rows]], cliprange: float) -> None:
    _, (values, old_values, returns) = batch
    expected = []
    for row in zip(values, old_values, returns, strict=True):
        expected.append([])
        for value, old, target in zip(*row, strict=True):
            near = old + min(max(value - old, -cliprange), cliprange)
            expected[-1].append(0.5 * max((value - target) ** 2, (near - target) ** 2))
    loss, _ = ppo_math.clipped_value_loss(tensor(values), tensor(old_values), tensor(returns), cliprange)
    assert_equal(loss, expected)


def test_a_value_within_the_clip_range_is_not_clipped_by_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    values, old, returns = torch.randn(3, 100, 100, generator=generator)
    _, clipped = ppo_math.clipped_value_loss(values, old, returns, 0.5)
    assert clipped.any() and not clipped[(values - old).abs() < 0.499].any()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator: ppo_math.KLEstimator) -> None:
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    exact = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    estimates = ppo_math.kl_estimate(policy.log(), reference.log(), estimator)
    assert (policy * estimates).sum().item() == pytest.approx(exact)
    assert estimator == "k1" or (estimates >= 0).all()


def test_as_a_reward_k3_does_not_pull_the_policy_back() -> None:
    """Near the reference, the policy gradient of k1 is that of the KL, and k3's is of a higher order."""
    reference = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64).log()
    logits = (reference + torch.tensor([0.01, -0.01, 0.0])).requires_grad_()

    def gradient(estimator: ppo_math.KLEstimator | None) -> Tensor:
        logps = logits.log_softmax(0)
        if estimator is None:
            loss = (logps.exp() * (logps - reference)).sum()
        else:
            reward = ppo_math.kl_estimate(logps, reference, estimator).detach()
            loss = (logps.exp().detach() * reward * logps).sum()
        return torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(gradient("k1"), gradient(None))
    assert gradient("k3").norm() < 0.02 * gradient("k1").norm()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100), max_size=6), min_size=1, max_size=6))
def test_moments_are_those_of_everything_seen(parts: list[list[float]]) -> None:
    moments = ppo_math.Moments()
    for part in parts:
        moments.update(torch.tensor(part, dtype=torch.float64))
    seen = [x for part in parts for x in part]
    if len(seen) < 2:
        assert moments.normalize(torch.tensor([3.0])).tolist() == [3.0]
        return
    mean = sum(seen) / len(seen)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen) + 1e-8)
    got = moments.normalize(torch.tensor([7.0], dtype=torch.float64)).item()
    assert got == pytest.approx((7.0 - mean) / deviation, rel=1e-5)


def test_a_completion_ends_with_its_last_token() -> None:
    ids = torch.tensor([[5, 2, 6], [5, 6, 2], [2, 0, 0], [5, 6, 7], [2, 2, 2]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert ppo_math.ended(ids, mask, [2, 9]).tolist() == [False, True, True, False, False]
