"""
# TRL's `GRPOTrainer` against `pipeline.rl.grpo.GRPOTrainer`

```bash
python -m tests.benchmarks.grpo_vs_trl --run runs/pocket
```

Both train the run's `3_ppo` on the problems of its data, as `recipes/pocket/4_grpo.yaml` does, for the same number of
steps, one after the other on the same machine, under each of five seeds, in float32 and, if the machine computes in
it, in bf16. Then each policy answers the held-out problems, eight times each: `right` is the share of right answers,
`over_trl` the difference to the fastest of TRL's on the same problems, and `speedup` the ratio of completions a second.

Prints the means over the seeds with half of their 95% intervals (Student's, and never narrower than over the problems),
and writes OUTPUT/results.json.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from tests.benchmarks.side_by_side import Contest, answers, compare, load, measure, parse, rows

START = "3_ppo"


def main() -> None:
    args = parse(
        __doc__,
        "grpo_vs_trl",
        steps=(20, "optimizer steps, each on a rollout of its own"),
        batch_size=(128, "completions in a rollout"),
        generations=(8, "completions for each prompt"),
        learning_rate=(2e-4, "learning rate, after three steps of warm-up"),
    )
    if args.train:
        train(args)
        return
    from pipeline import hardware

    precisions = {"float32": False} | ({"bf16": True} if hardware.precision().value == "bf16" else {})
    trainers = {"TRL": "trl", "ours": "ours"}
    contestants = {
        f"{who} {name}": (trainer, bf16) for name, bf16 in precisions.items() for who, trainer in trainers.items()
    }
    compare(
        args, Contest("tests.benchmarks.grpo_vs_trl", START, "completions_per_second", "right", judge, contestants, {})
    )


def train(args: argparse.Namespace) -> None:
    """Train and save one of them."""
    import trl
    from transformers import AutoTokenizer

    from pipeline import hardware
    from pipeline.rewards.functions import exact_answer
    from pipeline.rl import grpo

    trainer = (trl if args.train == "trl" else grpo).GRPOTrainer(
        model=load(args, "AutoModelForCausalLM", START),
        reward_funcs=[exact_answer],
        args=trl.GRPOConfig(
            output_dir=str(args.output),
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            per_device_train_batch_size=args.batch_size,
            num_generations=args.generations,
            max_completion_length=args.max_completion_length,
            max_steps=args.steps,
            beta=0.0,
            seed=args.seed,
            bf16=args.bf16,
            use_cpu=hardware.accelerator() is None,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            save_strategy="no",
            logging_steps=8,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows(args, "reasoning", "train"),
        processing_class=AutoTokenizer.from_pretrained(args.run / START),
    )
    measure(args, args.steps * args.batch_size, trainer.train)
    trainer.save_model()


def judge(args: argparse.Namespace, folder: Path) -> tuple[list[float], dict[str, float]]:
    """Return the share of right answers to each held-out problem, and the mean length of all answers."""
    from pipeline.rewards.functions import exact_answer

    problems: list[dict[str, Any]] = [row for split in ("validation", "test") for row in rows(args, "reasoning", split)]
    given = answers(args, folder, problems)
    right = [
        statistics.fmean(
            reward or 0.0
            for reward in exact_answer(
                [[{"role": "assistant", "content": answer.text}] for answer in several],
                answer=[problem["answer"]] * len(several),
            )
        )
        for problem, several in zip(problems, given, strict=True)
    ]
    return right, {"length": statistics.fmean(len(answer.tokens) for several in given for answer in several)}


if __name__ == "__main__":
    main()
