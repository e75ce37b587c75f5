"""The losses of GRPO that TRL has: their settings by name, and what each computes, in words and as a formula."""

from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig

from pipeline.app.models import Values


@dataclass(frozen=True)
class Loss:
    """The settings of a loss: `loss_type`, and whether there is a ratio for each "token" or "sequence"."""

    loss_type: str
    level: str = "token"


LOSSES = {
    "grpo": Loss("grpo"),
    "bnpo": Loss("bnpo"),
    "dr_grpo": Loss("dr_grpo"),
    "dapo": Loss("dapo"),
    "cispo": Loss("cispo"),
    "sapo": Loss("sapo"),
    "gspo": Loss("grpo", "sequence"),
    "luspo": Loss("luspo", "sequence"),
    "vespo": Loss("vespo"),
}
"""What a visitor chooses from. GSPO is a setting of its own in TRL, not a `loss_type`."""
CISPO_CLIP = 5.0
"""Maximum ratio of CISPO that TRL recommends. Other losses clip at 1 + epsilon."""


def loss_of(settings: Values) -> Loss:
    """Return the loss that a stage was trained with."""
    loss_type = str(settings.get("loss_type", GRPOConfig.loss_type))
    level = str(settings.get("importance_sampling_level", GRPOConfig.importance_sampling_level))
    return Loss(loss_type, level)


def loss_name(settings: Values) -> str:
    """Return the name of the loss that a stage was trained with, which may not be among `LOSSES`."""
    loss = loss_of(settings)
    names = [name for name, entry in LOSSES.items() if entry == loss]
    return names[0] if names else f"{loss.loss_type} with a ratio for each {loss.level}"


def with_loss(settings: Values, name: str) -> dict[str, Any]:
    """Return the settings of a stage with another loss: one of `LOSSES`, or "" for the stage's own."""
    if not name or name == loss_name(settings):
        return dict(settings)
    loss = LOSSES[name]
    changed = {**settings, "loss_type": loss.loss_type, "importance_sampling_level": loss.level}
    # The limit of CISPO is a ratio, that of the others a distance from 1: one is of no use for the other.
    if loss.loss_type == "cispo":
        changed["epsilon_high"] = CISPO_CLIP
    elif settings.get("loss_type") == "cispo":
        changed["epsilon_high"] = None
    return changed


def explain_ratio(args: GRPOConfig) -> str:
    """Return what the ratio r is, as the rest of a sentence."""
    if args.importance_sampling_level == "sequence":
        return (
            "is how many times as probable a token is as when it was sampled, here the geometric mean over the tokens "
            "of the completion."
        )
    return "is how many times as probable the token is as when it was sampled."


def explain_term(args: GRPOConfig) -> tuple[str, list[list[str]]]:
    """Return the term of a token before it is divided, as a formula, and what its parts mean.

    In the formula, r is the ratio, A the advantage, and log p the log-probability. A part is a name, and the rest of a
    sentence that begins with it.
    """
    low, high = clip_range(args)
    if args.loss_type == "cispo":
        words = "is only a weight: a clipped token is pushed, too."
        return f"−min(r, {high:g}) × A × log p", [[f"The ratio, clipped at {high:g},", words]]
    if args.loss_type == "sapo":
        tau = f"is {args.sapo_temperature_pos:g} if A is above 0, and {args.sapo_temperature_neg:g} otherwise."
        sigma = "is the logistic function. Nothing is clipped, but the push fades where r is far from 1."
        return "−4/τ × σ(τ × (r − 1)) × A", [["τ", tau], ["σ", sigma]]
    if args.loss_type == "vespo":
        product = (
            "is the product of the ratios of all tokens of the completion. Nothing is clipped, but the push fades "
        )
        product += "where w is far from 1."
        powers = f"are {args.vespo_k_pos:g} and {args.vespo_lambda_pos:g} if A is not below 0, and "
        powers += f"{args.vespo_k_neg:g} and {args.vespo_lambda_neg:g} otherwise."
        return "−w^k × exp(λ × (1 − w)) × A × log p", [["w", product], ["k and λ", powers]]
    ratio = "r" if args.delta is None else f"min(r, {args.delta:g})"
    formula = f"−min({ratio} × A, clip(r, {low:g}, {high:g}) × A)"
    words = f"and no longer pushed, if its ratio is above {high:g} and A above 0, or below {low:g} and A below 0"
    if args.delta is not None:
        words += f", or above {args.delta:g} and A below 0"
    return formula, [["A token is clipped,", f"{words}."]]


def clip_range(args: GRPOConfig) -> tuple[float, float]:
    """Return the lowest and the highest ratio that are not clipped. CISPO has no lowest one."""
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.loss_type == "cispo":
        return 0.0, high
    return 1 - args.epsilon, 1 + high


def explain_first_update(args: GRPOConfig) -> str:
    """Return what is special in the first update, as the rest of a sentence."""
    _, high = clip_range(args)
    if args.loss_type == "cispo" and high < 1:
        return f"every ratio is 1, and clipped at {high:g}: other losses push {1 / high:.3g} times as strongly."
    return (
        "every ratio is 1, and losses only differ in what they divide by: bnpo, dapo, cispo and vespo push alike, and "
        "so do grpo, gspo and sapo."
    )


def explain_divisor(args: GRPOConfig, completions: int, tokens: int) -> tuple[str, str]:
    """Return what the terms of a group are divided by, as a formula, and what that means as the rest of a sentence.

    Args:
        args: The configuration of the trainer.
        completions: Completions of the group.
        tokens: Tokens of the group that the model learns from.
    """
    if args.loss_type in ("grpo", "sapo"):
        words = "takes the mean of each completion, then of all: a token of a short completion counts more."
        return f"({completions} × tokens of the completion)", words
    if args.loss_type == "dr_grpo":
        words = "divides by the number of completions times max_completion_length: all tokens always count the same."
        return f"({completions} × {args.max_completion_length})", words
    if args.loss_type == "luspo":
        return str(completions), "divides by the number of completions: a long completion counts more than a short one."
    batch = "batch" if args.loss_type == "bnpo" else "rollout"
    words = f"divides by the number of tokens of the {batch}, here of this group: all tokens count the same."
    return str(tokens), words
