"""The arithmetic of PPO, as pure functions of tensors. The clipped policy loss is TRL's: see `PPOTrainer.compute_loss`.

Notation: `B` completions of up to `T` tokens. A tensor is (B, T), and so is what a function returns, unless its
docstring says otherwise. Names have the same meaning everywhere in `pipeline.rl`:

- `mask`: 1 for the tokens that the policy chose (its end of turn included); 0 for padding, text of tools, and
  completions without a score. A masked token is skipped: its reward, advantage and return are 0, and the value that
  follows a token is the value of the next unmasked one.
- `logps`, `ref_logps`: Log-probabilities of the tokens under the policy and the reference, in nats.
- `log_ratio`: Log-probability under the current policy minus log-probability under the policy that sampled.
- `scores`: (B,), the reward of each completion as a whole: `Scores.total`.
- `values`: The critic's estimate before each token is chosen, in units of the reward.
- `reduce`: Sums a tensor over all processes, element by element. By default, there is only one.

Sources: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (1506.02438) and
"Proximal Policy Optimization Algorithms" (1707.06347); Ziegler et al., "Fine-Tuning Language Models from Human
Preferences" (1909.08593) for the KL penalty per token; Schulman, "Approximating KL Divergence" (2020) for k1 and k3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k3"]
Reduce = Callable[[Tensor], Tensor]


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = lambda total: total) -> Tensor:
    """Return the mean of `x` over the unmasked tokens of all processes: a scalar, 0 if there are none."""
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    return total / count.clamp(min=1.0)


def masked_whiten(x: Tensor, mask: Tensor, reduce: Reduce = lambda total: total, eps: float = 1e-8) -> Tensor:
    """Shift and scale `x` to mean 0 and (population) variance 1 over the unmasked tokens of all processes."""
    centered = (x - masked_mean(x, mask, reduce)) * mask
    return centered * torch.rsqrt(masked_mean(centered.square(), mask, reduce) + eps)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(policy || reference) at each token, in nats, from the one token that the policy sampled.

    Both estimators are unbiased. `k1`, the log ratio, can be negative at a token, and sums to the log ratio of the
    completion; PPO's penalty is based on it. `k3`, `exp(-k1) - 1 + k1`, is never negative and varies less, but is only
    logged: as a reward, it has the gradient of KL(policy || reference) - KL(reference || policy), which cancel near
    the reference (Tang and Munos, 2025, "On a few pitfalls in KL divergence gradient estimation for RL", 2506.09477).
    """
    log_ratio = logps - ref_logps
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of the completions of a rollout, each (B,).

    Attributes:
        rewards: The sum of all rewards, by weight, normalised if the configuration asks for it.
        missing_end: What is subtracted because a completion has no end of turn; 0 for one that has it.
        ended: Whether a completion ended with an end of turn.
        scored: Whether a completion has a score. Nothing is learned from the others.
    """

    rewards: Tensor
    missing_end: Tensor
    ended: Tensor
    scored: Tensor

    @property
    def total(self) -> Tensor:
        """The score that is learned from, (B,); 0 for a completion without one."""
        return torch.where(self.scored, self.rewards - self.missing_end, 0.0)


@dataclass(frozen=True, eq=False)
class Rewards:
    """What each token of a rollout is paid, and what that consists of.

    Attributes:
        scores: The scores of the completions.
        kl: The estimated KL to the reference at each token, in nats, 0 if masked; None without a reference.
        penalty: What is subtracted at each token for that KL, in units of the reward; 0 without a reference.
        tokens: The reward of each token: see `token_rewards`.
    """

    scores: Scores
    kl: Tensor | None
    penalty: Tensor
    tokens: Tensor


def token_rewards(scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """Return each token's reward: minus its KL `penalty`, plus the completion's score at its last unmasked token."""
    return torch.where(_is_last(mask), scores.unsqueeze(1), 0.0) - penalty * mask


def ended(ids: Tensor, mask: Tensor, eos_token_ids: list[int]) -> Tensor:
    """Return which completions end with an end of turn, shape (B,). One before a tool's result does not count.

    Here, `mask` is 1 for every token that is not padding.
    """
    return (_is_last(mask) & torch.isin(ids, torch.tensor(eos_token_ids, device=ids.device))).any(dim=1)


def _is_last(mask: Tensor) -> Tensor:
    """Return True for the last unmasked token of each completion."""
    # mask 1 1 0 1 0  ->  remaining 3 2 1 1 0: from each token to the end, the number of unmasked ones.
    remaining = mask.flip(1).cumsum(1).flip(1)
    return (mask > 0) & (remaining == 1)


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Compute generalised advantage estimates over the unmasked tokens. The value after the last one is 0.

    `gamma` is the discount per token, and `lam` the weight of longer-sighted estimates: 0 trusts the critic, 1 the
    rewards. Both are in [0, 1]. Return the advantages, and the returns, which the critic should have estimated.
    """
    # From the last token to the first, with `delta` the surprise of a token: its reward, plus what is still expected
    # after it, minus what was expected before.
    #
    #   advantage[t] = delta[t] + gamma * lam * advantage[t + 1]
    #   delta[t]     = reward[t] + gamma * value[t + 1] - value[t]
    #
    # If t is masked, nothing is written, and t + 1 remains the next unmasked token.
    real = mask > 0
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(real[:, t], advantage, next_advantage)
        next_value = torch.where(real[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(real[:, t], advantage, 0.0)
    return advantages, torch.where(real, advantages + values, 0.0)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Compute half the squared error of the critic at each token, with or without clipping, whichever is larger.

    Clipping keeps an estimate within `cliprange`, in units of the reward, of the estimate at sampling time. Return the
    loss, and a boolean tensor: where clipping removed the gradient.
    """
    # `old_values + (values - old_values).clamp(...)` would round values within the range.
    clipped_values = values.clamp(old_values - cliprange, old_values + cliprange)
    unclipped = (values - returns).square()
    clipped = (clipped_values - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


@dataclass
class Moments:
    """Number, mean and sum of squared deviations of all scores so far, over all processes (Chan et al., 1979)."""

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, x: Tensor) -> None:
        """Add scores: `x` of shape (N,), without NaN; N may be 0."""
        if x.numel() == 0:
            return
        # Not every accelerator has float64.
        x = x.cpu().double()
        count = float(x.numel())
        mean = float(x.mean())
        m2 = float((x - mean).square().sum())
        total = self.count + count
        delta = mean - self.mean
        self.m2 += m2 + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def normalize(self, x: Tensor, eps: float = 1e-8) -> Tensor:
        """Subtract the mean from `x` and divide by the (population) standard deviation.

        With fewer than two scores, there is no deviation, and `x` is returned as it is.
        """
        if self.count < 2:
            return x
        return (x - self.mean) / (self.m2 / self.count + eps) ** 0.5
