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
        name: total / count if count else float("nan")
        for name, total in zip(per_completion, totals, strict=True)
    }
    spread = masked_mean((returns - masked_mean(returns, mask, reduce)).square(), mask, reduce)
    error = masked_mean(advantages.square(), mask, reduce)  # an advantage is a return less its estimate
    metrics["val/explained_variance"] = (1 - error / spread.clamp(min=1e-8)).item()
    metrics["val/num_eos_tokens"] = reduce((is_eos * mask).sum()).item()
    return metrics


def update_metrics(
    log_ratio: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    cliprange: float,
    value_losses: Tensor,
    value_clipped: Tensor,
    mask: Tensor,
    reduce: Reduce,
) -> dict[str, float]:
    """Metrics of one forward pass in training or evaluation.

    Args:
        log_ratio: (B, T), log-probability now minus the one when the token was sampled.
        entropies: (B, T), of the policy's distribution before each token, in nats.
        advantages: (B, T).
        cliprange: Of the policy.
        value_losses: (B, T).
        value_clipped: (B, T) boolean.
        mask: (B, T).
        reduce: Sums over processes.

    Returns:
        By name, means over real tokens: `policy/approxkl_avg`, `policy/clipfrac_avg`, `policy/entropy_avg`,
        `loss/policy_avg`, `loss/value_avg`, `val/clipfrac_avg`, `val/ratio`, `val/ratio_var`. Empty without
        tokens.
    """
    policy_losses, policy_clipped = clipped_policy_loss(log_ratio, advantages, cliprange)
    ratio = log_ratio.exp()
    per_token = {
        "policy/approxkl_avg": 0.5 * log_ratio.square(),
        "policy/clipfrac_avg": policy_clipped.float(),
        "policy/entropy_avg": entropies,
        "loss/policy_avg": policy_losses,
        "loss/value_avg": value_losses,
        "val/clipfrac_avg": value_clipped.float(),
        "val/ratio": ratio,
        "val/ratio_var": ratio.square(),
    }
    sums = [(x * mask).sum() for x in per_token.values()]
    *totals, tokens = reduce(torch.stack([*sums, mask.sum().float()])).tolist()
    if not tokens:
        return {}
    metrics = {name: total / tokens for name, total in zip(per_token, totals, strict=True)}
    metrics["val/ratio_var"] -= metrics["val/ratio"] ** 2
    return metrics
