"""What PPO logs, under TRL's names.

Means are over whole completions or over real tokens, of all processes; padding never counts. Shapes as in
`pipeline.ppo_math`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.ppo_math import Reduce, clipped_policy_loss, masked_mean


def rollout_metrics(
    scores: Tensor,
    scored: Tensor,
    kl: Tensor | None,
    kl_coef: float,
    logps: Tensor,
    advantages: Tensor,
    returns: Tensor,
    is_eos: Tensor,
    mask: Tensor,
    reduce: Reduce,
) -> dict[str, float]:
    """Metrics of a rollout, as it was sampled.

    Args:
        scores: (B,), normalised and penalised.
        scored: (B,) boolean, false where no reward function gave a score.
        kl: (B, T) in nats; None without a reference.
        kl_coef: Reward taken away per nat.
        logps: (B, T), log-probabilities of the sampled tokens.
        advantages: (B, T), before whitening.
        returns: (B, T).
        is_eos: (B, T) boolean.
        mask: (B, T).
        reduce: Sums over processes.

    Returns:
        By name: `objective/kl` in nats a completion, `objective/entropy` the surprise of a completion in
        nats, `objective/non_score_reward` the KL penalty of one, `objective/scores`, `objective/rlhf_reward`
        the two together; `val/explained_variance`, 1 for a critic that foresaw every return and 0 for one
        that knows their mean; `val/num_eos_tokens`, how many completions of all ended. NaN where there is
        nothing to average.
    """
    kl_total = torch.zeros_like(scores) if kl is None else (kl * mask).sum(1)
    per_completion = {
        "objective/entropy": -(logps * mask).sum(1),
        "objective/non_score_reward": -kl_coef * kl_total,
        "objective/rlhf_reward": scores - kl_coef * kl_total,
        "objective/scores": scores,
    }
    if kl is not None:
        per_completion["objective/kl"] = kl_total
    sums = [(x * scored).sum() for x in per_completion.values()]
    *totals, count = reduce(torch.stack([*sums, scored.sum().to(scores.dtype)])).tolist()
    metrics = {
        name: total / count if count else float("nan") for name, total in zip(per_completion, totals, strict=True)
    }
    spread = masked_mean((returns - masked_mean(returns, mask, reduce)).square(), mask, reduce)
    error = masked_mean(advantages.square(), mask, reduce)  # an advantage is a return less its estimate
    metrics["val/explained_variance"] = (1 - error / spread.clamp(min=1e-8)).item()
    metrics["val/num_eos_tokens"] = reduce((is_eos * mask).sum()).item()
    return metrics


UPDATE_METRICS = (
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/ratio_var",
)


def update_sums(
    log_ratio: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    cliprange: float,
    value_losses: Tensor,
    value_clipped: Tensor,
    mask: Tensor,
) -> Tensor:
    """Sums over the real tokens of one forward pass, of which `update_means` makes metrics.

    Args:
        log_ratio: (B, T), log-probability now minus the one when the token was sampled.
        entropies: (B, T), of the policy's distribution before each token, in nats.
        advantages: (B, T).
        cliprange: Of the policy.
        value_losses: (B, T).
        value_clipped: (B, T) boolean.
        mask: (B, T).

    Returns:
        One sum for each of `UPDATE_METRICS`, and the number of tokens. They may be added up over passes and
        processes.
    """
    policy_losses, policy_clipped = clipped_policy_loss(log_ratio, advantages, cliprange)
    ratio = log_ratio.exp()
    per_token = (
        0.5 * log_ratio.square(),
        policy_clipped,
        entropies,
        policy_losses,
        value_losses,
        value_clipped,
        ratio,
        ratio.square(),
        torch.ones_like(ratio),
    )
    return torch.stack([(x * mask).sum().float() for x in per_token])


def update_means(sums: Tensor) -> dict[str, float]:
    """Means over tokens, by name; empty without tokens.

    Args:
        sums: Of `update_sums`.
    """
    *totals, tokens = sums.tolist()
    if not tokens:
        return {}
    metrics = {name: total / tokens for name, total in zip(UPDATE_METRICS, totals, strict=True)}
    metrics["val/ratio_var"] -= metrics["val/ratio"] ** 2
    return metrics
