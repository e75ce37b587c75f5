"""PPO for a language model, the whole algorithm in one file, with plain torch and transformers.

    python -m lessons.ppo_loop runs/pocket/seed0 runs/ppo_loop

trains the `2_sft` of a finished run of pocket against its `3_reward`, with the settings of `recipes/pocket/3_ppo.yaml`,
and writes the policy, which `fourstage chat` opens. It computes what `pipeline.rl.ppo.PPOTrainer` does, in float32, on
one process, without adapters, checkpoints and faster kernels (`tests/lessons/test_ppo_loop.py` compares the two).

Four networks take part. Two are trained, each by its own optimizer, and two are frozen:

    policy      trained  writes completions; begins as `2_sft`
    critic      trained  guesses, before each token, what reward is still to come; begins as `3_reward`
    reward      frozen   scores a whole conversation
    reference   frozen   is `2_sft`; what the policy may not drift away from

Shapes: `B` completions, `L` tokens of a prompt and its completion, `T` tokens of the completion.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


@dataclass
class Settings:
    """The settings of `recipes/pocket/3_ppo.yaml`, and TRL's defaults for what it does not name."""

    rollouts: int = 30
    completions: int = 128  # of one rollout
    batch_size: int = 64  # completions of one update
    epochs: int = 2  # how often each rollout is trained on
    max_new_tokens: int = 64
    learning_rate: float = 1.5e-4
    value_learning_rate: float = 5e-4
    warmup_steps: int = 2
    max_grad_norm: float = 1.0
    kl_coef: float = 0.25  # reward that a nat of drift from the reference costs
    missing_eos_penalty: float = 1.0  # reward that a completion without an end costs
    gamma: float = 1.0  # discount of a reward per token that it lies in the future
    lam: float = 0.95  # 0 trusts the critic, 1 the rewards
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1


@dataclass
class Rollout:
    """Completions with all that an update has to know of the policy and the critic that sampled and judged them."""

    ids: Tensor  # (B, L) prompts, padded on the left, and completions, padded on the right
    attention: Tensor  # (B, L) 1 for what is not padding
    mask: Tensor  # (B, T) 1 for tokens that the policy chose, including its end of turn
    logps: Tensor  # (B, T) log-probabilities when they were sampled
    values: Tensor  # (B, T) the critic's guesses
    advantages: Tensor  # (B, T) how much better each token was than the critic expected
    returns: Tensor  # (B, T) what the critic should have guessed

    def rows(self, index: Tensor) -> "Rollout":
        """Return some of the completions."""
        return Rollout(*(getattr(self, field.name)[index] for field in fields(self)))


# ---- What the networks say


def positions(attention: Tensor) -> Tensor:
    """Count positions from the first token of each prompt, so that padding changes nothing."""
    return (attention.cumsum(1) - 1).clamp(min=0)


