"""Write the data set of recipes/pocket-tools: sums that are easier with a calculator, and a game of questions.

The conversations do not reveal what a model has to find out by reinforcement: half of the sums, short or long, are
answered straight away and half with the calculator; half of the calls for long sums are careless; and most players of
the game ask about one letter after the other. The calculator and the game always answer correctly.
"""

import json
import random
import re
import string
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pyarrow as pa

from pipeline.data.arguments import SPLITS
from pipeline.data.writing import card, write_data_set
from pipeline.errors import refuse
from recipes.worlds.pocket.build import DOCUMENT, REASONING, STRING, PocketArguments, check_arguments
from recipes.worlds.pocket.conversations import distinct

CALL = pa.struct({"type": STRING, "function": pa.struct({"name": STRING, "arguments": STRING})})
CONVERSATION = pa.schema(
    {"messages": pa.list_(pa.struct({"role": STRING, "content": STRING, "tool_calls": pa.list_(CALL)})), "kind": STRING}
)
SCHEMAS: dict[str, pa.Schema] = {
    "pretrain": DOCUMENT,
    "sft": CONVERSATION,
    "direct": CONVERSATION,
    "reasoning": pa.schema([*REASONING, pa.field("hidden", STRING), pa.field("call_cost", pa.float64())]),
}
CONFIG_SPLITS: dict[str, tuple[str, ...]] = dict.fromkeys(SCHEMAS, SPLITS) | {"reasoning": (*SPLITS, "test_longer")}

WORDINGS = (
    "What is {sum}?", "Add up {sum}.", "How much is {sum}?", "{sum} = ?", "Compute {sum}.", "What does {sum} make?",
    "Give the value of {sum}.", "{sum} is what?",
)  # fmt: skip
GAME = "A letter from {low} to {high} is hidden. Ask three times, then name it."
QUESTIONS = 3
TALK = ("calculator: expression={a}+{b}", "ask: letter=", "earlier", "later", "yes")
LETTERS = string.ascii_uppercase
DOCUMENT_KINDS = {"sums": 3, "talk": 4, "copies": 3, "order": 1, "middle": 1, "alphabet": 1}
"""Kinds of documents, and how often each is drawn."""
Row = dict[str, Any]


def build(args: PocketArguments) -> None:
    """Generate all splits and write the repository; arguments and errors as for `recipes.worlds.pocket.build.build`."""
    refuse(*check_arguments(args, "# Tools", ("size_mb", "sft_rows", "reasoning_rows"), SCHEMAS))
    rows = ((config, split, _rows(args, config, split)) for config, splits in CONFIG_SPLITS.items() for split in splits)
    text = files(__package__).joinpath("tools.md").read_text(encoding="utf-8").format(**vars(args))
    readme = card(CONFIG_SPLITS, text, license="apache-2.0", language="en", pretty_name="Pocket tools")
    write_data_set(args.output_dir, SCHEMAS, rows, readme)


def _rows(args: PocketArguments, config: str, split: str) -> Iterator[Row]:
    """Generate the rows of a split."""
    rng = random.Random(f"{args.seed}/tools/{config}/{split}")
    if config == "pretrain":
        remaining = args.size_mb * 1e6 if split == "train" else 60_000
        while remaining > 0:
            row = _document(rng, split)
            remaining -= len(row["text"])
            yield row
        return
    for problem in _problems(args, config, split, rng):
        yield problem if config == "reasoning" else _conversation(rng, problem, direct=config == "direct")


def _problems(args: PocketArguments, config: str, split: str, rng: random.Random) -> list[Row]:
    """Draw the problems of a split; those of a held-out split are all of one kind, then all of the next one."""
    kinds = ["one digit", "long"]
    if config != "direct":
        kinds.append("game")
    if split == "train":
        # Draw as many games as sums.
        if "game" in kinds:
            kinds.append("game")
        number = args.reasoning_rows if config == "reasoning" else args.sft_rows
        return [_problem(rng, split, rng.choice(kinds)) for _ in range(number)]

    if split == "test_longer":
        kinds = ["longer"]
    size = 60 if split == "validation" else 250
    problems = []
    for kind in kinds:
        # Few games are distinct.
        number = size * 6 // 5 if kind == "game" else size
        problems += distinct((_problem(rng, split, kind) for _ in range(100 * number)), number)
    return problems


def _split_of(*numbers: int) -> str:
    """Return the split whose rows may have these numbers: a third are for test, a tenth for validation."""
    draw = random.Random(repr(numbers)).random()
    if draw < 1 / 3:
        return "test"
    return "validation" if draw < 0.43 else "train"


def _problem(rng: random.Random, split: str, kind: str) -> Row:
    """Draw a problem: prompt and final answer, what a call costs and, for a game, the hidden letter.

    `kind` is "one digit", "long", "longer" or "game".
    """
    # What is longer has the numbers of the test split.
    source = "test" if split == "test_longer" else split
    if kind == "game":
        return _game(rng, source)
    while True:
        terms = _terms(rng, split, kind)
        place = rng.randrange(len(WORDINGS))
        # There are only a hundred one-digit sums, and all are in training. What is held out is how they are asked.
        if _split_of(*terms, place if kind == "one digit" else 0) == source:
            break
    text = WORDINGS[place].format(sum=" + ".join(map(str, terms)))
    length = max(len(str(term)) for term in terms)
    # The cost of a calculator call, where a right answer is worth 1. Questions in the game are free.
    return _row(text, str(sum(terms)), kind, length, hidden=None, call_cost=0.1)


