"""Compare PPO, DPO, best of n and instruction tuning on preferred answers: `recipes/pocket-preferences`.

    fourstage run recipes/pocket-preferences --seeds 0 --until 3_reward
    python -m tests.benchmarks.preferences trials runs/pocket-preferences/seed0
    fourstage run recipes/pocket-preferences --seeds 1 2 3 4 5
    python -m tests.benchmarks.preferences table runs/pocket-preferences
    python -m tests.benchmarks.preferences curves runs/pocket-preferences/seed0

`trials` trains each method with eight settings on one seed, and measures them on the validation prompts: the best goes
into the recipe. `table` compares the methods over the other seeds, on their test prompts, and draws `frontier.svg`.
`curves` trains PPO and DPO with too weak a KL penalty, and measures checkpoints on the way: the score of the reward
model against the annotators' taste, in `overoptimisation.svg`. The pictures lie in `docs`, and need matplotlib.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config.yaml_file import read_yaml
from pipeline.evaluation.intervals import Estimate, over_seeds
from pipeline.files import relocate
from pipeline.report.differences import paired_difference
from pipeline.report.load import Run, load_runs

RECIPE, PICTURES = Path("recipes/pocket-preferences"), Path("docs")
OPPONENT, REWARD = "2_sft", "3_reward"
METHODS = {
    "3_ppo": "PPO",
    "3_dpo": "DPO",
    "best_of_4": "best of 4",
    "best_of_16": "best of 16",
    "3_sft_preferred": "SFT on preferred answers",
    "3_sft_chance": "SFT on answers by chance",
}
COST = {"3_ppo": ("3_reward", "3_ppo"), "best_of_4": ("3_reward",), "best_of_16": ("3_reward",)}
"""Steps whose seconds a method takes, unless it takes only its own. All need the pairs, which are not counted."""

TRIALS: dict[str, list[dict[str, float]]] = {
    "3_ppo": [
        {"learning_rate": rate, "kl_coef": coefficient}
        for rate, coefficients in {7.5e-5: (0.1, 0.25), 1.5e-4: (0.1, 0.25, 0.5), 3e-4: (0.1, 0.25, 0.5)}.items()
        for coefficient in coefficients
    ],
    "3_dpo": [
        {"learning_rate": rate, "beta": beta, "max_steps": 255}
        for rate, betas in {1e-4: (0.03, 0.1, 0.3), 2e-4: (0.03, 0.1, 0.3, 1.0), 4e-4: (0.1,)}.items()
        for beta in betas
    ],
    "3_sft_preferred": [
        {"learning_rate": rate, "max_steps": steps} for rate in (2.5e-4, 5e-4, 1e-3, 2e-3) for steps in (100, 300)
    ],
}
WEAK: dict[str, tuple[str, dict[str, Any]]] = {
    "PPO": ("3_ppo", {"kl_coef": 0.005, "max_steps": 240, "save_steps": 24}),
    "PPO, reward model of 300 pairs": ("3_ppo", {"kl_coef": 0.005, "max_steps": 240, "save_steps": 24}),
    "DPO": ("3_dpo", {"beta": 0.005, "learning_rate": 4e-4, "max_steps": 340, "save_steps": 34}),
}
"""Settings of `curves`: hardly any KL penalty, for twice as long, and ten checkpoints."""

FEW = {"max_train_samples": 300, "num_train_epochs": 8}
"""Settings of the reward model that has seen few pairs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("trials", "table", "curves"))
    parser.add_argument("run", type=Path, help="directory of a seed; for `table`, of all seeds")
    parser.add_argument("--methods", nargs="+", default=list(TRIALS), help="which to try (default: all)")
    parser.add_argument("--tuned_on", type=int, default=0, help="seed that is not part of the table (default: 0)")
    args = parser.parse_args()
    if args.part == "trials":
        try_settings(args.run, args.methods)
    elif args.part == "table":
        compare(args.run, args.tuned_on)
    else:
        overoptimise(args.run)


def train(run: Path, step: str, name: str, settings: Mapping[str, Any]) -> tuple[Path, float]:
    """Train one method into RUN/trials/NAME. Returns the folder, and the seconds with the start of the process."""
    output = run / "trials" / name
    recipe = RECIPE / f"{step}.yaml"
    values = read_yaml(str(recipe))
    # Paths of the recipe's run become those of this one.
    moved = relocate(values, Path(str(values["output_dir"])).parent, run)
    given = {key: value for key, value in moved.items() if value != values[key]}
    given |= {**settings, "output_dir": output, "seed": run.name.removeprefix("seed"), "eval_strategy": "no"}
    options = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", f"recipes.{step.split('_')[1]}", "--config", str(recipe), *options]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return output, time.perf_counter() - began


def try_settings(run: Path, methods: Sequence[str]) -> None:
    """Print how each setting does on the validation prompts, and keep it in RUN/trials.jsonl."""
    for method in methods:
        for number, settings in enumerate(TRIALS[method]):
            name = f"{method}-{number}"
            folder, seconds = train(run, method, name, settings)
            found = {"method": method, **settings, "seconds": round(seconds, 1), **measure(run, folder, "validation")}
            print(json.dumps(found), flush=True)
            with (run / "trials.jsonl").open("a") as file:
                file.write(json.dumps(found) + "\n")


