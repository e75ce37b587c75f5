"""GRPO for a language model, in one file: what is left of PPO without a critic, a reward model and a reference.

    python -m lessons.grpo_loop runs/pocket/seed0 runs/grpo_loop

trains the `3_ppo` of a finished run of pocket on its problems, with the settings of `recipes/pocket/4_grpo.yaml`, and
writes the policy, which `fourstage chat` opens. It computes what TRL's `GRPOTrainer` does with `loss_type: dapo`, its
default, on one process (`tests/lessons/test_grpo_loop.py` compares the two). Sampling and log-probabilities are those
of `lessons.ppo_loop`.

Several completions answer the same prompt: a group. What the critic is for PPO, the mean reward of the group is here:
an answer is as good as it is better than the others to the same prompt, and all its tokens share this advantage.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lessons.ppo_loop import log_probs, sample
from pipeline.rewards.functions import exact_answer

Reward = Callable[[list[str], list[Any]], Sequence[float]]
"""Returns a reward for each answer, given the answers, and for each the reference of its prompt."""


@dataclass
class Settings:
    """The settings of `recipes/pocket/4_grpo.yaml`, and TRL's defaults for what it does not name."""

    steps: int = 48
    prompts: int = 16  # of one step
    num_generations: int = 8  # completions of each prompt
    updates: int = 1  # how often each rollout is trained on
    max_new_tokens: int = 64
    learning_rate: float = 2e-4
    warmup_steps: int = 3
    max_grad_norm: float = 1.0
    cliprange: float = 0.2


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Return how much better each completion (B,) is than its group, in standard deviations of the group."""
    groups = rewards.view(-1, num_generations)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return advantages.flatten()


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, cliprange: float) -> Tensor:
    """Return the clipped loss, averaged over all tokens of the rollout, so that long answers count more."""
    # In the first update of a rollout, every ratio is 1, and nothing is clipped.
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = -torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])
    return (losses * mask).sum() / mask.sum()


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
        # Each problem, `num_generations` times in a row.
        chosen = [next(problems) for _ in range(settings.prompts)]
        repeated = [problem for problem in chosen for _ in range(settings.num_generations)]
        rollout = sample(policy, tokenizer, [prompt for prompt, _ in repeated], settings.max_new_tokens)
        length = rollout.mask.shape[1]
        answers = tokenizer.batch_decode(rollout.ids[:, -length:], skip_special_tokens=True)
        rewards = torch.tensor(list(reward(answers, [reference for _, reference in repeated])))
        advantages = group_advantages(rewards, settings.num_generations)
        print(
            f"step {step + 1}/{settings.steps} reward {rewards.mean():.3f} length {rollout.mask.sum(1).float().mean():.1f}"
        )
        with torch.no_grad():
            old_logps = log_probs(policy, rollout.ids, rollout.attention, length)
        for _ in range(settings.updates):
            logps = log_probs(policy, rollout.ids, rollout.attention, length)
            policy_loss(logps, old_logps, advantages, rollout.mask, settings.cliprange).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def is_right(answers: list[str], references: list[str]) -> Sequence[float]:
    """Return 1 for an answer whose result is the reference, and 0 for others."""
    return [reward or 0.0 for reward in exact_answer(answers, references)]


def endless_problems(run: Path, tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[tuple[str, str]]:
    """Yield the training problems of reasoning tuning as texts with their results, in a new order in each epoch."""
    rows = load_dataset("parquet", data_files=str(run / "data" / "reasoning" / "train.parquet"), split="train")
    problems = [
        (tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True), row["answer"])
        for row in rows
    ]
    order = random.Random(seed)
    while True:
        order.shuffle(problems)
        yield from problems


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
    train(policy, tokenizer, problems, is_right, Settings(steps=args.steps))
    policy.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
