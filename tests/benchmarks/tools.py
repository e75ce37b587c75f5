"""Attack `recipes/pocket-tools`: what would give the same figures without having learned when to call, or what to ask?

    fourstage run recipes/pocket-tools --seeds 0 1 2
    python -m tests.benchmarks.tools runs/pocket-tools

All answers are greedy, to the test split. Sums, half of them of one digit: the share of right answers of each policy,
and its score, by which each call costs 0.1. `4_sft_direct` is the control, which was trained on direct answers to such
sums for as long and has no tool; the recipe's README has its command. `always` begins the answers of a model with the
call, and `never` with "The answer is"; `lying` is a calculator that adds 1. Games: the best player who ignores what is
answered names the same place of every range, which is found on the test games themselves; the scripted player halves
the range.

Differences are paired, with 95% intervals by the bootstrap over problems; over the seeds, by Student's.
"""

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.evaluation.intervals import mean, over_seeds
from pipeline.models.generation import Completion
from pipeline.rewards.functions import call_cost, exact_answer
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.environments import GuessLetter
from pipeline.tools.functions import calculator
from pipeline.tools.loading import Toolbox
from recipes.worlds.pocket.tools import LETTERS, QUESTIONS

LENGTH = 112
Row = dict[str, Any]


def lying(expression: str) -> str:
    """Compute an expression, wrongly.

    Args:
        expression: The expression.
    """
    return str(int(calculator(expression)) + 1)


lying.__name__ = "calculator"
OURS = Toolbox([calculator], GuessLetter)
LYING = Toolbox([lying], GuessLetter)


def load(folder: Path, toolbox: Toolbox | None = OURS, begun: str = "") -> Callable[[Sequence[Row]], list[Completion]]:
    """Return a function that answers rows with a model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = ChatModel(model, tokenizer, LENGTH, toolbox=toolbox)
    start = tokenizer(begun, add_special_tokens=False)["input_ids"]
    return lambda rows: [completion for (completion,) in chat.answer(rows, start)]


def measure(completions: Sequence[Completion], rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Return whether each answer is right, and its score."""
    right = [
        float(value or 0) for value in exact_answer([one.text for one in completions], [r["answer"] for r in rows])
    ]
    costs = call_cost([one.messages for one in completions], call_cost=[row["call_cost"] for row in rows])
    return right, [value + float(cost or 0) for value, cost in zip(right, costs, strict=True)]


def letters(row: Row) -> list[str]:
    """Return the letters of which a game hides one."""
    low, high = re.findall(r"from (.) to (.) ", row["prompt"][0]["content"])[0]
    return list(LETTERS[LETTERS.index(low) : LETTERS.index(high) + 1])


def scripted(row: Row) -> float:
    """Return whether the player who halves the range wins."""
    left, game = letters(row), GuessLetter()
    game.reset(**row)
    for _ in range(QUESTIONS):
        middle = (len(left) - 1) // 2
        said = game.ask(left[middle])
        if said == "yes":
            return 1.0
        left = left[middle + 1 :] if said == "later" else left[:middle]
    return float(left == [row["hidden"]])


def attack(run: Path) -> dict[str, list[float]]:
    """Print the figures of a run. Return, for each paired difference, the values of all problems."""
    rows = pq.read_table(run / "data" / "reasoning" / "test.parquet").to_pylist()
    longer = pq.read_table(run / "data" / "reasoning" / "test_longer.parquet").to_pylist()
    sums, games = ([row for row in rows if (row["kind"] == "game") == is_game] for is_game in (False, True))
    long = [number for number, row in enumerate(sums) if row["kind"] == "long"]
    short = [number for number, row in enumerate(sums) if row["kind"] != "long"]
    policies = {
        "4_grpo": load(run / "4_grpo"),
        "2_sft": load(run / "2_sft"),
        "4_grpo, always": load(run / "4_grpo", begun="<|call|>calculator"),
        "2_sft, always": load(run / "2_sft", begun="<|call|>calculator"),
        "4_grpo, never": load(run / "4_grpo", None, "The answer is"),
        "2_sft, never": load(run / "2_sft", None, "The answer is"),
        "4_sft_direct": load(run / "4_sft_direct", None),
        "4_grpo, lying": load(run / "4_grpo", LYING),
    }
    print(f"\n{run}\n{'':16}{'long':>8}{'one digit':>11}{'score':>8}{'calls':>8}{'7 digits':>10}{'games':>8}")
    right, score, won = {}, {}, {}
    for name, answer in policies.items():
        answered = answer(sums)
        right[name], score[name] = measure(answered, sums)
        calls = sum(len(message.get("tool_calls") or ()) for one in answered for message in one.messages) / len(sums)
        beyond = mean(measure(answer(longer), longer)[0]).value
        won[name] = measure(answer(games), games)[0]
        shares = [mean([right[name][i] for i in some]).value for some in (long, short)]
        print(
            f"{name:16}{shares[0]:8.3f}{shares[1]:11.3f}{mean(score[name]).value:8.3f}{calls:8.2f}{beyond:10.3f}"
            f"{mean(won[name]).value:8.3f}"
        )
    places = [letters(row).index(row["hidden"]) for row in games]
    best = max(places, key=places.count)
    blind, chance = [float(place == best) for place in places], [1 / len(letters(row)) for row in games]
    print(f"games: best blind player {mean(blind).value:.3f}, chance {mean(chance).value:.3f}, ", end="")
    print(f"scripted player {mean([scripted(row) for row in games]).value:.3f}")

    def minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
        return [a - b for a, b in zip(first, second, strict=True)]

    differences = {
        "long sums: 4_grpo - 4_sft_direct": [right["4_grpo"][i] - right["4_sft_direct"][i] for i in long],
        "long sums: 4_grpo - 4_grpo, lying": [right["4_grpo"][i] - right["4_grpo, lying"][i] for i in long],
        **{
            f"score: 4_grpo - {name}": minus(score["4_grpo"], score[name])
            for name in ("2_sft", "2_sft, always", "2_sft, never", "4_grpo, always", "4_grpo, never")
        },
        "games: 4_grpo - 2_sft": minus(won["4_grpo"], won["2_sft"]),
        "games: 4_grpo - best blind player": minus(won["4_grpo"], blind),
        "games: 4_grpo - chance": minus(won["4_grpo"], chance),
    }
    for name, values in differences.items():
        print(f"  {name:40} {shown(mean(values))}")
    return differences


def shown(estimate: Any) -> str:
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a run, or of the runs of several seeds")
    args = parser.parse_args()
    runs = sorted(args.run.glob("seed*")) or [args.run]
    found = [attack(run) for run in runs]
    if len(found) > 1:
        print(f"\nMeans over {len(found)} seeds")
        for name in found[0]:
            print(f"  {name:40} {shown(over_seeds([mean(one[name]) for one in found]))}")


if __name__ == "__main__":
    main()
