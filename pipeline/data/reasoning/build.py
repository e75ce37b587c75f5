"""Write problems of reasoning-gym as a Hub data set repository: a card with configs, and one Parquet file per split."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import islice, starmap
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.data import writing
from pipeline.data.arguments import SPLITS, option
from pipeline.data.pocket import build as pocket
from pipeline.data.pocket.build import MESSAGES, PocketArguments
from pipeline.data.pocket.documents import recital
from pipeline.data.pocket.problems import WORKING
from pipeline.data.reasoning.tasks import POOLS, SEEDS, Entry, Grade, read_tasks, to_row
from pipeline.data.reasoning.worked import WORKED
from pipeline.errors import Problem, RunStopped, UserError
from pipeline.files import write_folder

logger = logging.getLogger(__name__)

SCHEMAS: dict[str, pa.Schema] = {
    "pretrain": pa.schema([("text", pa.string()), ("kind", pa.string())]),
    "sft": pa.schema([("messages", MESSAGES), ("kind", pa.string())]),
    "reasoning": pa.schema(
        [("prompt", MESSAGES), ("answer", pa.string()), ("metadata", pa.string()), ("kind", pa.string())]
    ),
}
USES = {
    "pretrain": "problems with worked solutions, and recitals of numbers | stage 1",
    "sft": "a problem and its solution, worked or not | stage 2",
    "reasoning": "a problem and its final answer | stage 4",
}
RECITALS = 0.2
"""Share of the pretraining documents that teach to copy numbers."""
PROBES = 50
"""Problems of each task that are tried before anything is written."""
MAX_REFUSED = 0.05
"""Share of these problems whose own answer the verifier may refuse."""
PATIENCE = 1_000
"""Problems in a row that may be unusable before a task counts as exhausted."""

Reward = Callable[..., list[float | None]]


@dataclass
class ReasoningArguments(PocketArguments):
    """The data set to generate: pocket or, with `tasks`, problems of reasoning-gym."""

    tasks: dict | None = option(  # noqa: RUF009
        None,
        "Tasks of reasoning-gym, with their settings: fields of the task's configuration, `level` (of its curriculum, "
        "or a list) and `weight`; a list of settings mixes difficulties. Default: the pocket data set. If it is 0, "
        "`size_mb` or `sft_rows` leave out that config; both are only made of tasks that can be worked out here.",
    )
    test_rows: int = option(300, "Problems in the validation and test split of reasoning, with `tasks`.")


def check_arguments(args: ReasoningArguments) -> list[Problem]:
    """Check the sizes, the shares, the seed and the output directory."""
    problems = pocket.check_arguments(args, "# Reasoning tasks", ("reasoning_rows", "test_rows"))
    for name in ("size_mb", "sft_rows"):
        if getattr(args, name) < 0:
            problems.append(Problem(name, getattr(args, name), "must not be negative"))
    # NumPy's generators, which some tasks use, take seeds of 32 bits.
    largest = 2**32 // (len(POOLS) * SEEDS) - 1
    if not 0 <= args.seed <= largest:
        problems.append(Problem("seed", args.seed, f"must be from 0 to {largest}"))
    return problems


def build(args: ReasoningArguments, reward: Reward) -> None:
    """Draw all problems and write the repository; an interrupted build leaves `output_dir` as it was.

    Args:
        reward: What the answers will be rewarded by; rows whose own answer it does not score with 1 are dropped.

    Raises:
        UserError: If `output_dir` contains other files, a size or a setting is wrong, the reward refuses the own
            answers of a task, or a task has too few different problems.
    """
    grades, problems = read_tasks(args.tasks)
    mix = Mix(args, grades, reward)
    problems += check_arguments(args)
    problems += mix.refused_tasks() if not problems else []
    if problems:
        raise UserError(*problems)
    # Rows are drawn while they are written, so that only the held-out problems are in memory. They come first, because
    # no other split may have one of them.
    worked = [grade for grade in grades if grade.task in WORKED]
    with write_folder(Path(args.output_dir)) as folder:
        held_out = {split: list(islice(mix.problems(split, grades), args.test_rows)) for split in SPLITS[1:]}
        train = islice(mix.problems("train", grades), args.reasoning_rows)
        configs: dict[str, dict[str, Iterable[dict[str, Any]]]] = {"reasoning": {"train": starmap(to_row, train)}}
        if worked and args.sft_rows:
            drawn = islice(mix.problems("sft", worked), args.sft_rows)
            configs["sft"] = {"train": starmap(mix.conversation, drawn)}
        if worked and args.size_mb:
            configs["pretrain"] = {"train": mix.documents(mix.problems("pretrain", worked))}
        for split, problems_of in held_out.items():
            configs["reasoning"][split] = starmap(to_row, problems_of)
            some = [problem for problem in problems_of if problem[0] in WORKED]
            for config, convert in {"sft": mix.conversation, "pretrain": mix.document}.items():
                if config in configs:
                    configs[config][split] = starmap(convert, some)
        for config, splits in configs.items():
            for split in SPLITS:
                writing.write_rows(folder / config / f"{split}.parquet", SCHEMAS[config], splits[split])
        (folder / "README.md").write_text(card(args, list(configs)), encoding="utf-8", newline="\n")
    for task, number in mix.refused.items():
        logger.warning("%s: %d problems are dropped, because the verifier refuses their answers", task, number)


class Mix:
    """Draws problems of several tasks, and writes down solutions; `args` and `reward` are as for `build`."""

    def __init__(self, args: ReasoningArguments, grades: Sequence[Grade], reward: Reward) -> None:
        self.args, self.grades, self.reward = args, grades, reward
        self.held_out: set[str] = set()
        """Questions of validation and test, which no other pool may have; filled as they are drawn."""
        self.refused: Counter[str] = Counter()
        self.rng = random.Random(f"{args.seed}/worked")

    def refused_tasks(self) -> list[Problem]:
        """Report the tasks whose verifier refuses their own answers, or pays whatever is answered."""
        problems = []
        for grade in self.grades:
            tried = islice(grade.entries(self.args.seed, "train"), PROBES)
            number = sum(not self._accepts(grade.task, entry) for entry in tried)
            if number > PROBES * MAX_REFUSED:
                remedy = f"its verifier refuses {number} of {PROBES} of its own answers, or pays wrong ones as well; "
                remedy += "leave this task out"
                problems.append(Problem("tasks", grade.task, remedy))
        return problems

    def problems(self, pool: str, grades: Sequence[Grade]) -> Iterator[tuple[str, Entry]]:
        """Yield tasks and problems of a pool without end, in the proportions of their weights.

        All problems of validation and test are different.
        """
        sources = [self._usable(grade, pool) for grade in grades]
        drawn = [0] * len(grades)
        while True:
            # The task that is furthest behind its share: with weights 1 and 3, a and b come as b b a b, b b a b, …
            place = min(range(len(grades)), key=lambda i: (drawn[i] + 1) / grades[i].weight)
            drawn[place] += 1
            yield grades[place].task, next(sources[place])

    def _usable(self, grade: Grade, pool: str) -> Iterator[Entry]:
        """Yield the problems of a pool that no held-out split has, and whose answer the verifier accepts."""
        unusable = 0
        for entry in grade.entries(self.args.seed, pool):
            question = entry["question"].strip()
            # Only the splits of `reasoning` are rewarded by the verifier; `sft` and `pretrain` are not.
            if question not in self.held_out and (pool not in SPLITS or self._accepts(grade.task, entry)):
                if pool in ("validation", "test"):
                    self.held_out.add(question)
                yield entry
                unusable = 0
                continue
            unusable += 1
            if unusable == PATIENCE:
                break
        remedy = f"has too few different problems for {pool}; make it harder, or lower its weight or test_rows"
        raise UserError(Problem("tasks", grade.task, remedy))

    def _accepts(self, task: str, entry: Entry) -> bool:
        """Return whether the reward pays the problem's own answer in full."""
        row = to_row(task, entry)
        columns = {name: [value] for name, value in row.items() if name != "prompt"}
        (score,) = self.reward([f"<answer>{row['answer']}</answer>"], prompts=[row["prompt"]], **columns)
        if score is None:
            raise RunStopped("The machine is too busy for the verifiers of reasoning-gym; run this step again.")
        if score < 1.0:
            self.refused[task] += 1
        return score == 1.0

    def conversation(self, task: str, entry: Entry) -> dict[str, Any]:
        """Return a row of `sft`."""
        answer = self._solution(task, entry, self.rng.random() < self.args.share_with_steps)
        return {"messages": [*to_row(task, entry)["prompt"], {"role": "assistant", "content": answer}], "kind": task}

    def document(self, task: str, entry: Entry) -> dict[str, Any]:
        """Return a row of `pretrain`."""
        return {"text": f"{entry['question'].strip()}\n{self._solution(task, entry, with_steps=True)}", "kind": task}

    def documents(self, problems: Iterator[tuple[str, Entry]]) -> Iterator[dict[str, Any]]:
        """Yield documents of worked problems and recitals until they have the size asked for."""
        remaining = self.args.size_mb * 1e6
        while remaining > 0:
            recites = self.rng.random() < RECITALS
            row = {"text": recital(self.rng), "kind": "recital"} if recites else self.document(*next(problems))
            remaining -= len(row["text"].encode())
            yield row

    def _solution(self, task: str, entry: Entry, with_steps: bool) -> str:
        """State the answer that the worked steps come to, after these, or the task's own one straight away."""
        if not with_steps:
            return f"The answer is {entry['answer']}."
        steps, reached = WORKED[task](entry["metadata"], lambda: self.rng.random() < self.args.carelessness)
        return f"{WORKING} {steps} The answer is {reached}."


def card(args: ReasoningArguments, configs: Sequence[str]) -> str:
    """Return the data set card."""
    careless = ""
    if len(configs) > 1:
        careless = (
            "\nWorked solutions, in `pretrain` and `sft`, are careless: each step is right in itself, but with\n"
            f"probability {args.carelessness} the problem is misread, always in the same way.\n"
        )
    text = files(__package__).joinpath("card.md").read_text(encoding="utf-8")
    text = text.format(
        version=version("reasoning-gym"),
        seed=args.seed,
        tasks=", ".join(args.tasks or ()),
        rows="\n".join(f"| `{config}` | {USES[config]} |" for config in configs),
        careless=careless,
    )
    splits = dict.fromkeys(configs, SPLITS)
    return writing.card(splits, text, license="apache-2.0", language="en", pretty_name="Reasoning tasks")
