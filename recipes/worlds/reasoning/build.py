"""Write problems of reasoning-gym as a Hub data set repository: a card with configs, and one Parquet file per split."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import islice, starmap
from typing import Any, Literal

import pyarrow as pa

from pipeline.data.arguments import SPLITS, option
from pipeline.data.writing import card, write_data_set
from pipeline.errors import Problem, RunStopped, UserError, refuse
from recipes.worlds.pocket.build import DOCUMENT, MESSAGES, STRING, PocketArguments, check_arguments
from recipes.worlds.pocket.documents import recital
from recipes.worlds.pocket.problems import WORKING
from recipes.worlds.reasoning.tasks import POOLS, SEEDS, Entry, Grade, read_tasks, to_row
from recipes.worlds.reasoning.worked import WORKED

logger = logging.getLogger(__name__)
SCHEMAS: dict[str, pa.Schema] = {
    "pretrain": DOCUMENT,
    "sft": pa.schema({"messages": MESSAGES, "kind": STRING}),
    "reasoning": pa.schema({"prompt": MESSAGES, **dict.fromkeys(("answer", "metadata", "kind"), STRING)}),
    "preference": pa.schema({**dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES), "kind": STRING}),
}
USES = {
    "pretrain": "worked problems (misread: {carelessness} of the parts), and recitals of numbers | stage 1",
    "sft": "a problem and its solution, worked (misread: {carelessness} of the parts) or not | stage 2",
    "reasoning": "a problem and its final answer | stage 4",
    "preference": "a problem of `sft`, its solution, and one in which every part is misread | stage 3",
}
PROBES = 50
"""Number of problems of each task that are tried before anything is written."""
Reward = Callable[..., list[float | None]]
Rows = dict[str, dict[str, Iterable[dict[str, Any]]]]
"""By configuration and split."""


@dataclass
class ReasoningArguments(PocketArguments):
    """The data set to generate: pocket or, with `tasks`, problems of reasoning-gym."""

    tasks: dict | None = option(  # noqa: RUF009
        None,
        "Tasks of reasoning-gym, with their settings: fields of the task's configuration, `level` (of its curriculum, "
        "or a list) and `weight`; a list of settings mixes difficulties. Default: the pocket data set. "
        "`size_mb` and `sft_rows` may be 0 to omit their configs, which only have tasks that can be worked out here.",
    )
    test_rows: int = option(300, "Problems in the validation and test split of reasoning, with `tasks`.")
    pair_rows: int = option(0, "Problems for pairs of a right and a misread solution, with `tasks`.")
    misread_signs: Literal["both", "minus"] = option("both", "Last signs of sums that careless solutions misread.")


def build(args: ReasoningArguments, reward: Reward) -> None:
    """Draw all problems and write the repository; an interrupted build leaves `output_dir` as it was.

    Args:
        args: The mix and its sizes.
        reward: What answers will be rewarded by; rows whose own answer it does not pay with 1 are dropped.

    Raises:
        UserError: If `output_dir` contains other files, a size or a setting is wrong, the reward rejects the own
            answers of a task, or a task has too few different problems.
    """
    grades, problems = read_tasks(args.tasks)
    mix = Mix(args, reward)
    optional = (name for name in ("size_mb", "sft_rows", "pair_rows") if getattr(args, name))
    problems += check_arguments(args, "# Reasoning tasks", ("reasoning_rows", "test_rows", *optional))
    # NumPy's generators, which some tasks use, have seeds of 32 bits.
    largest = 2**32 // (len(POOLS) * SEEDS) - 1
    if not 0 <= args.seed <= largest:
        problems.append(Problem("seed", args.seed, f"must be from 0 to {largest}"))
    if not problems:
        problems = _check_verifiers(mix, grades)
    refuse(*problems)

    rows = _draw_rows(mix, grades)
    parts = ((config, split, splits[split]) for config, splits in rows.items() for split in splits)
    write_data_set(args.output_dir, SCHEMAS, parts, _readme(args, rows))
    for task, number in mix.rejected.items():
        logger.warning("%s: %d problems are dropped, because the verifier refuses their answers", task, number)


def _check_verifiers(mix: "Mix", grades: Sequence[Grade]) -> list[Problem]:
    """Report the tasks whose verifier rejects their own answers, or pays for any answer."""
    problems = []
    for grade in grades:
        entries = islice(grade.entries(mix.args.seed, "train"), PROBES)
        number = sum(not mix.accepts(grade.task, entry) for entry in entries)
        if number > 0.05 * PROBES:
            remedy = f"its verifier refuses {number} of {PROBES} of its own answers, or pays wrong ones as well"
            problems.append(Problem("tasks", grade.task, f"{remedy}; omit this task"))
    return problems


def _draw_rows(mix: "Mix", grades: Sequence[Grade]) -> Rows:
    """Return the rows of each split by configuration and split; those of training splits are drawn as they are read."""
    args = mix.args
    # Held-out problems come first, because no other split may contain them. Only they are kept in memory.
    held_out = {split: list(islice(mix.problems(split, grades), args.test_rows)) for split in SPLITS[1:]}
    train = islice(mix.problems("train", grades), args.reasoning_rows)
    rows: Rows = {"reasoning": {"train": starmap(to_row, train)}}
    worked = [grade for grade in grades if grade.task in WORKED]
    if worked and args.sft_rows:
        rows["sft"] = {"train": starmap(mix.conversation, islice(mix.problems("sft", worked), args.sft_rows))}
    if worked and args.size_mb:
        rows["pretrain"] = {"train": mix.documents(mix.problems("pretrain", worked))}
    for split, drawn in held_out.items():
        worked_problems = [problem for problem in drawn if problem[0] in WORKED]
        rows["reasoning"][split] = starmap(to_row, drawn)
        if "sft" in rows:
            rows["sft"][split] = starmap(mix.conversation, worked_problems)
        if "pretrain" in rows:
            rows["pretrain"][split] = starmap(mix.document, worked_problems)
    if worked and args.pair_rows:
        pairs = starmap(mix.pair, islice(mix.problems("sft", worked), args.pair_rows))
        rows["preference"] = {"train": (pair for pair in pairs if pair["chosen"] != pair["rejected"])}
    return rows


def _readme(args: ReasoningArguments, rows: Rows) -> str:
    """Return the data set card."""
    text = files(__package__).joinpath("card.md").read_text(encoding="utf-8")
    uses = "\n".join(f"| `{config}` | {USES[config].format_map(vars(args))} |" for config in rows)
    values = {"version": version("reasoning-gym"), "tasks": ", ".join(args.tasks or ()), "rows": uses}
    about = {"license": "apache-2.0", "language": "en", "pretty_name": "Reasoning tasks"}
    return card(rows, text.format_map(vars(args) | values), **about)


class Mix:
    """Draws problems of several tasks, and writes down solutions; `args` and `reward` are as for `build`."""

    def __init__(self, args: ReasoningArguments, reward: Reward) -> None:
        self.args = args
        self.reward = reward
        # Questions of validation and test, which must not occur in any other pool; filled as they are drawn.
        self.held_out: set[str] = set()
        # How many problems of each task were dropped because the verifier does not accept their own answer.
        self.rejected: Counter[str] = Counter()
        self.rng = random.Random(f"{args.seed}/worked")

    def problems(self, pool: str, grades: Sequence[Grade]) -> Iterator[tuple[str, Entry]]:
        """Endlessly yield tasks and problems of a pool, in proportion to their weights."""
        sources = [self._usable(grade, pool) for grade in grades]
        drawn = [0] * len(grades)
        while True:
            # The task that is furthest behind its share: with weights 1 and 3, a and b come as b b a b, b b a b, …
            place = min(range(len(grades)), key=lambda i: (drawn[i] + 1) / grades[i].weight)
            drawn[place] += 1
            yield grades[place].task, next(sources[place])

    def _usable(self, grade: Grade, pool: str) -> Iterator[Entry]:
        """Yield the problems of a pool that are in no held-out split, and whose answer the verifier accepts."""
        # How many problems in a row could not be used.
        unusable = 0
        for entry in grade.entries(self.args.seed, pool):
            question = entry["question"].strip()
            # Only the splits of `reasoning` are graded by the verifier; `sft` and `pretrain` are not.
            if question not in self.held_out and (pool not in SPLITS or self.accepts(grade.task, entry)):
                if pool in ("validation", "test"):
                    self.held_out.add(question)
                unusable = 0
                yield entry
                continue
            unusable += 1
            if unusable == 1_000:
                break
        remedy = f"has too few different problems for {pool}; make it harder, or lower its weight or test_rows"
        raise UserError(Problem("tasks", grade.task, remedy))

    def accepts(self, task: str, entry: Entry) -> bool:
        """Return whether the problem's own answer gets the full reward."""
        row = to_row(task, entry)
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        (score,) = self.reward([f"<answer>{row['answer']}</answer>"], prompts=[row["prompt"]], **columns)
        if score is None:
            raise RunStopped("The machine is too busy for the verifiers of reasoning-gym; run this step again.")
        if score < 1.0:
            self.rejected[task] += 1
        return score == 1.0

    def conversation(self, task: str, entry: Entry) -> dict[str, Any]:
        """Return a row of `sft`: a problem with its worked solution or, straight away, the task's own answer."""
        if self.rng.random() < self.args.share_with_steps:
            answer = self._solution(task, entry, self.args.carelessness)
        else:
            answer = f"The answer is {entry['answer']}."
        return {"messages": [*to_row(task, entry)["prompt"], {"role": "assistant", "content": answer}], "kind": task}

    def document(self, task: str, entry: Entry) -> dict[str, Any]:
        """Return a row of `pretrain`."""
        solution = self._solution(task, entry, self.args.carelessness)
        return {"text": f"{entry['question'].strip()}\n{solution}", "kind": task}

    def documents(self, problems: Iterator[tuple[str, Entry]]) -> Iterator[dict[str, Any]]:
        """Yield documents of worked problems and recitals up to the requested size."""
        remaining = self.args.size_mb * 1e6
        while remaining > 0:
            if self.rng.random() < 0.2:
                row = {"text": recital(self.rng), "kind": "recital"}
            else:
                row = self.document(*next(problems))
            remaining -= len(row["text"].encode())
            yield row

    def pair(self, task: str, entry: Entry) -> dict[str, Any]:
        """Return a row of `preference`, whose answers are equal if nothing in the problem can be misread."""
        right = [{"role": "assistant", "content": self._solution(task, entry, 0.0)}]
        wrong = [{"role": "assistant", "content": self._solution(task, entry, 1.0)}]
        return {"prompt": to_row(task, entry)["prompt"], "chosen": right, "rejected": wrong, "kind": task}

    def _solution(self, task: str, entry: Entry, carelessness: float) -> str:
        """Work out a problem; parts of it are misread with this probability."""

        def misreads(part: str) -> bool:
            if part == "+" and self.args.misread_signs == "minus":
                return False
            return self.rng.random() < carelessness

        steps, reached = WORKED[task](entry["metadata"], misreads)
        return f"{WORKING} {steps} The answer is {reached}."