@cache
def load(path: Path) -> Any:
    """Load a model and its tokenizer to answer prompts with, as evaluations do."""
    from pipeline import hardware
    from pipeline.models.loading import load_model
    from pipeline.tools.chat_model import ChatModel

    model, tokenizer = load_model(str(path), "run")
    return ChatModel(model.to(hardware.fast_dtype()).eval(), tokenizer, max_new_tokens=64)


@cache
def prompts(run: Path, split: str) -> list[dict[str, Any]]:
    """Return the prompts of a split, with the columns by which annotators judge."""
    from datasets import load_dataset

    rows = load_dataset("parquet", data_files=str(run / f"data/preferences/{split}.parquet"), split="train")
    return [{"id": number, **row} for number, row in enumerate(rows)]


@cache
def judge_by_score(path: Path) -> Any:
    """Load a reward model."""
    from pipeline.models.loading import load_model

    model, tokenizer = load_model(str(path), "run", reward=True)
    return model.eval(), tokenizer


@cache
def opponents(run: Path, split: str) -> dict[str, list[list[str]]]:
    """Return the answers of the model that all start from."""
    from pipeline.evaluation.win_rate import answer_both

    chat = load(run / OPPONENT)
    matches = answer_both(chat, chat, prompts(run, split))
    return {name: theirs for name, (_, theirs) in matches.items()}


def measure(run: Path, folder: Path, split: str, judge: Path | None = None) -> dict[str, float]:
    """Return the win rates of a model, its KL divergence and entropy, and the mean score of a reward model."""
    from pipeline.evaluation.results import StageResult
    from pipeline.evaluation.win_rate import answer_both, measure_distance, measure_matches
    from pipeline.preferences.judges import ANNOTATORS, score

    rows, chat, result = prompts(run, split), load(folder), StageResult(folder.name)
    matches = answer_both(chat, opponents(run, split), rows)
    measure_matches(result, matches, rows, ANNOTATORS)
    measure_distance(result, chat, load(run / OPPONENT), rows)
    asked = [(row["prompt"], answers[0]) for row, answers in zip(rows, matches["win_rate"][0], strict=True)]
    scores = score(
        *judge_by_score(judge or run / REWARD),
        [[*prompt, {"role": "assistant", "content": text}] for prompt, text in asked],
    )
    names = ("win_rate", "win_rate_greedy", "last_sentence_share", "kl", "entropy")
    words = fmean(len(text.split()) for _, text in asked)
    found = {name: result.metrics[name].value for name in names} | {"score": fmean(scores), "words": words}
    return {name: round(value, 4) for name, value in found.items()}


def compare(folder: Path, tuned_on: int) -> None:
    """Print the table of the methods over the seeds, and draw their win rates over the square root of the KL."""
    seeds = sorted(path for path in folder.glob("seed*") if path.name != f"seed{tuned_on}")
    print(f"{len(seeds)} seeds: {', '.join(path.name for path in seeds)}\n")
    runs = load_runs(seeds)
    figures = {name: [figures_of(run, name) for run in runs] for name in METHODS}
    columns = list(figures["3_ppo"][0])
    print(f"| | {' | '.join(columns)} |")
    print("| --- |" + " --- |" * len(columns))
    for name, rows in figures.items():
        print(f"| {METHODS[name]} | {' | '.join(show([row[column] for row in rows], column) for column in columns)} |")
    constant = [run.baselines["constant"].metrics["win_rate"] for run in runs]
    print(f"\nbest fixed text after each answer of {OPPONENT}: {show(constant, 'win rate')}")
    draw_frontier(figures)


def figures_of(run: Run, method: str) -> dict[str, Estimate | None]:
    """Return the row of the table of one method in one run; None where a figure does not apply."""
    number = int(method.rpartition("_")[2]) if method.startswith("best_of") else 0
    result = run.baselines[method] if number else run.stages[method]
    ppo, steps = run.stages["3_ppo"], COST.get(method, (method,))
    report = json.loads((run.path / "report/metrics.json").read_text())

    def minus_ppo(metric: str) -> Estimate | None:
        if method == "3_ppo" or metric not in result.metrics:
            return None
        return paired_difference(ppo.outcomes(metric), result.outcomes(metric), metric)

    kl = result.metrics.get("kl")
    if number:
        # Best of n is at most this far from its model, whatever the scores (Gao et al. 2022).
        kl = Estimate(math.log(number) - (number - 1) / number)
    budget = sum(report["seconds"][step] for step in COST["3_ppo"])
    seconds = sum(report["seconds"][step] for step in steps)
    return {
        "win rate": result.metrics.get("win_rate"),
        "minus PPO": minus_ppo("win_rate"),
        "greedy": result.metrics.get("win_rate_greedy"),
        "greedy, minus PPO": minus_ppo("win_rate_greedy"),
        "instruction accuracy": result.metrics.get("instruction_accuracy"),
        "KL": kl,
        "entropy": result.metrics.get("entropy"),
        "words": Estimate(_words(run.path, method)),
        "seconds": Estimate(seconds),
        "of PPO's": Estimate(seconds / budget),
        "GB": Estimate(max(report["peak_memory"].get(step, 0) for step in steps) / 1e9),
        "answers sampled for one": Estimate(float(number or 1)),
    }


