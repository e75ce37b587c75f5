"""
# TRL 1.12's `PPOTrainer` against `pipeline.rl.ppo.PPOTrainer`

```bash
python -m tests.benchmarks.ppo_vs_trl --run runs/pocket
```

Both train the run's `2_sft` against its `3_reward` on the same prompts, for the same number of episodes and PPO epochs,
with the same coefficients, batch and learning rate, one after the other on the same machine, under each of five seeds.
TRL 1.12, the last release with a PPO trainer, is installed into a separate folder, and shares torch and transformers
with ours. It ignores `bf16`, so ours runs twice: in float32, and in bf16 with eager attention if the machine computes
in bf16. Then each policy answers the held-out prompts, eight times each, and the hidden taste of the simulated
annotators and the reward model judge the answers; `over_trl` is the difference in taste on the same prompts, and
`speedup` the ratio of episodes a second.

Prints the means over the seeds with half of their 95% intervals (Student's, and never narrower than over the prompts),
and writes OUTPUT/results.json.
"""

import argparse
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.side_by_side import Contest, answers, compare, load, measure, parse, rows

TRL = "trl==1.12.*"


def main() -> None:
    args = parse(
        __doc__,
        "ppo_vs_trl",
        episodes=(2048, "completions to train on"),
        batch_size=(64, "completions in a rollout, and in an optimizer step"),
        epochs=(4, "PPO epochs over a rollout"),
        learning_rate=(1e-4, "learning rate"),
        kl_coef=(0.05, "weight of the KL penalty"),
    )
    if args.train:
        {"trl": train_trl, "ours": train_ours}[args.train](args)
        return
    from pipeline import hardware

    contestants = {"TRL 1.12 float32": ("trl", False), "ours float32": ("ours", False)}
    if hardware.precision().value == "bf16":
        contestants["ours bf16"] = ("ours", True)
    environments = {"trl": install_trl(args.output / "environment")}
    compare(
        args,
        Contest(
            "tests.benchmarks.ppo_vs_trl", "2_sft", "episodes_per_second", "taste", judge, contestants, environments
        ),
    )


def install_trl(folder: Path) -> Path:
    """Install TRL 1.12 without its dependencies into a folder, unless it is already installed there."""
    if not (folder / "trl").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", str(folder), TRL], check=True)
    return folder.resolve()


def common(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that both configurations have in common."""
    return {
        "output_dir": str(args.output),
        "learning_rate": args.learning_rate,
        # TRL would step any other schedule once per rollout, ours steps it once per optimizer step.
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": args.batch_size,
        "kl_coef": args.kl_coef,
        "temperature": 1.0,
        "missing_eos_penalty": 1.0,
        "gamma": 1.0,
        "lam": 0.95,
        "vf_coef": 0.1,
        "seed": args.seed,
        "bf16": args.bf16,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 8,
        "report_to": "none",
        "disable_tqdm": True,
    }


def build_trl(args: argparse.Namespace, **options: Any) -> Any:
    """Build TRL 1.12's trainer as its own example script does; `options` are further fields of its configuration."""
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.run / "2_sft", padding_side="left")

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    prompts, held_out = rows(args, "preferences", "train"), rows(args, "preferences", "validation")
    return PPOTrainer(
        args=PPOConfig(
            **common(args)
            | {
                "total_episodes": args.episodes,
                "num_ppo_epochs": args.epochs,
                "num_mini_batches": 1,
                "local_rollout_forward_batch_size": args.batch_size,
                "response_length": args.max_completion_length,
                "stop_token": "eos",
                "num_sample_generations": 0,
            }
            | options
        ),
        processing_class=tokenizer,
        model=load(args, "AutoModelForCausalLM", "2_sft"),
        ref_model=load(args, "AutoModelForCausalLM", "2_sft"),
        reward_model=load(args, "AutoModelForSequenceClassification", "3_reward"),
        value_model=load(args, "AutoModelForSequenceClassification", "3_reward"),
        train_dataset=prompts.map(tokenize, remove_columns=prompts.column_names),
        eval_dataset=held_out.select(range(8)).map(tokenize, remove_columns=prompts.column_names),
    )


def build_ours(args: argparse.Namespace, **options: Any) -> Any:
    """Build ours, from the same weights, with the same loss."""
    from transformers import AutoTokenizer

    from pipeline import hardware
    from pipeline.rl.ppo import PPOConfig, PPOTrainer

    return PPOTrainer(
        load(args, "AutoModelForCausalLM", "2_sft"),
        [load(args, "AutoModelForSequenceClassification", "3_reward")],
        PPOConfig(
            **common(args)
            | {
                "max_steps": math.ceil(args.episodes / args.batch_size) * args.epochs,
                "num_iterations": args.epochs,
                "max_completion_length": args.max_completion_length,
                "use_cpu": hardware.accelerator() is None,
            }
            | options
        ),
        rows(args, "preferences", "train"),
        rows(args, "preferences", "validation").select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(args.run / "2_sft"),
    )


def train_trl(args: argparse.Namespace) -> None:
    """Train TRL's, and save its policy and tokenizer."""
    trainer = build_trl(args)
    measure(args, args.episodes, trainer.train)
    trainer.policy_model.save_pretrained(args.output)
    trainer.processing_class.save_pretrained(args.output)


def train_ours(args: argparse.Namespace) -> None:
    """Train and save ours."""
    trainer = build_ours(args)
    measure(args, args.episodes, trainer.train)
    trainer.save_model()


def judge(args: argparse.Namespace, folder: Path) -> tuple[list[float], dict[str, float]]:
    """Return the annotators' taste for each held-out prompt, and the reward model's mean score of the answers."""
    import torch
    from transformers import AutoTokenizer

    from pipeline.preferences.judges import score
    from recipes.worlds.pocket.annotators import taste

    prompts = [row for split in ("validation", "test") for row in rows(args, "preferences", split)]
    reward_model = load(args, "AutoModelForSequenceClassification", "3_reward").eval()
    given = answers(args, folder, prompts)
    conversations = [
        [*row["prompt"], {"role": "assistant", "content": answer.text}]
        for row, several in zip(prompts, given, strict=True)
        for answer in several
    ]
    with torch.inference_mode():
        scores = score(reward_model, AutoTokenizer.from_pretrained(args.run / "2_sft"), conversations)
    tastes = [
        statistics.fmean(taste(answer.text, row) for answer in several)
        for several, row in zip(given, prompts, strict=True)
    ]
    lengths = [len(answer.tokens) for several in given for answer in several]
    return tastes, {
        "score": statistics.fmean(scores),
        "length": statistics.fmean(lengths),
        "answers": len(lengths),
    }


if __name__ == "__main__":
    main()