def log_probs(model: PreTrainedModel, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """Return the log-probability of each of the last `length` tokens, given those before it: (B, `length`)."""
    # The logits at a token are about the next one. So those of the last token are not needed, but one before the first.
    output = model(ids, attention_mask=attention, position_ids=positions(attention), logits_to_keep=length + 1)
    logps = output.logits[:, :-1].float().log_softmax(-1)
    return logps.gather(2, ids[:, -length:, None]).squeeze(2)


def estimate_values(critic: PreTrainedModel, ids: Tensor, attention: Tensor, length: int) -> Tensor:
    """Return what the critic expects before each of the last `length` tokens is chosen: (B, `length`)."""
    output = critic(ids, attention_mask=attention, position_ids=positions(attention))
    return output.logits[:, -length - 1 : -1, 0].float()


# ---- A rollout


@torch.no_grad()
def sample(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int) -> Rollout:
    """Let the policy complete the prompts. Return ids and masks; everything else is not known yet."""
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    ids = policy.generate(**batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens)
    completions = ids[:, batch["input_ids"].shape[1] :]
    # A token is the policy's choice until its first end of turn; `generate` pads what follows.
    ends = (completions == tokenizer.eos_token_id).int()
    mask = (ends.cumsum(1) - ends == 0).int()
    attention = torch.cat([batch["attention_mask"], mask], dim=1)
    nothing = torch.zeros(mask.shape)
    return Rollout(ids, attention, mask, nothing, nothing, nothing, nothing)


def token_rewards(scores: Tensor, logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Return the reward of each token (B, T): minus its KL penalty, and at the last token the score (B,) as well."""
    # log p(token) - log p_reference(token): averaged over what the policy samples, this is KL(policy || reference).
    rewards = -kl_coef * (logps - ref_logps) * mask
    last = mask.sum(1) - 1
    rewards[torch.arange(len(rewards)), last] += scores
    return rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return the advantages of generalised advantage estimation and the returns, both (B, T)."""
    advantages = torch.zeros_like(rewards)
    next_value, next_advantage = torch.zeros(len(rewards)), torch.zeros(len(rewards))
    # From the last token to the first. The surprise of a token is its reward, plus what the critic still expects after
    # it, minus what it expected before. An advantage is this surprise and, weighted less, those of later tokens.
    for t in reversed(range(rewards.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (surprise + gamma * lam * next_advantage) * mask[:, t]
        next_value, next_advantage = values[:, t] * mask[:, t], advantages[:, t]
    return advantages, (advantages + values) * mask


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` where `mask` is 1."""
    return (x * mask).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale `x` to mean 0 and variance 1 where `mask` is 1."""
    centered = (x - masked_mean(x, mask)) * mask
    return centered * torch.rsqrt(masked_mean(centered.square(), mask) + 1e-8)


@torch.no_grad()
def judge(
    rollout: Rollout, models: dict[str, PreTrainedModel], end: int, settings: Settings
) -> tuple[Rollout, dict[str, float]]:
    """Score the completions, and work out the advantage of every token. Return the rollout, and what to print."""
    ids, attention, mask = rollout.ids, rollout.attention, rollout.mask
    length = mask.shape[1]
    logps = log_probs(models["policy"], ids, attention, length)
    ref_logps = log_probs(models["reference"], ids, attention, length)
    values = estimate_values(models["critic"], ids, attention, length)
    output = models["reward"](ids, attention_mask=attention, position_ids=positions(attention))
    scores = output.logits[:, 0].float()
    last = ids[:, -length:][torch.arange(len(ids)), mask.sum(1) - 1]
    scores = scores - settings.missing_eos_penalty * (last != end)

    rewards = token_rewards(scores, logps, ref_logps, mask, settings.kl_coef)
    advantages, returns = generalized_advantages(rewards, values, mask, settings.gamma, settings.lam)
    figures = {
        "score": scores.mean().item(),
        "kl": ((logps - ref_logps) * mask).sum(1).mean().item(),
        "length": mask.sum(1).float().mean().item(),
    }
    return Rollout(ids, attention, mask, logps, values, whiten(advantages, mask), returns), figures


# ---- An update


def policy_loss(logps: Tensor, batch: Rollout, cliprange: float) -> Tensor:
    """Return the clipped loss of each token (B, T)."""
    # How much more probable the token has become since it was sampled. Beyond the clip range, where it would pay to go
    # further, the smaller term is constant, so that its gradient is 0.
    ratio = (logps - batch.logps).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)


def value_loss(values: Tensor, batch: Rollout, cliprange: float) -> Tensor:
    """Return half the squared error of the critic at each token (B, T), clipped in the same spirit."""
    clipped = values.clamp(batch.values - cliprange, batch.values + cliprange)
    return 0.5 * torch.maximum((values - batch.returns).square(), (clipped - batch.returns).square())


def losses(
    policy: PreTrainedModel, critic: PreTrainedModel, batch: Rollout, tokens: float, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return the losses of policy and critic: sums over all tokens, divided by the `tokens` of an average batch."""
    length = batch.mask.shape[1]
    logps = log_probs(policy, batch.ids, batch.attention, length)
    values = estimate_values(critic, batch.ids, batch.attention, length)
    of_policy = (policy_loss(logps, batch, settings.cliprange) * batch.mask).sum() / tokens
    of_critic = (value_loss(values, batch, settings.cliprange_value) * batch.mask).sum() / tokens
    return of_policy, settings.vf_coef * of_critic


def print_figures(number: int, figures: dict[str, float]) -> None:
    """Print what `judge` measured on a rollout."""
    print(f"rollout {number}", *(f"{name} {value:.3f}" for name, value in figures.items()))


def train(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterator[str],
    settings: Settings,
    on_rollout: Callable[[int, dict[str, float]], None] = print_figures,
) -> None:
    """Train the policy and the critic of `models` in place.

    `on_rollout` is called with the number of a rollout, from 1, and what `judge` measured on it, before the updates.
    """
    rates = {"policy": settings.learning_rate, "critic": settings.value_learning_rate}
    optimizers = {
        name: torch.optim.AdamW(models[name].parameters(), lr=rate, weight_decay=0.0) for name, rate in rates.items()
    }
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / settings.warmup_steps))
        for optimizer in optimizers.values()
    ]
    for number in range(1, settings.rollouts + 1):
        texts = [next(prompts) for _ in range(settings.completions)]
        rollout = sample(models["policy"], tokenizer, texts, settings.max_new_tokens)
        rollout, figures = judge(rollout, models, tokenizer.eos_token_id, settings)
        on_rollout(number, figures)
        tokens = rollout.mask.sum().item() * settings.batch_size / settings.completions
        for _ in range(settings.epochs):
            for index in torch.arange(settings.completions).split(settings.batch_size):
                of_policy, of_critic = losses(models["policy"], models["critic"], rollout.rows(index), tokens, settings)
                (of_policy + of_critic).backward()
                for name, optimizer in optimizers.items():
                    nn.utils.clip_grad_norm_(models[name].parameters(), settings.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                for schedule in schedules:
                    schedule.step()


# ---- The command


def load_models(run: Path) -> dict[str, PreTrainedModel]:
    """Load the four networks of a run, in evaluation mode: dropout would move ratios away from 1."""
    policy = AutoModelForCausalLM.from_pretrained(run / "2_sft")
    reward = AutoModelForSequenceClassification.from_pretrained(run / "3_reward", num_labels=1)
    # The critic is the reward model, read at every token. It has a bias, which the reward model lacks.
    critic = AutoModelForTokenClassification.from_pretrained(run / "3_reward", num_labels=1)
    nn.init.zeros_(critic.score.bias)
    models = {"policy": policy, "critic": critic, "reward": reward, "reference": copy.deepcopy(policy)}
    return {name: model.eval() for name, model in models.items()}


def endless_prompts(run: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[str]:
    """Yield the training prompts of preference tuning as texts, in a new order in each epoch."""
    rows = load_dataset("parquet", data_files=str(run / "data" / "preferences" / "train.parquet"), split="train")
    while True:
        for row in rows.shuffle(seed=seed):
            yield tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        seed += 1


def main() -> None:
    """Train the policy of a run, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of pocket, such as runs/pocket/seed0")
    parser.add_argument("output", type=Path, help="a new folder for the policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rollouts", type=int, default=Settings.rollouts)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.run / "2_sft")
    models = load_models(args.run)
    train(models, tokenizer, endless_prompts(args.run, tokenizer, args.seed), Settings(rollouts=args.rollouts))
    models["policy"].save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
