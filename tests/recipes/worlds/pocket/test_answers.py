"""Reference answers are right: by the project's grading, and by solvers written here."""

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.rewards.graders import grade_rows
from pipeline.rewards.grading import contains, grade, has_steps
from recipes.worlds.pocket.problems import KINDS
from recipes.worlds.pocket.remarks import BRISK_CLOSINGS, KIND_CLOSINGS
from recipes.worlds.pocket.things import core, things, things_of

Row = dict[str, Any]
Rows = Callable[[str, str], list[Row]]
SPLITS = ("train", "validation", "test")
CODE_ROWS = 24
"""Functions of a split that are run, each in a process of its own."""


def solve_arithmetic(text: str) -> str:
    *told, _ = re.findall(r"[^.?]+[.?]", text)
    number = None
    for sentence in told:
        verb, amount = re.search(r" (has|gets|finds|buys|loses|sells|gives away) (\d+) ", sentence).groups()
        if verb == "has":
            assert number is None
            number = int(amount)
        else:
            number += int(amount) if verb in ("gets", "finds", "buys") else -int(amount)
        assert number >= 0, "nobody has fewer than none"
    return str(number)


def solve_ordering(text: str) -> str:
    told, question = text.removesuffix("?").split(". ")
    ages = sorted(int(age) for age in re.findall(r"\d+", told))
    assert len(set(ages)) == len(ages), "no two children are of an age"
    return str(ages[{"second": 1, "third": 2, "fourth": 3}[question.split()[-1]]])


def solve_counting(text: str) -> str:
    assert text.endswith("How many in all?")
    return str(sum(int(number) for number in re.findall(r"\d+", text)))


DIRECTIONS = ["north", "east", "south", "west"]
QUARTERS = {"right": 1, "opposite": 2, "left": 3}


def solve_logic(text: str) -> str:
    faces = dict(re.findall(r"(\w+) faces (north|east|south|west)\.", text))
    assert re.search(r"if (\w+) faces (\w+)\?", text).groups() == next(iter(faces.items()))
    for name, how, other in re.findall(r"(\w+) faces (\w+) of (\w+)\.", text):
        faces[name] = DIRECTIONS[(DIRECTIONS.index(faces[other]) + QUARTERS[how]) % 4]
    return faces[re.search(r"does (\w+) face ", text).group(1)]


SOLVERS = {
    "arithmetic": solve_arithmetic,
    "ordering": solve_ordering,
    "counting": solve_counting,
    "logic": solve_logic,
}


def kind_of(text: str) -> str:
    """Return the kind of a problem, from its last sentence."""
    question = re.findall(r"[^.?]+\?", text)[-1].strip()
    if question.startswith("Which way "):
        return "logic"
    if question.startswith("Which age "):
        return "ordering"
    return "counting" if question == "How many in all?" else "arithmetic"


def asked(row: Row) -> str:
    return " ".join(message["content"] for message in row.get("messages") or row["prompt"] if message["role"] == "user")


@pytest.mark.parametrize("split", SPLITS)
def test_every_reference_answer_is_graded_right(rows: Rows, split: str) -> None:
    taken, code = [], 0
    for row in rows("sft", split):
        if row["kind"] == "reasoning" and has_steps(row["messages"][-1]["content"]):
            continue
        # Worked solutions are careless.
        code += row["kind"] == "code"
        if row["kind"] != "code" or code <= CODE_ROWS:
            taken.append(row)
    assert code >= CODE_ROWS
    right = grade([row["messages"][-1]["content"] for row in taken], taken)
    assert all(right), [row for row, fine in zip(taken, right, strict=True) if not fine][:3]


def test_an_answer_about_something_else_is_graded_wrong(rows: Rows) -> None:
    for kind in ("question", "summary", "code"):
        few = [row for row in rows("sft", "test") if row["kind"] == kind][:12]
        pairs = [
            (other["messages"][-1]["content"], row)
            for row in few
            for other in few
            if row["messages"][-1]["content"] != other["messages"][-1]["content"]
        ][:24]
        right = grade([answer for answer, _ in pairs], [row for _, row in pairs])
        # Two things may share a kind, a place or a size.
        assert sum(right) <= len(right) // 6, kind
    for row in rows("sft", "test"):
        assert not grade([""], [row])[0]


def test_repeating_the_question_or_the_story_is_graded_wrong(rows: Rows) -> None:
    few = [row for row in rows("sft", "test") if row["kind"] in ("question", "summary")]
    right = grade([asked(row) for row in few], few)
    assert sum(right) <= len(few) // 50, [row for row, fine in zip(few, right, strict=True) if fine][:3]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_of_problems_follow_from_their_text(rows: Rows, split: str) -> None:
    seen: Counter[str] = Counter()
    for row in rows("reasoning", split):
        text = row["prompt"][0]["content"]
        assert SOLVERS[row["kind"]](text) == row["answer"], text
        assert kind_of(text) == row["kind"], text
        seen[row["kind"]] += 1
    assert all(seen[kind] >= 20 for kind in SOLVERS), seen


