"""GRPO for a language model, in one file: what is left of PPO without a critic, a reward model and a reference.

    python -m lessons.grpo_loop runs/pocket/seed0 runs/grpo_loop

trains the `3_ppo` of a finished run of pocket on its problems, with the settings of `recipes/pocket/4_grpo.yaml`, and
writes the policy, which `fourstage chat` opens. It computes what TRL's `GRPOTrainer` does, in float32, on one process
(`tests/lessons/test_grpo_loop.py` compares the two). Sampling, log-probabilities and the clipped loss of a token are
PPO's, from `lessons.ppo_loop`.

Several completions answer the same prompt: a group. What the critic is for PPO, the mean reward of the group is here:
an answer is as good as it is better than the others to the same prompt, and all its tokens share this advantage.

Shapes: `B` completions, each group's in a row, with `T` tokens.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lessons.ppo_loop import Rollout, log_probs, policy_loss, sample
from pipeline.rewards.functions import exact_answer

Reward = Callable[[list[str], list[Any]], Sequence[float]]
"""Returns a reward for each answer, given the answers and the reference of each."""


@dataclass
class Settings:
    """The settings of `recipes/pocket/4_grpo.yaml`, and TRL's defaults for what it does not name."""

    steps: int = 48
    prompts: int = 16  # of one step
    num_generations: int = 8  # completions of each prompt
    updates: int = 1  # how often each rollout is trained on; TRL: num_iterations
    max_new_tokens: int = 64
    learning_rate: float = 2e-4
    warmup_steps: int = 3
    max_grad_norm: float = 1.0
    cliprange: float = 0.2  # TRL: epsilon
    scale_rewards: str = "group"  # or "none"
    loss_type: str = "dapo"  # or "grpo", "dr_grpo"


# ---- A rollout


@torch.no_grad()
def judge(
    rollout: Rollout,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    references: list[Any],
    reward: Reward,
    settings: Settings,
) -> tuple[Rollout, Tensor]:
    """Reward the completions, and work out their advantages. Return the rollout, and the rewards (B,).

    A completion that the limit cut off is judged as it stands, and all its tokens are trained on.
    """
    length = rollout.mask.shape[1]
    answers = tokenizer.batch_decode(rollout.ids[:, -length:], skip_special_tokens=True)
    rewards = torch.tensor(list(reward(answers, references)), dtype=torch.float32)
    advantages = group_advantages(rewards, settings.num_generations, settings.scale_rewards)
    logps = log_probs(policy, rollout.ids, rollout.attention, length)
    # Without a critic, nothing tells the tokens of a completion apart.
    return replace(rollout, logps=logps, advantages=advantages[:, None].expand_as(logps)), rewards


def group_advantages(rewards: Tensor, num_generations: int, scale_rewards: str = "group") -> Tensor:
    """Return how much better each completion (B,) is than the mean of its group.

    With `scale_rewards` "group", in standard deviations of the group: a rare success counts more. If all completions of
    a group have the same reward, their advantages are 0, and nothing is learned from them.
    """
    groups = rewards.view(-1, num_generations)
    advantages = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


# ---- An update


def average(losses: Tensor, mask: Tensor, settings: Settings) -> Tensor:
    """Return the mean of the losses of all tokens (B, T), which the `loss_type`s define differently."""
    if settings.loss_type == "grpo":
        # Each completion counts the same, so that a token of a long one counts less (arXiv:2402.03300).
        return ((losses * mask).sum(1) / mask.sum(1)).mean()
    if settings.loss_type == "dr_grpo":
        # Each token counts the same in all rollouts, however long their completions are (arXiv:2503.20783).
        return (losses * mask).sum() / (len(mask) * settings.max_new_tokens)
    # dapo: each token counts the same within a rollout (arXiv:2503.14476).
    return (losses * mask).sum() / mask.sum()


def loss(policy: PreTrainedModel, batch: Rollout, settings: Settings) -> Tensor:
    """Return the loss of the policy on a rollout."""
    # In the first update of a rollout, every ratio is 1, and nothing is clipped.
    logps = log_probs(policy, batch.ids, batch.attention, batch.mask.shape[1])
    return average(policy_loss(logps, batch, settings.cliprange), batch.mask, settings)


def train(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Iterator[tuple[str, Any]],
    reward: Reward,
    settings: Settings,
) -> None:
    """Train the policy in place. `problems` are pairs of a prompt's text and a reference for the reward."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / settings.warmup_steps))
    for step in range(settings.steps):
        batch = [next(problems) for _ in range(settings.prompts)]
        # Each problem, `num_generations` times in a row.
        prompts = [prompt for prompt, _ in batch for _ in range(settings.num_generations)]
        references = [reference for _, reference in batch for _ in range(settings.num_generations)]
        rollout = sample(policy, tokenizer, prompts, settings.max_new_tokens)
        rollout, rewards = judge(rollout, policy, tokenizer, references, reward, settings)
        length = rollout.mask.sum(1).float().mean()
        print(f"step {step + 1}/{settings.steps} reward {rewards.mean():.3f} length {length:.1f}")
        for _ in range(settings.updates):
            loss(policy, rollout, settings).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


# ---- The command


def endless_problems(run: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[tuple[str, str]]:
    """Yield the training problems of reasoning tuning as texts with their results, in a new order in each epoch."""
    rows = load_dataset("parquet", data_files=str(run / "data" / "reasoning" / "train.parquet"), split="train")
    problems = []
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        problems.append((prompt, row["answer"]))
    order = random.Random(seed)
    while True:
        order.shuffle(problems)
        yield from problems


def correct(answers: list[str], references: list[str]) -> list[float]:
    """Return 1.0 for each answer that ends with its reference, and 0.0 for the others."""
    rewards = exact_answer(answers, references)
    return [1.0 if reward == 1.0 else 0.0 for reward in rewards]


def main() -> None:
    """Train the policy of a run, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of pocket, such as runs/pocket/seed0")
    parser.add_argument("output", type=Path, help="a new folder for the policy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=Settings.steps)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.run / "3_ppo")
    # In evaluation mode: dropout would move ratios away from 1.
    policy = AutoModelForCausalLM.from_pretrained(args.run / "3_ppo").eval()
    problems = endless_problems(args.run, tokenizer, args.seed)
    train(policy, tokenizer, problems, correct, Settings(steps=args.steps))
    policy.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
