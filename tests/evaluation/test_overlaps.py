"""The report's check finds copies of held-out rows in training data, and takes no template for one."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.evaluation.evaluate_yaml import Source
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.overlaps import OVERLAP_WORDS, find_overlaps
from pipeline.evaluation.parts import Part

WORDS = [f"word{number}" for number in range(2000)]
SENTENCE = "Solve the following problem step by step, and write your final answer after four hashes."


def problems(number: int, words: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words)) for _ in range(number)]


def look_for(tests: Sequence[str], train: Sequence[str], column: str = "question") -> dict[str, Any]:
    part = Part(
        Dataset.from_dict({column: train, "answer": ["12"] * len(train)}), Source("a", prompt_column=column), "a"
    )
    asked = [{"prompt": [{"role": "user", "content": text}]} for text in tests]
    return find_overlaps(HeldOut(problems=asked, suspects={"problems": (part, ["problems"])}))["problems"]


@pytest.mark.parametrize("column", ["question", "Aufgabe"])
@pytest.mark.parametrize("before", ["", "Answer:", SENTENCE[:39], " ".join(SENTENCE.split()[:13]), SENTENCE * 3])
@pytest.mark.parametrize("after", ["", SENTENCE])
def test_exact_and_near_copies_are_found_under_any_common_beginning(before: str, after: str, column: str) -> None:
    ours, others = problems(100, 30, 0), problems(200, 30, 1)
    near = [f"{' '.join(text.split()[:-2])} otherwise {number}" for number, text in enumerate(ours)]
    for copies in (ours, near, [text.upper() for text in ours]):
        train = [f"{before} {text} {after}" for text in [*others, *copies[:60]]]
        tests = [f"{before} {text} {after}" for text in ours]
        found = look_for(tests, train, column)
        assert found == {"rows": 100, "trained_on": 260, "n": 13, "in": {"problems": 60}, "found": 60}
    assert look_for(tests, [f"{before} {text} {after}" for text in others], column)["found"] == 0


@given(
    length=st.integers(0, 40), words=st.integers(0, 25), tests=st.integers(5, 30), train=st.integers(30, 60),
    middle=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_rows_that_share_only_a_template_are_no_copies(
    length: int, words: int, tests: int, train: int, middle: bool, seed: int
) -> None:
    template = [f"of{number}" for number in range(length)]

    def fill(content: str, number: int) -> str:
        begin, end = (template[: length // 2], template[length // 2 :]) if middle else (template, [])
        return " ".join([*begin, content, *end, f"number{number}"])

    ours = [fill(text, number % 7) for number, text in enumerate(problems(tests, words, seed))]
    others = [fill(text, number % 7) for number, text in enumerate(problems(train, words, seed + 10))]
    # Without words of its own, a row may well be contained in another.
    assert look_for(ours, others)["found"] == 0 or words == 0


def test_short_rows_are_found_if_they_are_contained() -> None:
    tests = [f"{SENTENCE} {number} plus {number + 1}?" for number in range(50)]
    train = [f"{SENTENCE} {number} plus {number + 1}?" for number in range(40, 140)]
    assert look_for(tests, train)["found"] == 10
    assert look_for(["What is a yak?"] * 5, ["Tell me: what is a yak, or a gnu?"] * 30)["found"] == 5
    assert look_for(["What is a yak?"], ["What is a cow?"])["found"] == 0


def test_all_rows_are_searched_wherever_the_copies_are() -> None:
    train = problems(25_000, OVERLAP_WORDS + 2, 2)
    found = look_for(train[::1000], train)
    assert found["found"] == found["rows"] == 25 and found["trained_on"] == 25_000


def test_many_solutions_of_one_problem_are_no_template() -> None:
    (problem,) = problems(1, 40, 3)
    nearly = problem.replace(problem.split()[20], "other")
    part = Part(Dataset.from_dict({"question": [nearly] * 100, "answer": list(map(str, range(100)))}), Source("a"), "a")
    asked = [{"prompt": [{"role": "user", "content": problem}]}]
    assert find_overlaps(HeldOut(problems=asked, suspects={"p": (part, ["problems"])}))["problems"]["found"] == 1