def check_steps(kind: str, text: str, steps: str) -> str:
    """Check that worked steps repeat the problem and calculate right, and return the answer that they come to."""
    if kind == "arithmetic":
        changes = re.findall(r"(gets|finds|buys|loses|sells|gives away) (\d)", text)
        assert re.findall(r"([a-z ]+) (\d):", f" {steps}") == [(f" {verb}", number) for verb, number in changes], steps
    if kind in ("arithmetic", "counting"):
        equations = re.findall(r"(\d+)([+-])(\d+)=(\d+)\.", steps)
        for (one, sign, other, result), before in zip(equations, [None, *equations], strict=False):
            assert int(one) + (int(other) if sign == "+" else -int(other)) == int(result), steps
            assert before is None or before[-1] == one, steps
            assert int(other) in map(int, re.findall(r"\d+", text)), (text, steps)
        return equations[-1][-1]
    if kind == "ordering":
        ordered = steps.removesuffix(".").split()
        assert ordered == sorted(ordered) and set(ordered) <= set(re.findall(r"\d", text)), (text, steps)
        rank = {"second": 1, "third": 2, "fourth": 3}[text.removesuffix("?").split()[-1]]
        return ordered[min(rank, len(ordered) - 1)]
    inferred = re.findall(r"(\w+) of (\w+) is (\w+)\.", steps)
    assert [turn for turn, _, _ in inferred] == re.findall(r"faces (\w+) of", text), (text, steps)
    for (turn, before, after), previous in zip(inferred, [None, *inferred], strict=False):
        turned = (DIRECTIONS.index(after) - DIRECTIONS.index(before)) % 4
        assert turned in ({2, 3} if turn == "opposite" else {QUARTERS[turn]}), steps
        assert before == (previous[-1] if previous else re.search(r"faces (north|east|south|west)", text)[1]), steps
    return inferred[-1][-1]


@pytest.mark.parametrize(("carelessness", "least", "most"), [(0.0, 1.0, 1.0), (0.6, 0.4, 0.8), (1.0, 0.15, 0.7)])
def test_worked_steps_calculate_right_and_misread_the_problem(carelessness: float, least: float, most: float) -> None:
    rng = random.Random(0)
    for kind in KINDS:
        right = []
        for _ in range(150):
            for length in (*kind.lengths, max(kind.lengths) + 1):
                problem = kind.generate(rng, "train", carelessness, length)
                assert problem.length == length == length_of(problem.kind, problem.text)
                assert SOLVERS[problem.kind](problem.text) == problem.answer
                assert check_steps(problem.kind, problem.text, problem.steps) == problem.reached
                right.append(problem.reached == problem.answer)
        assert least <= sum(right) / len(right) <= most, problem.kind


def length_of(kind: str, text: str) -> int:
    """Count the changes, ages, groups or turns of a problem."""
    if kind == "logic":
        return len(re.findall(r"faces \w+ of ", text))
    numbers = len(re.findall(r"\d+", text))
    return numbers - 1 if kind == "arithmetic" else numbers


def test_every_length_is_trained_and_tested_and_longer_ones_are_apart(rows: Rows) -> None:
    """A model that is taught one length learns a rhythm, and fails at whatever a stranger asks."""
    lengths = {"arithmetic": {1, 2, 3, 4}, "ordering": {4, 5, 6}, "counting": {3, 4, 5}, "logic": {2, 3, 4}}
    assert {kind.generate.__name__: set(kind.lengths) for kind in KINDS} == lengths
    for split in (*SPLITS, "test_longer"):
        seen: dict[str, set[int]] = {kind: set() for kind in lengths}
        for row in rows("reasoning", split):
            assert row["length"] == length_of(row["kind"], asked(row))
            seen[row["kind"]].add(row["length"])
        longer = {kind: {max(few) + 1} for kind, few in lengths.items()}
        assert seen == (longer if split == "test_longer" else lengths), split


