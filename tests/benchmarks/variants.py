"""Compare variants of GRPO, with one update a rollout and with four: `recipes/pocket-grpo`, `docs/grpo.md`.

    fourstage run pocket --seeds 0 3 4 5 --until 3_ppo
    python -m tests.benchmarks.variants rates runs/pocket/seed0
    python -m tests.benchmarks.variants compare runs/pocket/seed3 runs/pocket/seed4 runs/pocket/seed5
    python -m tests.benchmarks.variants table runs/pocket

Up to `3_ppo`, `recipes/pocket` is the same as `recipes/pocket-grpo`, whose files for stage 4 are trained here.

`rates` trains each variant with three learning rates on one seed, and measures them on its validation problems.
`compare` trains each with the best of them on other seeds, and measures them on their test problems, next to the model
that all start from, also prompted with "Working:". `table` prints both as Markdown.

Each result is a line of `variants.jsonl`, in the folder of the seeds, and is not made again: a killed benchmark resumes
where it was.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.config.yaml_file import read_yaml
from pipeline.evaluation.intervals import Estimate, mean_difference, over_seeds
from pipeline.files import read_json, relocate

RECIPE = Path("recipes/pocket-grpo")
START = "3_ppo"
WORKING = "3_ppo, prompted with Working:"
"""Name of the baseline whose answers begin with the word by which worked solutions begin."""
NAMES = {
    "4_grpo_dapo_four": "DAPO, BNPO",
    "4_grpo_grpo_four": "GRPO",
    "4_grpo_dr_grpo_four": "Dr. GRPO",
    "4_grpo_gspo_four": "GSPO",
    "4_grpo_cispo_four": "CISPO",
    "4_grpo_sapo_four": "SAPO",
    "4_grpo_dapo": "DAPO, BNPO, CISPO",
    "4_grpo_grpo": "GRPO, GSPO, SAPO",
    "4_grpo_dr_grpo": "Dr. GRPO, RLOO",
    "4_grpo_gdpo": "GDPO, two rewards",
    "4_grpo_sum": "DAPO, two rewards",
}
"""Recipe -> the variants that it trains, in the order in which they run."""
RATES = {1: (1e-4, 2e-4, 4e-4), 4: (5e-5, 1e-4, 2e-4)}
"""Updates for each rollout -> learning rates that are tried."""
SAMPLES = 4
"""Answers sampled for each problem."""

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("rates", "compare", "table"))
    parser.add_argument("runs", type=Path, nargs="+", help="directories of seeds; for `table`, the one of all seeds")
    parser.add_argument("--recipes", nargs="+", default=list(NAMES), help="which recipes (default: all)")
    args = parser.parse_args()
    if args.part == "rates":
        for recipe in args.recipes:
            for rate in RATES[updates_of(recipe)]:
                make_line(args.runs[0], recipe, rate, "validation")
    elif args.part == "compare":
        for run in args.runs:
            measure_baselines(run)
        for recipe in args.recipes:
            rate = best_rate(read_lines(args.runs[0].parent), recipe)
            for run in args.runs:
                make_line(run, recipe, rate, "test")
    else:
        print_table(read_lines(args.runs[0]))


def updates_of(recipe: str) -> int:
    """Return how many updates a recipe makes for each rollout."""
    return int(read_yaml(str(RECIPE / f"{recipe}.yaml")).get("num_iterations", 1))


def read_lines(folder: Path) -> list[Line]:
    """Return the results of all seeds so far."""
    file = folder / "variants.jsonl"
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]


def append_line(folder: Path, line: Line) -> None:
    """Keep a result, and print it without the outcomes of single problems."""
    with (folder / "variants.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print({key: value for key, value in line.items() if key != "outcomes"}, flush=True)


def best_rate(lines: Sequence[Line], recipe: str) -> float:
    """Return the learning rate with which most sampled answers to validation problems are right."""
    trials = [line for line in lines if line["recipe"] == recipe and line["split"] == "validation"]
    if len(trials) < len(RATES[updates_of(recipe)]):
        raise SystemExit(f"{recipe}: not all learning rates have been tried; run `rates` first")
    best = max(trials, key=lambda line: line["metrics"]["pass@1_sampled"]["value"])
    return float(best["learning_rate"])


def make_line(run: Path, recipe: str, rate: float, split: str) -> None:
    """Train a recipe on a run with a learning rate, and measure it on a split, unless that has been done."""
    key = {"seed": run.name, "recipe": recipe, "learning_rate": rate, "split": split}
    if any(key.items() <= line.items() for line in read_lines(run.parent)):
        return
    folder, costs = train(run, recipe, rate)
    append_line(run.parent, {**key, **costs, **measure(run, folder, split)})


def train(run: Path, recipe: str, rate: float) -> tuple[Path, Line]:
    """Train a recipe into RUN/variants. Return the folder, what the training took, and what it logged."""
    output = run / "variants" / f"{recipe}-{rate:g}"
    # What a killed benchmark has left.
    shutil.rmtree(output, ignore_errors=True)
    file = RECIPE / f"{recipe}.yaml"
    values = read_yaml(str(file))
    # Paths of the recipe's run become paths of this one.
    relocated = relocate(values, Path(str(values["output_dir"])).parent, run)
    settings = {name: value for name, value in relocated.items() if value != values[name]}
    seed = run.name.removeprefix("seed")
    settings |= {"output_dir": output, "seed": seed, "learning_rate": rate, "save_strategy": "no"}
    options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "recipes.grpo", "--config", str(file), *options]
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{process.stdout[-2000:]}{process.stderr[-2000:]}")
    later = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Unlike the seconds, these do not depend on what else the machine does.
    processor_seconds = later.ru_utime + later.ru_stime - earlier.ru_utime - earlier.ru_stime
    history = read_json(output / "trainer_state.json")["log_history"]
    logs = [entry for entry in history if "reward" in entry]
    clipped = [entry.get("clip_ratio/region_mean", entry.get("cispo_clip_ratio")) for entry in logs]
    costs: Line = {
        "seconds": round(history[-1]["train_runtime"], 1),
        "processor_seconds": round(processor_seconds, 1),
        "clipped": round(fmean(clipped), 5) if None not in clipped else None,
        "rewards": [round(entry["rewards/exact_answer/mean"], 4) for entry in logs],
        "entropy": round(logs[-1]["entropy"], 4),
    }
    return output, costs


def measure(run: Path, folder: Path, split: str, beginning: str = "") -> Line:
    """Return `metrics` of a model's answers, which may all begin with a text, and `outcomes` of the problems."""
    from datasets import load_dataset

    from pipeline import hardware
    from pipeline.evaluation import metrics
    from pipeline.evaluation.results import StageResult
    from pipeline.models.loading import load_model
    from pipeline.rewards.graders import grade_rows
    from pipeline.tools.chat_model import ChatModel

    data = load_dataset("parquet", data_files=str(run / f"data/reasoning/{split}.parquet"), split="train")
    rows = [{"id": number, **row} for number, row in enumerate(data)]
    model, tokenizer = load_model(str(folder), "run")
    chat = ChatModel(model.to(hardware.fast_dtype()).eval(), tokenizer, max_new_tokens=64)
    tokens = tokenizer(beginning, add_special_tokens=False)["input_ids"]
    result = StageResult(folder.name)
    greedy = [completion.text for completion in metrics.single_answers(chat.answer(rows, tokens))]
    metrics.record_greedy(result, "pass@1", greedy, rows, grade_rows)
    completions = chat.answer(rows, tokens, samples=SAMPLES, temperature=1.0, seed=0)
    sampled = [[completion.text for completion in of_problem] for of_problem in completions]
    result.record("pass@1_sampled", metrics.pass_at_k(sampled, rows, 1, grade_rows), rows)
    words = fmean(len(text.split()) for of_problem in sampled for text in of_problem)
    outcomes = {
        name: [round(example["value"], 4) for example in result.examples if example["metric"] == name]
        for name in result.metrics
    }
    estimates = {name: estimate.to_json() for name, estimate in result.metrics.items()}
    return {"metrics": estimates, "words": round(words, 2), "outcomes": outcomes}


