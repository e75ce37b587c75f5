"""The arithmetic of PPO, as pure functions of tensors.

Shapes: `B` completions of up to `T` tokens. `mask` is (B, T), 1 for the tokens that the policy chose (its end
of turn included) and 0 for padding, for text put in by tools, and for completions that nothing scored. A
masked token earns no reward, has no advantage, and is stepped over: the value that follows a token is that of
the next real one.

Sources: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation"
(1506.02438) and "Proximal Policy Optimization Algorithms" (1707.06347); Ziegler et al., "Fine-Tuning Language
Models from Human Preferences" (1909.08593) for the KL penalty per token; Schulman, "Approximating KL
Divergence" (2020) for k1 and k3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k3"]
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes, element by element."""


def on_one_process(tensor: Tensor) -> Tensor:
    """The sum over all processes, when there is only one."""
    return tensor


def masked_mean(x: Tensor, mask: Tensor, reduce: Reduce = on_one_process) -> Tensor:
    """Mean of `x` over the real tokens of all processes; 0 if there is none.

    Args:
        x: (B, T).
        mask: (B, T).
        reduce: Sums over processes.

    Returns:
        A scalar.
    """
    total, count = reduce(torch.stack([(x * mask).sum(), mask.sum().to(x.dtype)]))
    return total / count.clamp(min=1.0)


def masked_whiten(x: Tensor, mask: Tensor, reduce: Reduce = on_one_process, eps: float = 1e-8) -> Tensor:
    """Give the real tokens of all processes together mean 0 and (population) variance 1.

    Args:
        x: (B, T).
        mask: (B, T).
        reduce: Sums over processes.
        eps: Added to the variance.

    Returns:
        (B, T), 0 where the mask is.
    """
    centered = (x - masked_mean(x, mask, reduce)) * mask
    variance = masked_mean(centered.square(), mask, reduce)
    return centered * torch.rsqrt(variance + eps)


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator) -> Tensor:
    """Estimate KL(policy || reference) at each token from the one token that the policy sampled.

    Both are unbiased. `k1`, the log ratio, may be negative at a token and sums to the log ratio of the
    completion. `k3`, `exp(-k1) - 1 + k1`, is never negative and varies less.

    Args:
        logps: (B, T), log-probabilities under the policy that sampled the tokens.
        ref_logps: (B, T), log-probabilities under the reference.
        estimator: "k1" or "k3".

    Returns:
        (B, T), in nats.
    """
    log_ratio = logps - ref_logps
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """Reward of each token: less the KL penalty at every real one, and the completion's score at its last
    one.

    Args:
        scores: (B,), one score a completion.
        penalty: (B, T), the KL at each token times its coefficient.
        mask: (B, T).

    Returns:
        (B, T), 0 where the mask is.
    """
    return torch.where(_is_last(mask), scores.unsqueeze(1), 0.0) - penalty * mask


def ended(ids: Tensor, mask: Tensor, eos_token_ids: list[int]) -> Tensor:
    """Which completions end with an end of turn. One inside of a completion, before a tool's answer, ends nothing.

    Args:
        ids: (B, T).
        mask: (B, T), 1 for every token that is no padding.
        eos_token_ids: The tokens that end a turn.

    Returns:
        (B,) boolean.
    """
    return (_is_last(mask) & torch.isin(ids, torch.tensor(eos_token_ids, device=ids.device))).any(dim=1)


def _is_last(mask: Tensor) -> Tensor:
    """(B, T), true for the last real token of each completion: the one after which there is no other."""
    return (mask > 0) & (mask.flip(1).cumsum(1).flip(1) == 1)


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over the real tokens. After the last one the value is 0.

    Args:
        rewards: (B, T), 0 where the mask is.
        values: (B, T), the critic's estimate before each token is chosen.
        mask: (B, T).
        gamma: Discount per token, in [0, 1].
        lam: Weight of longer-sighted estimates, in [0, 1]: 0 trusts the critic, 1 the rewards.

    Returns:
        Advantages and returns (advantage + value, what the critic should have said), each (B, T) and 0 where
        the mask is.
    """
    real = mask > 0
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(real[:, t], advantage, next_advantage)
        next_value = torch.where(real[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(real[:, t], advantage, 0.0)
    return advantages, torch.where(real, advantages + values, 0.0)


def clipped_policy_loss(log_ratio: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """PPO's policy loss at each token, and where its clipping took the gradient away.

    Args:
        log_ratio: (B, T), log-probability now minus the one when the token was sampled.
        advantages: (B, T).
        cliprange: How far the probability ratio may go from 1.

    Returns:
        Loss (B, T), and a (B, T) boolean: clipped.
    """
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic at each token, pessimistic about steps beyond the clip range.

    Args:
        values: (B, T), the critic's estimate now.
        old_values: (B, T), its estimate when the tokens were sampled.
        returns: (B, T).
        cliprange: How far an estimate may go from the old one, in units of the reward.

    Returns:
        Loss (B, T), and a (B, T) boolean: clipped.
    """
    clipped_values = old_values + (values - old_values).clamp(-cliprange, cliprange)
    unclipped = (values - returns).square()
    clipped = (clipped_values - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


@dataclass
class Moments:
    """Count, mean and sum of squared deviations of all scores so far, over all processes (Chan et al., 1979).

    Args:
        count: Number of scores.
        mean: Their mean.
        m2: The sum of their squared deviations from it.
    """

    count: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    def update(self, x: Tensor) -> None:
        """Take in more scores.

        Args:
            x: (N,), without NaN; may be empty.
        """
        if x.numel() == 0:
            return
        x = x.cpu().double()  # which not every accelerator has
        count, mean = float(x.numel()), float(x.mean())
        m2 = float((x - mean).square().sum())
        total, delta = self.count + count, mean - self.mean
        self.m2 += m2 + delta**2 * self.count * count / total
        self.mean += delta * count / total
        self.count = total

    def normalize(self, x: Tensor, eps: float = 1e-8) -> Tensor:
        """`x` minus the mean, over the (population) standard deviation; as it is if fewer than two were seen.

        Args:
            x: Any shape.
            eps: Added to the variance.
        """
        if self.count < 2:
            return x
        return (x - self.mean) / (self.m2 / self.count + eps) ** 0.5
