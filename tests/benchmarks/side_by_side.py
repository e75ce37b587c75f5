"""What the benchmarks against TRL's trainers share: each trainer in a process of its own, in turn, under each seed."""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ANSWERS = 8
"""Answers sampled for each prompt when a policy is judged."""


@dataclass(frozen=True)
class Contest:
    """Trainers that start from the same model and do the same work.

    Attributes:
        module: The benchmark's module, which trains one of them if it is called with `--train`.
        start: Folder of the run with the model that all start from.
        speed: The column of the completions a second.
        quality: The column of the judge's values.
        judge: Returns for a policy's folder one value per prompt, and other figures by name.
        contestants: Name -> the trainer, "trl" or "ours", and whether it computes in bf16.
        environments: Trainer -> folder with the libraries that it needs instead of the installed ones.
    """

    module: str
    start: str
    speed: str
    quality: str
    judge: Callable[[argparse.Namespace, Path], tuple[list[float], dict[str, float]]]
    contestants: dict[str, tuple[str, bool]]
    environments: dict[str, Path]


def parse(description: str | None, name: str, **numbers: tuple[float, str]) -> argparse.Namespace:
    """Parse the arguments of a benchmark: those that all have, and `numbers`, each with its default and help."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/pocket"), help="run with the models and the data")
    add("--output", type=Path, default=Path("runs/benchmarks") / name)
    for option, (default, text) in numbers.items():
        add(f"--{option}", type=type(default), default=default, help=text)
    add("--max_completion_length", type=int, default=64)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="each trains all policies once")
    add("--seed", type=int, help=argparse.SUPPRESS)
    add("--train", choices=["trl", "ours"], help=argparse.SUPPRESS)
    add("--bf16", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace, contest: Contest) -> None:
    """Train and judge under each seed, print the means with half of their intervals, and write results.json."""
    from pipeline.report.seeds import spread

    runs = []
    for seed in args.seeds:
        own = argparse.Namespace(**vars(args) | {"seed": seed, "output": args.output / f"seed{seed}"})
        runs.append(_train_and_judge(own, contest))
    results = {
        name: {column: spread([run[name][column] for run in runs]) for column in runs[0][name]} for name in runs[0]
    }
    content = {"arguments": vars(args), "results": results}
    (args.output / "results.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    columns = list(results[list(contest.contestants)[-1]])
    print(f"{'':18}" + "".join(f"{column:>24}" for column in columns))
    for name, row in results.items():
        print(f"{name:18}" + "".join(f"{_format(row[column]) if column in row else '':>24}" for column in columns))


def _format(figures: dict[str, Any]) -> str:
    """Format a mean and half of its interval, if it has one."""
    half = f" ± {(figures['ci95'][1] - figures['ci95'][0]) / 2:.3f}" if figures["ci95"] else ""
    return f"{figures['mean']:.3f}{half}"


def _train_and_judge(args: argparse.Namespace, contest: Contest) -> dict[str, dict[str, Any]]:
    """Train each contestant in a new process, and judge the policies. Return their figures with intervals, by name."""
    from pipeline.evaluation.intervals import Estimate, mean

    figures: dict[str, dict[str, Any]] = {}
    judged: dict[str, list[float]] = {}
    for name, (trainer, bf16) in {contest.start: ("", False), **contest.contestants}.items():
        folder = args.output / name.replace(" ", "_") if trainer else args.run / name
        measured: dict[str, float] = {}
        if trainer:
            command = [sys.executable, "-m", contest.module, *sys.argv[1:], "--train", trainer]
            command += ["--seed", str(args.seed), "--output", str(folder), *(["--bf16"] if bf16 else [])]
            path = [str(contest.environments[trainer])] if trainer in contest.environments else []
            variables = os.environ | {"PYTHONPATH": os.pathsep.join([*path, str(ROOT)])}
            subprocess.run(command, check=True, cwd=ROOT, env=variables)
            measured = json.loads((folder / "measured.json").read_text())
            measured[contest.speed] = measured.pop("per_second")
        judged[name], others = contest.judge(args, folder)
        plain = {column: Estimate(value) for column, value in (others | measured).items()}
        # Answers to the same prompt are similar, so the interval is over prompts.
        figures[name] = {contest.quality: mean(judged[name]), **plain}
    trls = [name for name, (trainer, _) in contest.contestants.items() if trainer == "trl"]
    fastest = max(trls, key=lambda name: figures[name][contest.speed].value)
    for name, own in figures.items():
        differences = [value - other for value, other in zip(judged[name], judged[fastest], strict=True)]
        own["over_trl"] = mean(differences)
        if speed := own.get(contest.speed):
            own["speedup"] = Estimate(speed.value / figures[fastest][contest.speed].value)
    return figures


def measure(args: argparse.Namespace, completions: int, train: Callable[[], Any]) -> None:
    """Train, and write the time and the memory that it took."""
    start = time.perf_counter()
    train()
    seconds = time.perf_counter() - start
    measured = {
        "seconds": seconds,
        "per_second": completions / seconds,
        # Linux counts in KiB.
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "measured.json").write_text(json.dumps(measured) + "\n")


def rows(args: argparse.Namespace, config: str, split: str) -> Any:
    """Load prompts of the run's data."""
    from datasets import Dataset

    return Dataset.from_parquet(str(args.run / "data" / config / f"{split}.parquet"))


def load(args: argparse.Namespace, head: str, name: str) -> Any:
    """Load one of the run's models, with its weights in float32 and with the attention that is fastest here."""
    import torch
    import transformers

    attention = {"attn_implementation": "eager"} if args.bf16 else {}
    return getattr(transformers, head).from_pretrained(args.run / name, dtype=torch.float32, **attention)


def answers(args: argparse.Namespace, folder: Path, prompts: list[dict[str, Any]]) -> list[list[Any]]:
    """Sample a policy's answers, several to each prompt, with the tokenizer beside the contest's start."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.models.generation import encode_prompts, generate

    tokenizer = AutoTokenizer.from_pretrained(args.run / "2_sft")
    return generate(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        tokenizer,
        encode_prompts(tokenizer, [row["prompt"] for row in prompts]),
        max_new_tokens=args.max_completion_length,
        samples=ANSWERS,
        temperature=1.0,
        seed=args.seed,
    )