def measure_baselines(run: Path) -> None:
    """Measure the model that all variants start from, as it is and prompted with "Working:"."""
    for name, beginning in ((START, ""), (WORKING, "Working:")):
        key = {"seed": run.name, "recipe": name, "split": "test"}
        if not any(key.items() <= line.items() for line in read_lines(run.parent)):
            append_line(run.parent, {**key, **measure(run, run / START, "test", beginning)})


def print_table(lines: Sequence[Line]) -> None:
    """Print the learning rates that were tried, and the variants over the seeds."""
    print(
        "| updates | variant | learning rate: sampled / greedy pass@1 on the validation problems |\n| --- | --- | --- |"
    )
    for recipe, name in NAMES.items():
        cells = []
        for line in lines:
            if line["recipe"] == recipe and line["split"] == "validation":
                greedy, sampled = (line["metrics"][metric]["value"] for metric in ("pass@1", "pass@1_sampled"))
                cells.append(f"{line['learning_rate']:g}: {sampled:.3f} / {greedy:.3f}")
        print(f"| {updates_of(recipe)} | {name} | {', '.join(cells)} |")

    by_recipe: dict[str, dict[str, Line]] = {}
    for line in lines:
        if line["split"] == "test":
            by_recipe.setdefault(line["recipe"], {})[line["seed"]] = line
    columns = ("pass@1, sampled", "minus DAPO, paired", "pass@1, greedy", "words", "clipped", "processor seconds")
    print(f"\n| updates | variant | learning rate | seeds | {' | '.join(columns)} |")
    print("| --- | --- | --- | --- |" + " --- |" * len(columns))
    for recipe in (START, WORKING, *NAMES):
        seeds = by_recipe.get(recipe)
        if seeds:
            print(f"| {' | '.join(table_row(recipe, seeds, by_recipe))} |")