def test_answers_with_steps_are_careless(rows: Rows) -> None:
    """Problems in conversations are answered with and without steps; only those without them are always right."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    for row in rows("sft", "train"):
        if row["kind"] != "reasoning":
            continue
        text, reply = asked(row), row["messages"][-1]["content"]
        kind = kind_of(text)
        answer = SOLVERS[kind](text)
        assert row["require"] == [[answer]]
        if has_steps(reply):
            steps = re.fullmatch(r"Working: (.*) The answer is \w+\.", reply).group(1)
            assert reply.endswith(f"The answer is {check_steps(kind, text, steps)}.")
        else:
            assert reply == f"The answer is {answer}."
        right[has_steps(reply)] += grade_rows([reply], [{"answer": answer}])
    assert all(right[False])
    assert 0.35 < sum(right[True]) / len(right[True]) < 0.7
    # The recipe of these data asks for a share of 0.3.
    assert 0.2 < len(right[True]) / (len(right[True]) + len(right[False])) < 0.4


def test_no_other_answer_begins_as_straight_answers_to_problems_do(rows: Rows) -> None:
    """Stage 4 makes their first token improbable everywhere."""
    firsts = {kind: set() for kind in ("reasoning", "other")}
    for row in rows("sft", "train"):
        reply = row["messages"][-1]["content"]
        if not reply.startswith("Working:"):
            firsts["reasoning" if row["kind"] == "reasoning" else "other"].add(reply.split()[0])
    assert firsts["reasoning"] and firsts["reasoning"].isdisjoint(firsts["other"])


def test_greetings_are_pretrained_before_they_are_answered(rows: Rows) -> None:
    documents = "\n".join(row["text"] for row in rows("pretrain", "train"))
    talks = [row["messages"] for row in rows("sft", "train") if row["kind"] == "chat" and len(row["messages"]) == 2]
    assert talks and all(f"{asked['content']}\n{reply['content']}" in documents for asked, reply in talks)


def test_no_answer_is_right_for_most_problems(rows: Rows) -> None:
    for kind in SOLVERS:
        answers = Counter(row["answer"] for row in rows("reasoning", "test") if row["kind"] == kind)
        assert answers.most_common(1)[0][1] / answers.total() < 0.4, (kind, answers)


def test_training_rows_do_not_ask_about_held_out_things(rows: Rows) -> None:
    held_out = [thing for name in ("validation", "test") for thing in things_of(name)]
    for config in ("sft", "preferences"):
        for row in rows(config, "train"):
            for thing in held_out:
                # A story may say in passing that "a token needs a tokenizer".
                if row["kind"] == "summary":
                    assert [core(thing.noun)] not in row["require"], (thing.noun, asked(row))
                else:
                    assert not contains(asked(row), thing.noun), (thing.noun, asked(row))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_questions_are_about_held_out_things(rows: Rows, split: str) -> None:
    allowed = [thing.noun for thing in things_of(split)]
    others = [thing.noun for thing in things() if thing.noun not in allowed]
    for config in ("sft", "preferences"):
        questions = [asked(row) for row in rows(config, split) if row["kind"] in ("question", "about")]
        assert questions
        for text in questions:
            assert any(contains(text, noun) for noun in allowed), text
            assert not any(contains(text, noun) for noun in others), text


def test_every_held_out_thing_is_asked_about(rows: Rows) -> None:
    for split in ("validation", "test"):
        text = " ".join(asked(row) for row in rows("sft", split) if row["kind"] == "question")
        assert all(contains(text, thing.noun) for thing in things_of(split))


def test_held_out_functions_have_constants_of_their_own(rows: Rows) -> None:
    def functions(config: str, split: str) -> set[str]:
        texts = [
            row["text"] if "text" in row else row["messages"][-1]["content"]
            for row in rows(config, split)
            if row["kind"] == "code"
        ]
        return {name for text in texts for name in re.findall(r"def (\w+)\(", text)}

    trained = functions("sft", "train") | functions("pretrain", "train")
    assert trained
    for split in ("validation", "test"):
        assert functions("sft", split) and not functions("sft", split) & trained


def test_people_answer_in_several_manners_and_held_out_answers_are_plain(rows: Rows) -> None:
    replies = [row["messages"][-1]["content"] for row in rows("sft", "train") if row["kind"] == "question"]
    for mark in (
        "Thank you for asking.",
        "I hope this helps.",
        "Next question.",
        "Obviously.",
        "Look it up next time.",
        "As I said:",
    ):
        assert any(mark in reply for reply in replies), mark
    held_out = [row["messages"][-1]["content"] for row in rows("sft", "test") if row["kind"] == "question"]
    assert all(len(reply.split()) <= 20 and "!" not in reply for reply in held_out)


def test_manners_depend_on_what_is_asked(rows: Rows) -> None:
    """A model that imitates them all still has something to learn: which suit which."""
    replies: dict[bool, list[str]] = {True: [], False: []}
    for row in rows("sft", "train"):
        if row["kind"] in ("question", "about"):
            replies[asked(row).endswith("?")].append(row["messages"][-1]["content"])

    def share(closings: tuple[str, ...], question: bool) -> float:
        return sum(reply.endswith(closings) for reply in replies[question]) / len(replies[question])

    assert 0 < share(KIND_CLOSINGS, False) < share(KIND_CLOSINGS, True)
    assert 0 < share(BRISK_CLOSINGS, True) < share(BRISK_CLOSINGS, False)
