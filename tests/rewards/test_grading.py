"""Grading: which answers are right, have stopped and show steps. Tables; no model."""

import pytest

from pipeline.rewards.graders import grade_rows
from pipeline.rewards.grading import contains, extract_code, grade, has_steps


def rule(require=(), reject=(), max_words=0, test=""):
    return {
        "require": [list(r) for r in require],
        "reject": list(reject),
        "max_words": max_words,
        "test": test,
    }


@pytest.mark.parametrize(
    ("text", "phrase", "found"),
    [
        ("A cat sleeps.", "cat", True),
        ("a CAT", "Cat", True),
        ("A category.", "cat", False),
        ("bobcat", "cat", False),
        ("It has 12 legs.", "12", True),
        ("It weighs 12.", "12", True),
        ("It weighs 12.5 kg.", "12", False),
        ("It weighs 3.12 kg.", "12", False),
        ("112", "12", False),
        ("a large\n language  model", "large language model", True),
        ("It’s an animal", "it's", True),
        ("C++ (a language)", "c++", True),
        ("anything", "", False),
    ],
)
def test_phrases_are_whole_words_in_any_case(text, phrase, found):
    assert contains(text, phrase) is found


@pytest.mark.parametrize(
    ("answer", "row", "right"),
    [
        ("A fox is red.", rule([["red", "orange"], ["fox"]]), True),
        ("A fox is orange.", rule([["red", "orange"], ["fox"]]), True),
        ("It is orange.", rule([["red", "orange"], ["fox"]]), False),
        ("A fox is red and blue.", rule([["red"]], reject=["blue"]), False),
        ("one two three", rule([["two"]], max_words=3), True),
        ("one two three four", rule([["two"]], max_words=3), False),
        ("Hello!", rule(), True),
        ("", rule(), False),
        (" \n", rule(), False),
        ("A fox.", {"require": None}, True),
        ("A fox.", {}, True),
    ],
)
def test_a_row_decides_which_answers_are_right(answer, row, right):
    assert grade([answer], [row]) == [right]


def test_code_must_pass_its_test_and_the_words():
    test = "assert add(1, 2) == 3\nassert add(0, 0) == 0"
    answers = [
        "def add(a, b):\n    return a + b",
        "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nGoodbye.",
        "def add(a, b):\n    return a - b",
        "def add(a, b: return",
        "",
        "def add(a, b):\n    return a + b  # lambda",
    ]
    rows = [rule(test=test)] * 5 + [rule(test=test, reject=["lambda"])]
    assert grade(answers, rows) == [True, True, False, False, False, False]


def test_answers_and_rows_must_pair():
    with pytest.raises(ValueError):
        grade(["a"], [])


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("x = 1", "x = 1"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("Sure.\n```python\nx = 1\n```\n```\ny\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),
    ],
)
def test_code_is_taken_out_of_a_fence(answer, code):
    assert extract_code(answer) == code


@pytest.mark.parametrize(
    ("answer", "steps"),
    [
        ("12 + 5 = 17. 17 - 3 = 14. The answer is 14.", True),
        ("12+5=17. The answer is 17.", True),
        ("Tom is taller than Ann. The answer is Tom.", True),
        ("He has 3.5 left, so\nthe final answer is 3.5.", True),
        ("48/2 = 24 clips\n#### 72", True),
        (r"x = 4, so \boxed{4}", True),
        ("The answer is 22.", False),
        ("So the answer is 3.", False),
        ("Well. The answer is 3.", False),
        ("The answer is 14. The answer is 14.", False),
        ("The answer is 14, because 12 + 2 = 14.", False),
        ("12 + 5 = 17.", False),
        ("", False),
    ],
)
def test_steps_come_before_the_final_answer(answer, steps):
    assert has_steps(answer) is steps


def test_final_answers_are_compared_by_value():
    pairs = [
        ("12 + 5 = 17. The answer is 17.", "17", True),
        ("The answer is 18.", "17", False),
        ("17", "17", False),
        ("The answer is tom.", "Tom", True),
        ("#### 1,000", "1000", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{2}{4}", True),
        ("The answer is Ann.", "Tom", False),
    ]
    answers, references, verdicts = zip(*pairs, strict=True)
    assert grade_rows(answers, [{"answer": reference} for reference in references]) == list(verdicts)