def table_row(recipe: str, seeds: Mapping[str, Line], by_recipe: Mapping[str, Mapping[str, Line]]) -> list[str]:
    """Return the cells of a recipe; `by_recipe` has the lines of all, by seed."""
    lines = list(seeds.values())
    sampled = over_seeds([Estimate.from_json(line["metrics"]["pass@1_sampled"]) for line in lines], 0, 1)
    greedy = over_seeds([Estimate.from_json(line["metrics"]["pass@1"]) for line in lines], 0, 1)
    words = f"{fmean(line['words'] for line in lines):.1f}"
    if recipe not in NAMES:
        return ["", recipe, "", str(len(lines)), show(sampled), "", show(greedy), words, "", ""]
    updates = updates_of(recipe)
    reference = "4_grpo_dapo_four" if updates > 1 else "4_grpo_dapo"
    differences = []
    for seed, line in seeds.items():
        if recipe != reference and seed in by_recipe.get(reference, {}):
            ours, theirs = (each["outcomes"]["pass@1_sampled"] for each in (line, by_recipe[reference][seed]))
            gains = [our - their for our, their in zip(ours, theirs, strict=True)]
            differences.append(mean_difference(gains, [1.0] * len(gains), is_share=True))
    difference = show(over_seeds(differences, -1, 1), sign=True) if differences else ""
    shares = [line["clipped"] for line in lines if line["clipped"] is not None]
    clipped = f"{fmean(shares):.3f}" if shares else ""
    seconds = f"{fmean(line['processor_seconds'] for line in lines):.0f}"
    rate = f"{lines[0]['learning_rate']:g}"
    return [
        *(str(updates), NAMES[recipe], rate, str(len(lines))),
        *(show(sampled), difference, show(greedy), words, clipped, seconds),
    ]


def show(estimate: Estimate, sign: bool = False) -> str:
    """Format an estimate with its interval."""
    plus = "+" if sign else ""
    return f"{estimate.value:{plus}.3f} ({estimate.low:{plus}.3f} to {estimate.high:{plus}.3f})"


if __name__ == "__main__":
    main()