def _game(rng: random.Random, split: str) -> Row:
    """Draw a game: find a hidden letter of a range."""
    while True:
        low, high = _range(rng)
        if _split_of(low, high) == split:
            break
    letter = LETTERS[rng.randint(low, high)]
    text = GAME.format(low=LETTERS[low], high=LETTERS[high])
    return _row(text, letter, "game", length=0, hidden=letter, call_cost=0.0)


def _terms(rng: random.Random, split: str, kind: str) -> list[int]:
    """Draw the terms of a sum."""
    if kind == "one digit":
        return [rng.randrange(10), rng.randrange(10)]
    # Held-out sums have three terms, because a model this small learns to add two without a calculator within minutes.
    # Longer ones have terms of one more digit.
    number = rng.choice((2, 3)) if split == "train" else 3
    lengths = [7 if kind == "longer" else rng.choice((4, 5, 6)) for _ in range(number)]
    return [rng.randrange(10 ** (digits - 1), 10**digits) for digits in lengths]


def _row(text: str, answer: str, kind: str, length: int, hidden: str | None, call_cost: float) -> Row:
    prompt = [{"role": "user", "content": text}]
    row = {"prompt": prompt, "answer": answer, "kind": kind, "length": length}
    return {**row, "hidden": hidden, "call_cost": call_cost}


def _range(rng: random.Random) -> tuple[int, int]:
    """Draw the places of the first and the last of the letters among which one is hidden."""
    # Three questions can identify any of fifteen letters, and two any of seven.
    size = rng.choice(range(8, 15))
    low = rng.randint(0, len(LETTERS) - size)
    return low, low + size - 1


def _conversation(rng: random.Random, problem: Row, direct: bool) -> Row:
    """Return the problem with an answer: straight away, with the calculator, or after some questions."""
    calls: list[Row] = []
    answer = problem["answer"]
    text = problem["prompt"][0]["content"]
    if problem["kind"] == "game":
        calls, answer = _play(rng, text, answer)
    elif not direct and rng.random() < 0.5:
        terms = list(map(int, re.findall(r"\d+", text)))
        if problem["kind"] == "long" and rng.random() < 0.5:
            # Round the terms, like someone who only wants an estimate.
            terms = [round(term, -2) for term in terms]
        answer = str(sum(terms))
        calls = _called("calculator", {"expression": "+".join(map(str, terms))}, answer)
    final = {"role": "assistant", "content": f"The answer is {answer}."}
    return {"messages": [*problem["prompt"], *calls, final], "kind": problem["kind"]}


def _play(rng: random.Random, text: str, letter: str) -> tuple[list[Row], str]:
    """Return the questions of someone who plays the game in `text`, with their results, and the letter that they name.

    `letter` is the hidden one.
    """
    low, high = (LETTERS.index(bound) for bound in re.findall(r"from (.) to (.) ", text)[0])
    hidden = LETTERS.index(letter)
    # Some players halve the range; the others ask about one letter after the other.
    halves = rng.random() < 0.35
    calls: list[Row] = []
    for _ in range(QUESTIONS):
        guess = (low + high) // 2 if halves else low
        if guess == hidden:
            calls += _called("ask", {"letter": LETTERS[guess]}, "yes")
            return calls, letter
        if hidden > guess:
            calls += _called("ask", {"letter": LETTERS[guess]}, "later")
            low = guess + 1
        else:
            calls += _called("ask", {"letter": LETTERS[guess]}, "earlier")
            high = guess - 1
    # The player names one of the remaining letters.
    return calls, LETTERS[rng.randint(low, high)]


def _called(name: str, arguments: Row, result: str) -> list[Row]:
    """Return a call of a tool, as OpenAI's API writes it, and its result."""
    call = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return [{"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": result}]


def _document(rng: random.Random, split: str) -> Row:
    """Draw a document: a few lines of one kind about numbers or letters."""
    kind = rng.choice([name for name, share in DOCUMENT_KINDS.items() for _ in range(share)])
    lines: list[str] = []
    while len(lines) < 6:
        a = rng.randrange(10)
        b = rng.randrange(10)
        low, high = _range(rng)
        if kind == "sums":
            lines.append(f"{a} + {b} = {a + b}.")
        elif kind == "talk":
            # Use the words of the later stages, so that the tokenizer learns them.
            place = rng.randrange(len(WORDINGS))
            question = WORDINGS[place].format(sum=f"{a} + {b}")
            line = f"{question} The answer is {a + b}."
            if _split_of(a, b, place) != split or rng.random() < 0.3:
                game = GAME.format(low=LETTERS[a], high=LETTERS[b + 10])
                line = rng.choice((game, *TALK)).format(a=a, b=b)
            lines.append(line)
        elif kind == "copies":
            # 4567 + 12: 4567+12.
            numbers = [str(rng.randrange(10 ** rng.randrange(1, 9))) for _ in range(rng.randint(2, 4))]
            lines.append(f"{' + '.join(numbers)}: {'+'.join(numbers)}.")
        elif _split_of(low, high) == split:
            a, b = sorted(rng.sample(range(low, high + 1), 2))
            early, late = LETTERS[a], LETTERS[b]
            if kind == "order":
                lines.append(rng.choice((f"{late} is later than {early}.", f"{early} is earlier than {late}.")))
            elif kind == "middle":
                lines.append(f"From {early} to {late}, the middle is {LETTERS[(a + b) // 2]}.")
            else:
                lines.append(f"From {early} to {late}: {' '.join(LETTERS[a : b + 1])}.")
    return {"text": " ".join(lines), "kind": kind}
