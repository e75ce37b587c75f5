"""The metrics that `PPOTrainer` logs, under the names of TRL's former `PPOTrainer`.

Means are over completions or over unmasked tokens, of all processes. `pipeline.rl.ppo_math` defines the notation. The
critic's gradient norm before clipping is `val/grad_norm`. TRL logs the policy's entropy and clipping.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline import hardware
from pipeline.rl.ppo_math import Reduce, Rewards, kl_estimate

# Metrics that are sums over all completions, not means.
TOTALS = ("val/num_eos_tokens",)
# Components of `val/explained_variance`, as means over tokens.
RETURN, SQUARE, ERROR = "_return", "_squared return", "_squared error"


@dataclass
class Averages:
    """Statistics of several batches and processes, whose sums are added up before they are divided."""

    _sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, weights: Tensor, values: Mapping[str, Tensor]) -> None:
        """Add values by name, each with the shape of `weights`: 1 for values that count, and 0 for others."""
        weights = _exact(weights)
        for name, value in values.items():
            sums = torch.stack([(_exact(value) * weights).sum(), weights.sum()])
            self._sums[name] = self._sums.get(name, 0.0) + sums

    def take(self, reduce: Reduce) -> dict[str, float]:
        """Return the metrics over all processes by name, NaN if nothing counted, and reset them."""
        names = list(self._sums)
        # (metrics, 2): the sum of each, and what it is divided by.
        sums = reduce(torch.stack(list(self._sums.values()))).tolist()
        self._sums = {}
        metrics = {}
        for name, (total, count) in zip(names, sums, strict=True):
            if name in TOTALS:
                metrics[name] = total
            else:
                metrics[name] = total / count if count else math.nan
        if RETURN in metrics:
            mean = metrics.pop(RETURN)
            variance = metrics.pop(SQUARE) - mean**2
            metrics["val/explained_variance"] = 1 - metrics.pop(ERROR) / max(variance, 1e-8)
        if "val/ratio" in metrics:
            # `val/ratio_var` is so far the mean of the squared distance to 1. Rounding may make the variance negative.
            variance = metrics["val/ratio_var"] - (metrics["val/ratio"] - 1) ** 2
            metrics["val/ratio_var"] = max(variance, 0.0)
        return metrics


def _exact(x: Tensor) -> Tensor:
    """Return `x` in float64, or in float32 on MPS, which does not have float64."""
    return x.to(hardware.sum_dtype(x.device))


def of_completions(rewards: Rewards, logps: Tensor, ref_logps: Tensor | None, mask: Tensor) -> dict[str, Tensor]:
    """Return the statistics of the completions of a rollout, each (B,).

    `rewards` are what `PPOTrainer.token_rewards` returns, and `ref_logps` is None without a reference.
    """
    scores = rewards.scores.total
    penalties = (rewards.penalty * mask).sum(1)
    statistics = {
        # Negative log-probability of a completion, in nats.
        "objective/entropy": -(logps * mask).sum(1),
        # KL penalty of a completion, as a reward, and together with its score.
        "objective/non_score_reward": -penalties,
        "objective/rlhf_reward": scores - penalties,
        "objective/scores": scores,
        "val/num_eos_tokens": rewards.scores.ended,
    }
    if rewards.kl is not None and ref_logps is not None:
        # KL to the reference, in nats per completion: as it is penalised, and by an estimate that varies less.
        statistics["objective/kl"] = (rewards.kl * mask).sum(1)
        statistics["objective/kl_k3"] = (kl_estimate(logps, ref_logps, "k3") * mask).sum(1)
    return statistics


def of_estimates(returns: Tensor, values: Tensor) -> dict[str, Tensor]:
    """Return the statistics of the critic's estimates of the returns in a rollout, each (B, T).

    For `val/explained_variance`: 1 for a critic that predicted every return, 0 for one that only knows their mean.
    """
    returns = _exact(returns)
    values = _exact(values)
    return {RETURN: returns, SQUARE: returns.square(), ERROR: (returns - values).square()}


def of_update(log_ratio: Tensor, value_losses: Tensor, value_clipped: Tensor) -> dict[str, Tensor]:
    """Return the statistics of a forward pass of the update, each (B, T)."""
    ratio = log_ratio.exp()
    return {
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        # The critic's loss, before `vf_coef`, and the share of tokens at which it was clipped.
        "loss/value_avg": value_losses,
        "val/clipfrac_avg": value_clipped,
        # Mean of the probability ratio, and for its variance, of the squared distance to 1.
        "val/ratio": ratio,
        "val/ratio_var": (_exact(ratio) - 1).square(),
    }
