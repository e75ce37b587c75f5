"""The recipes that sample, PPO and GRPO, on the toy world: inputs on disk, and how they are launched."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers import ppo_toy as toy
from tests.helpers.forked import RANKS, run_forked

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
OWN: dict[str, dict[str, Any]] = {
    "ppo": {"reward_model_path": "reward", "num_generations": 1, "reward_normalization": "batch"},
    "grpo": {"num_generations": 2},
}
"""Fields that only one recipe has."""


def write_config(recipe: str, folder: Path, experts: bool = False, **changes: Any) -> list[str]:
    """Save a policy, a reward model, prompts, and a YAML file that names them.

    A rollout of 8 completions lasts two optimizer steps, each of two micro-batches.

    Args:
        recipe: "ppo" or "grpo".
        folder: Where to save them.
        experts: Whether the models are mixtures of experts.
        **changes: Further fields of the file.

    Returns:
        The options that name the file.
    """
    dense, mixed = (toy.policy, toy.reward_model), (toy.policy_of_experts, toy.reward_model_of_experts)
    for name, model in zip(("policy", "reward"), mixed if experts else dense, strict=True):
        model().save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    toy.prompts(32).to_json(folder / "prompts.jsonl")
    fields: dict[str, Any] = {
        "model_name_or_path": str(folder / "policy"),
        "dataset_name": str(folder / "prompts.jsonl"),
        "validation_share": 0.25,
        "reward_funcs": ["tests.helpers.ppo_toy:share_of_red"],
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "bf16": False,
        "logging_steps": 1,
        "report_to": "none",
    }
    fields |= {n: str(folder / v) if n == "reward_model_path" else v for n, v in OWN[recipe].items()} | changes
    config = folder / f"{recipe}.yaml"
    config.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in fields.items()))
    return ["--config", str(config)]


def command(module: str, *arguments: str, processes: int = 1) -> list[str]:
    """Return the command line that runs a module on one process or several."""
    launch = [*RANKS, str(processes)] if processes > 1 else []
    return [sys.executable, *launch, "-m", module, *arguments]


def run(module: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a module to its end."""
    return run_forked(command(module, *arguments, processes=processes), environment=ENVIRONMENT)
