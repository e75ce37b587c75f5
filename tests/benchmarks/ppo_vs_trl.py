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
annotators and the reward model judge the answers; `over_trl` is the difference in taste on the same prompts.

Prints the means over the seeds with half of their 95% intervals (Student's, and never narrower than over the prompts),
and writes OUTPUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRL = "trl==1.12.*"
ANSWERS = 8
"""Answers sampled for each prompt when a policy is judged."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/pocket"), help="run with 2_sft, 3_reward and data")
    add("--output", type=Path, default=Path("runs/benchmarks/ppo_vs_trl"))
    add("--episodes", type=int, default=2048, help="completions to train on")
    add("--batch_size", type=int, default=64, help="completions in a rollout, and in an optimizer step")
    add("--epochs", type=int, default=4, help="PPO epochs over a rollout")
    add("--learning_rate", type=float, default=1e-4)
    add("--kl_coef", type=float, default=0.05)
    add("--max_completion_length", type=int, default=64)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="each trains all policies once")
    add("--seed", type=int, help=argparse.SUPPRESS)
    add("--train", choices=["trl", "ours"], help=argparse.SUPPRESS)
    add("--bf16", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        {"trl": train_trl, "ours": train_ours}[args.train](args)
    else:
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """Train and judge under each seed, and print the results."""
    from pipeline import hardware
    from pipeline.report.seeds import spread

    environment = install_trl(args.output / "environment")
    contestants = {"TRL 1.12 float32": ("trl", False), "ours float32": ("ours", False)}
    if hardware.precision().value == "bf16":
        contestants["ours bf16"] = ("ours", True)
    runs = []
    for seed in args.seeds:
        own = argparse.Namespace(**vars(args) | {"seed": seed, "output": args.output / f"seed{seed}"})
        runs.append(train_and_judge(own, contestants, environment))
    results = {
        name: {column: spread([run[name][column] for run in runs]) for column in runs[0][name]} for name in runs[0]
    }
    content = {"arguments": vars(args), "results": results}
    (args.output / "results.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    columns = list(results["ours float32"])
    print(f"{'':18}" + "".join(f"{column:>22}" for column in columns))
    for name, row in results.items():
        print(
            f"{name:18}" + "".join(f"{format_spread(row[column]) if column in row else '':>22}" for column in columns)
        )


def format_spread(figures: dict[str, Any]) -> str:
    """Format a mean and half of its interval, if it has one."""
    half = f" ± {(figures['ci95'][1] - figures['ci95'][0]) / 2:.3f}" if figures["ci95"] else ""
    return f"{figures['mean']:.3f}{half}"


def train_and_judge(
    args: argparse.Namespace, contestants: dict[str, tuple[str, bool]], environment: Path
) -> dict[str, dict[str, Any]]:
    """Train each contestant in a new process, and judge the policies. Return their figures with intervals, by name.

    Args:
        args: The arguments, with the `seed` and its `output`.
        contestants: Name -> the trainer, and whether it computes in bf16.
        environment: Folder with TRL 1.12.
    """
    from pipeline.evaluation.intervals import Estimate, mean

    figures: dict[str, dict[str, Any]] = {}
    tastes: dict[str, list[float]] = {}
    for name, (trainer, bf16) in {"2_sft": ("", False), **contestants}.items():
        folder = args.output / name.replace(" ", "_") if trainer else args.run / name
        measured = {}
        if trainer:
            command = [sys.executable, "-m", "tests.benchmarks.ppo_vs_trl", *sys.argv[1:], "--train", trainer]
            command += ["--seed", str(args.seed), "--output", str(folder), *(["--bf16"] if bf16 else [])]
            path = [str(environment)] if trainer == "trl" else []
            variables = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
            subprocess.run(command, check=True, cwd=ROOT, env=variables)
            measured = json.loads((folder / "measured.json").read_text())
        judged = judge(args, folder)
        tastes[name] = judged.pop("tastes")
        plain = {column: Estimate(value) for column, value in (judged | measured).items()}
        # Answers to the same prompt are similar, so the interval is over prompts.
        figures[name] = {"taste": mean(tastes[name]), **plain}
    for name, own in figures.items():
        pairs = zip(tastes[name], tastes["TRL 1.12 float32"], strict=True)
        own["over_trl"] = mean([taste - other for taste, other in pairs])
        if speed := own.get("episodes_per_second"):
            own["speedup"] = Estimate(speed.value / figures["TRL 1.12 float32"]["episodes_per_second"].value)
    return figures


def install_trl(folder: Path) -> Path:
    """Install TRL 1.12 without its dependencies into a folder, unless it is already installed there."""
    if not (folder / "trl").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", str(folder), TRL], check=True)
    return folder.resolve()


def rows(args: argparse.Namespace, split: str) -> Any:
    """Load the run's prompts."""
    from datasets import Dataset

    return Dataset.from_parquet(str(args.run / "data" / "preferences" / f"{split}.parquet"))


def load(args: argparse.Namespace, head: str, name: str) -> Any:
    """Load one of the run's models, with its weights in float32."""
    import torch
    import transformers

    model = getattr(transformers, head)
    attention = {"attn_implementation": "eager"} if args.bf16 else {}
    return model.from_pretrained(args.run / name, dtype=torch.float32, **attention)


def common(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields that both configurations have in common."""
    return {
        "output_dir": str(args.output),
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",  # any other is stepped once a rollout by TRL, once a step by ours
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


def measure(args: argparse.Namespace, train: Any) -> None:
    """Train, and write the time and the memory that it took."""
    start = time.perf_counter()
    train()
    seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "episodes_per_second": args.episodes / seconds,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,  # Linux counts in KiB
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "measured.json").write_text(json.dumps(measured) + "\n")


def build_trl(args: argparse.Namespace, **options: Any) -> Any:
    """Build TRL 1.12's trainer as its own example script does; `options` are further fields of its configuration."""
    from transformers import AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(args.run / "2_sft", padding_side="left")

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    prompts, held_out = rows(args, "train"), rows(args, "validation")
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
        rows(args, "train"),
        rows(args, "validation").select(range(8)),
        processing_class=AutoTokenizer.from_pretrained(args.run / "2_sft"),
    )


def train_trl(args: argparse.Namespace) -> None:
    """Train TRL's, and save its policy and tokenizer."""
    trainer = build_trl(args)
    measure(args, trainer.train)
    trainer.policy_model.save_pretrained(args.output)
    trainer.processing_class.save_pretrained(args.output)


def train_ours(args: argparse.Namespace) -> None:
    """Train and save ours."""
    trainer = build_ours(args)
    measure(args, trainer.train)
    trainer.save_model()


def judge(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Let the annotators and the reward model judge a policy's answers to held-out prompts, several for each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.evaluation.reward_model import score
    from pipeline.models.generation import encode_prompts, generate
    from pipeline.rewards.annotators import taste

    prompts = list(rows(args, "validation")) + list(rows(args, "test"))
    tokenizer = AutoTokenizer.from_pretrained(args.run / "2_sft")
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reward_model = load(args, "AutoModelForSequenceClassification", "3_reward").eval()
    answers = generate(
        policy,
        tokenizer,
        encode_prompts(tokenizer, [row["prompt"] for row in prompts]),
        max_new_tokens=args.max_completion_length,
        samples=ANSWERS,
        temperature=1.0,
        seed=args.seed,
    )
    conversations = [
        [*row["prompt"], {"role": "assistant", "content": answer.text}]
        for row, several in zip(prompts, answers, strict=True)
        for answer in several
    ]
    with torch.inference_mode():
        scores = score(reward_model, tokenizer, conversations)
    tastes = [
        statistics.fmean(taste(answer.text, row) for answer in several)
        for several, row in zip(answers, prompts, strict=True)
    ]
    lengths = [len(answer.tokens) for several in answers for answer in several]
    return {
        "score": statistics.fmean(scores),
        "length": statistics.fmean(lengths),
        "answers": len(lengths),
        "tastes": tastes,
    }


if __name__ == "__main__":
    main()
