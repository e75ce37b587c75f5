"""What PPO logs, under TRL's names.

Means are over whole completions or over real tokens, of all processes; padding never counts. Shapes as in
`pipeline.rl.ppo_math`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.rl.ppo_math import clipped_policy_loss

PER_COMPLETION = ("objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores")


def rollout_sums(
    scores: Tensor,
    scored: Tensor,
    kl: Tensor | None,
    kl_coef: float,
    logps: Tensor,
    advantages: Tensor,
    returns: Tensor,
    ended: Tensor,
    mask: Tensor,
) -> Tensor:
    """Sums over the completions and the real tokens of a rollout as it was sampled, for `rollout_means`.

    Args:
        scores: (B,), normalised and penalised.
        scored: (B,) boolean, false for a completion that trains nothing.
        kl: (B, T) in nats; None without a reference.
        kl_coef: Reward taken away per nat.
        logps: (B, T), log-probabilities of the sampled tokens.
        advantages: (B, T), before whitening.
        returns: (B, T).
        ended: (B,) boolean, true for a completion whose last token ends a turn.
        mask: (B, T).

    Returns:
        Sums, in float64 where the device has it, which may be added up over rollouts and processes.
    """
    kl_total = torch.zeros_like(scores) if kl is None else (kl * mask).sum(1)
    penalty = kl_coef * kl_total
    per_completion = (-(logps * mask).sum(1), -penalty, scores - penalty, scores, kl_total, torch.ones_like(scores))
    # An advantage is a return less its estimate.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    returns, advantages = returns.to(exact), advantages.to(exact)
    per_token = (returns, returns.square(), advantages.square(), torch.ones_like(returns))
    sums = [(x.to(exact) * scored).sum() for x in per_completion]
    sums += [(x * mask).sum() for x in per_token]
    return torch.stack([*sums, (ended & scored).sum().to(exact)])


def rollout_means(sums: Tensor, with_kl: bool) -> dict[str, float]:
    """Metrics of rollouts.

    Args:
        sums: Of `rollout_sums`.
        with_kl: There was a reference.

    Returns:
        By name: `objective/kl` in nats a completion, `objective/entropy` the surprise of a completion in
        nats, `objective/non_score_reward` the KL penalty of one, `objective/scores`, `objective/rlhf_reward`
        the two together; `val/explained_variance`, 1 for a critic that foresaw every return and 0 for one
        that knows their mean; `val/num_eos_tokens`, how many completions of all ended. NaN where there is
        nothing to average.
    """
    *totals, completions, returns, squares, errors, tokens, ended = sums.tolist()
    metrics = {
        name: total / completions if completions else float("nan")
        for name, total in zip((*PER_COMPLETION, "objective/kl"), totals, strict=True)
    }
    if not with_kl:
        del metrics["objective/kl"]
    tokens = max(tokens, 1.0)
    spread = squares / tokens - (returns / tokens) ** 2
    metrics["val/explained_variance"] = 1 - errors / tokens / max(spread, 1e-8)
    metrics["val/num_eos_tokens"] = ended
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
