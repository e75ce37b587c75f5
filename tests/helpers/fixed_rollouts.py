"""Run by `tests/recipes/test_sampling_recipes.py`: `python -m tests.helpers.fixed_rollouts RECIPE OPTIONS...`.

Runs a recipe, but with completions that depend only on the prompt and the step, and not on the process that samples
them. With tools, that is true of each turn of a dialogue. The gradients of every step, before clipping, are saved as
`seen.pt` in the output directory.
"""

import importlib
import random
import sys
from pathlib import Path
from typing import Any, get_type_hints

import torch

from pipeline.config.parser import parse
from pipeline.models.kernels import token_trees
from pipeline.rl import grpo, ppo
from tests.helpers import ppo_toy as toy

TURNS = [
    "<|call|>double<|argument|>n=2<|end|>",
    "<|call|>double<|argument|>n=2<|call|>double<|argument|>n=1<|end|>",
    "<|call|>nothing<|argument|>n=1<|end|>",
    "<|call|>double<|argument|>",
    "yes<|end|>",
    "no<|end|>",
]
"""What a policy that can call `tool_toy.double` says: one call, two, one that fails, one cut off, two answers."""


def fixed_rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Make completions from a few of the first words, with "red" among them, that differ within a group."""
    tokenizer = toy.tokenizer()
    group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    prompt_ids, completion_ids = [], []
    for number, prompt in enumerate(prompts):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        seed = sum(ids) + 100 * (number % group) + 1000 * trainer.state.global_step
        length = 1 + (sum(ids) + number % group) % 4
        words = torch.randint(5, 8, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        prompt_ids.append(ids)
        completion_ids.append([*words, tokenizer.eos_token_id])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def fixed_turn(texts: list[list[int]], trainer: Any) -> list[list[int]]:
    """Choose the turn that follows each text. First turns differ within a group, and so do texts of later ones."""
    group = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    turns = []
    for number, text in enumerate(texts):
        is_first = trainer._tokenizer.convert_tokens_to_ids("<|assistant|>") not in text[:-1]
        seed = sum(place * token for place, token in enumerate(text)) + 1000 * trainer.state.global_step
        choice = random.Random(seed + is_first * (number % group)).choice(TURNS)
        turns.append(trainer._tokenizer.encode(choice, add_special_tokens=False)[: trainer.max_completion_length])
    return turns


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return copies of the gradients of a model, flattened."""
    return [weight.grad.flatten().clone() for weight in model.parameters() if weight.grad is not None]


def with_fixed_rollouts(kind: type) -> type:
    """Return a subclass of a trainer that does not sample, and records its gradients."""

    class Fixed(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            fixed = {} if kwargs.get("tools") else {"rollout_func": fixed_rollout}
            super().__init__(*args, **fixed, **kwargs)
            self.gradients: list[torch.Tensor] = []
            self.of_critic: list[torch.Tensor] = []
            if hasattr(self, "critic"):
                self._record_critic()

        def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
            return fixed_turn(prompt_ids, self), None

        def _record_critic(self) -> None:
            step = self.critic.step

            def recorded_step(share: float) -> float:
                self.of_critic = gradients(self.critic.model)
                norm: float = step(share)
                return norm

            self.critic.step = recorded_step

        def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
            self.gradients.append(torch.cat([*gradients(model), *self.of_critic]))
            return super()._clip_grad_norm(model)

        def end(self) -> None:
            super().end()
            if self.is_world_process_zero():
                seen = {"processes": self.accelerator.num_processes, "gradients": self.gradients}
                torch.save(seen, Path(self.args.output_dir) / "seen.pt")

    return Fixed


def main(recipe: str, argv: list[str]) -> None:
    # So few tokens make several forward passes per backward pass, also on two processes.
    token_trees.CPU_TOKENS = 20
    module, name = (ppo, "PPOTrainer") if recipe == "ppo" else (grpo, "GRPOTrainer")
    setattr(module, name, with_fixed_rollouts(getattr(module, name)))
    main_of_recipe = importlib.import_module(f"recipes.{recipe}").main
    types = [hint for field, hint in get_type_hints(main_of_recipe).items() if field != "return"]
    main_of_recipe(*parse(*types, argv=argv))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
