"""Run by `tests/test_ppo_processes.py`, on one process or two: `python ... OUTPUT_DIR ROWS_PER_PROCESS`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.ppo import PPOTrainer
from tests import ppo_toy as toy

ROLLOUT = 8


def fixed_rollout(prompts: list[Any], trainer: PPOTrainer) -> dict[str, Any]:
    """Completions that depend on the prompt and the rollout alone, not on who samples them."""
    tokenizer = toy.tokenizer()
    prompt_ids = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in prompts
    ]
    completion_ids = []
    for ids in prompt_ids:
        generator = torch.Generator().manual_seed(sum(ids) + trainer.state.global_step)
        words = torch.randint(5, 15, (1 + sum(ids) % 4,), generator=generator).tolist()
        completion_ids.append([*words, 2])
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def main(output_dir: str, rows: int) -> None:
    trainer = PPOTrainer(
        toy.policy(),
        [toy.reward_model(), toy.share_of_red],
        toy.config(
            output_dir,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=2,
            num_iterations=2,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            eval_strategy="steps",
            eval_steps=3,
            per_device_eval_batch_size=rows,
            reward_normalization="batch",
            shuffle_dataset=False,
            ddp_backend="gloo" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ),
        toy.prompts(16),
        eval_dataset=toy.prompts(8),
        processing_class=toy.tokenizer(),
        reward_processing_classes=[toy.tokenizer(), None],
        rollout_func=fixed_rollout,
    )
    gradients = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients.append(
            torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]).clone()
        )

    trainer.create_optimizer().register_step_pre_hook(keep)
    checkpoint = Path(output_dir) / "checkpoint-3"
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint.exists() else None)
    trainer.save_model()
    if trainer.is_world_process_zero():
        torch.save(
            {
                "processes": trainer.accelerator.num_processes,
                "gradients": gradients,
                "log": trainer.state.log_history,
            },
            Path(output_dir) / "seen.pt",
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
