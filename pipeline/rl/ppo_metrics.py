"""The metrics that `PPOTrainer` logs, under the names of TRL's former `PPOTrainer`.

Means are over completions or over unmasked tokens, of all processes. Each statistic is first summed, so that the sums
of several batches and processes can be added up before they are divided. `pipeline.rl.ppo_math` defines the notation.

Of each rollout, as it was sampled (`rollout_means`):

- `objective/scores`: Score of a completion, normalised and penalised.
- `objective/kl`, `objective/kl_k3`: KL to the reference, in nats per completion, by the estimators of
  `ppo_math.kl_estimate`. Only with a reference.
- `objective/non_score_reward`: KL penalty of a completion, as a reward.
- `objective/rlhf_reward`: Score and KL penalty together.
- `objective/entropy`: Negative log-probability of a completion, in nats.
- `val/explained_variance`: 1 for a critic that foresaw every return, 0 for one that knows only their mean.
- `val/num_eos_tokens`: How many completions ended with an end of turn.

Of each optimizer step (`update_means`), averaged over tokens, except for the last:

- `policy/approxkl_avg`: Half the squared log ratio.
- `policy/clipfrac_avg`, `val/clipfrac_avg`: Share of tokens at which policy and critic were clipped.
- `policy/entropy_avg`: Entropy of the policy, in nats.
- `loss/policy_avg`, `loss/value_avg`: The losses, before `vf_coef`.
- `val/ratio`, `val/ratio_var`: Mean and variance of the probability ratio.
- `val/grad_norm`: The critic's gradient norm before clipping.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.rl.ppo_math import clipped_policy_loss, kl_estimate

KL = ("objective/kl", "objective/kl_k3")
PER_COMPLETION = ("objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores", *KL)
PER_TOKEN = (
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/ratio_var",
)


def rollout_sums(
    scores: Tensor,
    scored: Tensor,
    penalty: Tensor,
    logps: Tensor,
    ref_logps: Tensor | None,
    values: Tensor,
    returns: Tensor,
    ended: Tensor,
    mask: Tensor,
) -> Tensor:
    """Sum the statistics of a rollout, for `rollout_means`.

    Args:
        scores: Scores, normalised and penalised.
        scored: (B,) boolean, False for a completion that nothing is learned from.
        penalty: Reward subtracted at each token for its KL.
        logps: Log-probabilities under the policy that sampled the tokens.
        ref_logps: The same under the reference; None without one.
        values: The critic's estimates.
        returns: Returns.
        ended: (B,) boolean, whether a completion ended with an end of turn.
        mask: The mask.

    Returns:
        One sum for each statistic, in float64 where the device has it.
    """
    compared = logps if ref_logps is None else ref_logps
    kls = [(kl_estimate(logps, compared, estimator) * mask).sum(1) for estimator in ("k1", "k3")]
    total = (penalty * mask).sum(1)
    per_completion = (-(logps * mask).sum(1), -total, scores - total, scores, *kls, torch.ones_like(scores))
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    returns, values = returns.to(exact), values.to(exact)
    per_token = (returns, returns.square(), (returns - values).square(), torch.ones_like(returns))
    sums = [(x.to(exact) * scored).sum() for x in per_completion]
    sums += [(x * mask).sum() for x in per_token]
    return torch.stack([*sums, (ended & scored).sum().to(exact)])


def rollout_means(sums: Tensor, with_kl: bool) -> dict[str, float]:
    """Return the metrics of rollouts by name, NaN where there is nothing to average.

    Args:
        sums: The sums of `rollout_sums`, added up.
        with_kl: Whether there was a reference.
    """
    *totals, completions, returns, squares, errors, tokens, ended = sums.tolist()
    metrics = {
        name: total / completions if completions else float("nan")
        for name, total in zip(PER_COMPLETION, totals, strict=True)
        if with_kl or name not in KL
    }
    tokens = max(tokens, 1.0)
    spread = squares / tokens - (returns / tokens) ** 2
    metrics["val/explained_variance"] = 1 - errors / tokens / max(spread, 1e-8)
    metrics["val/num_eos_tokens"] = ended
    return metrics


def update_sums(
    log_ratio: Tensor,
    entropies: Tensor,
    advantages: Tensor,
    cliprange: float,
    value_losses: Tensor,
    value_clipped: Tensor,
    mask: Tensor,
) -> Tensor:
    """Sum the statistics of one forward pass, for `update_means`: one sum for each of `PER_TOKEN`, and the tokens.

    `entropies` are those of the policy's distribution before each token, in nats; `cliprange` is the policy's;
    `value_losses` and `value_clipped` are as `clipped_value_loss` returns them.
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
    """Return the metrics of updates by name, from the sums of `update_sums`, added up; empty without tokens."""
    *totals, tokens = sums.tolist()
    if not tokens:
        return {}
    metrics = {name: total / tokens for name, total in zip(PER_TOKEN, totals, strict=True)}
    metrics["val/ratio_var"] -= metrics["val/ratio"] ** 2
    return metrics