def _words(path: Path, method: str) -> float:
    """Return the mean length of the sampled answers to the prompts."""
    stage, metric = (REWARD, f"{method}/win_rate") if method.startswith("best_of") else (method, "win_rate")
    lines = (path / f"evaluations/{stage}.jsonl").read_text().split("\n")
    examples = [json.loads(line) for line in lines if line]
    return fmean(len(one["answer"].split()) for one in examples if one["metric"] == metric)


SHARES = {
    "win rate": (0.0, 1.0),
    "greedy": (0.0, 1.0),
    "instruction accuracy": (0.0, 1.0),
    "minus PPO": (-1.0, 1.0),
    "greedy, minus PPO": (-1.0, 1.0),
}
"""Least and greatest value of the columns that have bounds."""


def show(values: Sequence[Estimate | None], column: str) -> str:
    """Return the mean over the seeds with its interval, or without it where it says little."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = 1 if column in ("words", "seconds") else 0 if column.startswith("answers") else 2 if column == "GB" else 3
    mean = over_seeds(known, *SHARES.get(column, ()))
    if column in ("words", "seconds", "of PPO's", "GB", "answers sampled for one") or len(known) < 2:
        return f"{mean.value:.{digits}f}"
    return f"{mean.value:.{digits}f} ({mean.low:.{digits}f} to {mean.high:.{digits}f})"


def draw_frontier(figures: Mapping[str, Sequence[Mapping[str, Estimate | None]]]) -> None:
    """Draw the win rate of each method, seed by seed, over the square root of its KL divergence."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, rows in figures.items():
        kl, won = ([row[column].value if row[column] else 0.0 for row in rows] for column in ("KL", "win rate"))
        roots = [max(value, 0.0) ** 0.5 for value in kl]
        (dots,) = axes.plot(roots, won, "o", alpha=0.35)
        # PPO may lie where best of n does.
        size = 10 if name == "3_ppo" else 6
        axes.plot(fmean(roots), fmean(won), "D", color=dots.get_color(), label=METHODS[name], markersize=size)
    axes.set_xlim(left=0)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"square root of the KL divergence from {OPPONENT}, nats per answer")
    axes.set_ylabel(f"win rate against {OPPONENT}, sampled")
    axes.set_title("Pale: one seed. Diamond: mean. KL of best of n: its upper bound.", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    _save(figure, "frontier.svg")


def _save(figure: Any, name: str) -> None:
    figure.tight_layout()
    figure.savefig(PICTURES / name, metadata={"Date": None})
    print(f"\n{PICTURES / name}")


def overoptimise(run: Path) -> None:
    """Measure checkpoints of runs that hardly anything holds back, and draw proxy against taste.

    The points are kept in RUN/curves.jsonl; a run whose points are there is not trained again.
    """
    file = run / "curves.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for title, (method, settings) in WEAK.items():
        if any(point["title"] == title for point in known):
            continue
        judge = run / REWARD
        if "pairs" in title:
            judge, _ = train(run, REWARD, "few-3_reward", FEW)
        given = {**settings, "save_total_limit": 100, **({"reward_model_path": judge} if method == "3_ppo" else {})}
        folder, _ = train(run, method, f"weak-{title.split(',')[0]}-{judge.name}", given)
        saved = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        for step, path in [(0, run / OPPONENT), *((int(path.name.partition("-")[2]), path) for path in saved)]:
            known.append({"title": title, "step": step, **measure(run, path, "test", judge)})
            print(json.dumps(known[-1]), flush=True)
            with file.open("a") as kept:
                kept.write(json.dumps(known[-1]) + "\n")
    draw_curves(known)


def draw_curves(points: Sequence[Mapping[str, Any]]) -> None:
    """Draw the win rate by taste and the score of the reward model along training."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(WEAK), figsize=(12, 4), sharey=True)
    for title, axes in zip(WEAK, panels, strict=True):
        own = [point for point in points if point["title"] == title]
        steps = [point["step"] for point in own]
        axes.plot(steps, [point["win_rate"] for point in own], "o-", label="taste: win rate, on the left")
        proxy = axes.twinx()
        gained = [point["score"] - own[0]["score"] for point in own]
        proxy.plot(steps, gained, "s--", color="tab:orange", label="proxy: score gained, on the right")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(f"steps; at the end, KL {own[-1]['kl']:.0f} nats per answer", fontsize=9)
        handles = [*axes.get_lines(), *proxy.get_lines()]
    panels[0].legend(handles, [line.get_label() for line in handles], frameon=False, fontsize=8, loc="lower right")
    panels[0].set_ylabel(f"win rate against {OPPONENT}, sampled")
    _save(figure, "overoptimisation.svg")


if __name__ == "__main__":
    main()
