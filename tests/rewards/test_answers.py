# ruff: noqa: E501 - rows of a table read better on one line
r"""How models write their final answers, and what a policy might write to be paid without solving the problem."""

from __future__ import annotations

import time

import pytest

from pipeline.evaluation.metrics import grade_final_answers
from pipeline.rewards.answers import count_answers, extract_answer, number
from pipeline.rewards.functions import answer_format, choice, exact_answer, math_answer
from pipeline.rewards.grading import has_steps

PAID = [
    # (completion, reference): announced in the ways of real models
    ("**Answer:** 12", "12"), ("**Answer**: 12", "12"), ("**Answer: 12**", "12"), ("**Answer:** **12**", "12"),
    ("**Final answer:** 12", "12"), ("**Final Answer**\n\n12", "12"), ("### Answer\n12", "12"), ("#### Answer\n\n12.", "12"),
    ("## Final Answer:\n**12**", "12"), ("### Answer: 12", "12"), ("#### 12", "12"), ("####12 apples", "12"),
    ("<answer>12</answer>", "12"), ("<think>7 + 5</think>\n<answer>\n12\n</answer>", "12"), ("<answer>The answer is 12.</answer>", "12"),
    ("The correct answer is 12.", "12"), ("My final answer is 12.", "12"), ("Answer is 12", "12"), ("The final numerical answer is: 12", "12"),
    ("Therefore, the answer is therefore 12.", "12"), ("So the answer must be 12!", "12"), ("The answer to the question is 12.", "12"),
    ("Answer = 12", "12"), ("Ans: 12", "12"), ("A: 12", "12"), ("Q: What is 7 + 5?\nA: 12\n", "12"), ("ANSWER:\n\n12", "12"),
    ("_Answer:_ 12", "12"), ("Answer:\n```\n12\n```", "12"), ("Answer: `12`", "12"), ("The answer is:\n\n\\[\n12\n\\]\n", "12"), ("The answer is\n$$12$$.", "12"),
    ("The answer is \"12\".", "12"), ("The answer is 12, because 7 + 5 = 12.", "12"), ("The answer is **12** apples.", "12"),
    ("The answer is 13. Wait, that is wrong: the answer is 12.", "12"),
    ("Final Answer: The final answer is $12$. I hope it is correct.", "12"),
    # in LaTeX
    (r"\boxed{12}", "12"), (r"$\boxed{12}$.", "12"), (r"\[ \boxed{ 12 } \]", "12"), (r"\fbox{12}", "12"), (r"\boxed{\text{12}}", "12"),
    (r"\boxed{x = 12}", "12"), (r"\boxed{12\text{ apples}}", "12"), (r"\boxed{12\,\mathrm{cm}^2}", "12"), (r"\boxed{12^\circ}", "12"),
    (r"\boxed{12^{\circ}}", "12"), (r"\boxed{\$12}", "12"), (r"\boxed{12\%}", "12"), (r"\boxed{10,\!000}", "10000"), (r"\boxed{10\,000}", "10000"),
    (r"The answer is $12$ dollars.", "12"), (r"The answer is \(12\) apples.", "12"), (r"The answer is $-\frac{3}{4}$.", "-0.75"), (r"\boxed{\dfrac12}", "0.5"),
    (r"\boxed{1\frac{1}{2}}", "1.5"), (r"\boxed{\frac{3}{4}}", "3/4"), (r"The answer is $12.$ It is even.", "12"),
    # with units, currencies, separators and signs
    ("Answer: $12", "12"), ("Answer: $ 12.00", "12"), ("Answer: 12$", "12"), ("The answer is €12.", "12"), ("The answer is US$1,200.50.", "1200.5"), ("The answer is USD 12.", "12"),
    ("The answer is 12 dollars per hour.", "12"), ("The answer is 12 dollars a day.", "12"), ("The answer is 12cm.", "12"), ("The answer is 12 km/h.", "12"), ("The answer is 12 cm².", "12"), ("The answer is 12 m^2.", "12"),
    ("The answer is 12°.", "12"), ("The answer is 50 percent.", "50"), ("The answer is 50%.", "50"), ("The answer is 50.", "50%"), ("The answer is 1,234,567.", "1234567"), ("The answer is 1\u202f234.", "1234"),
    ("The answer is \u221212.", "-12"), ("The answer is –12.", "-12"), ("The answer is -$12.", "-12"), ("The answer is $-12.", "-12"), ("The answer is - 12.", "-12"), ("The answer is +12.", "12"),
    ("The answer is 3/4.", "0.75"), ("The answer is 1 1/2.", "1.5"), ("The answer is .5.", "1/2"), ("The answer is 12.0.", "12"), ("The answer is 012.", "12"),
    ("The answer is 7 + 5 = 12.", "12"), ("The answer is 3*4 = 6+6 = 12 apples.", "12"), ("#### 2 \\times 6 = \\$12", "12"), ("The answer is A = 12 m.", "12"),
]  # fmt: skip

UNPAID = [
    # unsolved sums
    ("The answer is 14+5-3+4.", "20"), ("#### 48 + 24", "72"), (r"\boxed{48+24}", "72"), ("The answer is 6 * 12.", "72"), (r"\boxed{6 \times 12}", "72"), (r"\boxed{6 \cdot 12}", "72"),
    ("The answer is 144/2.", "72"), (r"\boxed{\frac{144}{2}}", "72"), ("The answer is 144 ÷ 2.", "72"), ("The answer is 72/1.", "72"), ("The answer is 6/8.", "0.75"), ("The answer is 1.5/2.", "0.75"),
    (r"\boxed{\sqrt{144}}", "12"), (r"\boxed{2^{3}}", "8"), ("The answer is 2**3.", "8"), ("The answer is 2^3.", "8"), ("The answer is 4!/2.", "12"), (r"\boxed{|-12|}", "12"), ("The answer is (12).", "13"), ("The answer is -(-12).", "12"),
    (r"\boxed{\binom{4}{2}}", "6"), (r"\boxed{1200\%}", "12"), ("The answer is 1.2e1.", "12"), ("The answer is 0xC.", "12"), ("The answer is 2 dozen.", "24"), ("The answer is 3 squared.", "9"),
    ("The answer is 12 + 0.", "12"), ("The answer is 3 less than 15.", "12"), ("The answer is 12 = 7 + 5.", "12"), ("The answer is 20 = 14 + 5 - 3 + 4.", "20"), ("The answer is x = 7 + 5.", "12"),
    # several answers, hedges and denials
    ("The answer is 12 or 13.", "12"), ("The answer is 12 or 13.", "13"), ("The answer is either 12 or 13.", "12"), ("The answer is 11, 12, 13.", "12"), ("The answer is 11, 12, 13.", "13"),
    ("The answer is 12 and 13.", "13"), ("The answer is 12/13.", "12"), ("The answer is 12-13.", "12"), ("The answer is between 11 and 13.", "12"), ("The answer is 12 ± 1.", "12"), ("The answer is 12 (or 13).", "12"),
    (r"\boxed{12, 13}", "13"), (r"\boxed{x = 11, x = 12}", "12"), (r"\boxed{x = 11 \text{ or } x = 12}", "12"), (r"\boxed{\{11, 12\}}", "12"), (r"\boxed{12}, or \boxed{13}", "12"), ("<answer>11\n12</answer>", "12"), ("<answer>12</answer><answer>13</answer>", "12"),
    ("The answer is $11$ or $12$.", "12"), ("The answer is:\n\\[11\\] or \\[12\\]\n", "12"), ("The answer is 12 maybe.", "12"), ("The answer is probably 12.", "12"), ("The answer is not 12.", "12"), ("The answer is not 12 but 13.", "12"), ("The answer isn't 12.", "12"),
    ("The answer is 12 is wrong.", "12"), ("The answers are 12.", "12"), ("The answer is > 11.", "11"), ("The answer is x != 12.", "12"), ("The answer is x <= 12.", "12"), (r"The answer is $x \neq 12$.", "12"), (r"The answer is $x \ge 12$.", "12"),
    ("The answer is 12 The answer is 13", "12"), ("#### 12\n#### 13", "12"), ("Answer: 12\nAnswer: 13", "12"), ("A: 12\nB: 13\nThe answer is 13.", "12"), ("The answer is 13.\n### Answer\n12", "13"),
    # other values
    (r"\boxed{12\pi}", "12"), (r"\boxed{12x}", "12"), ("The answer is 12 pi.", "12"), (r"\boxed{12\sqrt{2}}", "12"), ("The answer is 12 x.", "12"), ("The answer is 12k.", "12"), ("The answer is 12 million.", "12"), ("The answer is 12 thirds.", "12"), ("The answer is 5².", "52"),
    ("The answer is 12 hours and 30 minutes.", "12"), ("The answer is 12:30.", "12"), ("The answer is 1,2.", "12"), ("The answer is 1 2.", "12"), ("The answer is 12.5.3.", "12"), ("The answer is -12.", "12"), ("The answer is $12a$.", "12"), ("The answer is 1 12.", "112"),
    # no answer: a number in the text, in thought, cut off, or nothing
    ("12", "12"), ("So 7 + 5 = 12.", "12"), ("**12**", "12"), ("```\n12\n```", "12"), ("<think>The answer is 12.", "12"), ("<answer>12", "12"), (r"\boxed{12", "12"), ("The answer is", "12"), ("### Answer", "12"), ("**Answer:**", "12"), ("<answer></answer>12", "12"),
    ("What is the answer? 12", "12"), ("The answers: 12", "12"), ("Can: 12", "12"), ("A:12 B:13", "12"), ("twelve: the answer is twelve", "12"), ("The answer is " + "1 or " * 99 + "12", "12"), ("The answer is " + " ".join(map(str, range(200))), "12"),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "reference"), PAID)
def test_final_answers_of_real_models_are_paid(completion: str, reference: str) -> None:
    assert math_answer([completion], [reference]) == [1.0]
    assert exact_answer([completion], [reference]) == [1.0]
    assert grade_final_answers([completion], [reference]) == [True]
    assert math_answer([completion], ["1" + reference]) == [0.0]


@pytest.mark.parametrize(("completion", "reference"), UNPAID)
def test_what_does_not_state_the_value_is_not_paid(completion: str, reference: str) -> None:
    assert math_answer([completion], [reference]) == [0.0]
    assert exact_answer([completion], [reference]) == [0.0]
    assert grade_final_answers([completion], [reference]) == [False]


@pytest.mark.parametrize(
    "text",
    [
        "**Answer:** Ann", "**Final Answer**\nAnn.", "### Answer\n\nAnn", "<answer>Ann</answer>", "The correct answer is Ann.", "A: Ann", "#### Ann",
        "The answer is Ann, because she is tallest.", r"\boxed{\text{Ann}}", "Answer: `Ann`",
    ],
)  # fmt: skip
def test_words_are_read_as_numbers_are(text: str) -> None:
    assert exact_answer([text], ["Ann"]) == [1.0] and exact_answer([text], ["Bob"]) == [0.0]


@pytest.mark.parametrize("text", ["**Answer:** B", "<answer>B</answer>", "### Answer\nB", "The correct answer is (B).", r"\boxed{\text{B}}", "A: 5\nB: 6\nAnswer: B"])  # fmt: skip
def test_letters_are_read_as_numbers_are(text: str) -> None:
    assert choice([text] * 3, ["B", "B: 6", "A"]) == [1.0, 1.0, 0.0]


def test_an_answer_that_is_announced_twice_is_one_answer() -> None:
    once = [
        "**Final Answer**\n\nThe final answer is $\\boxed{12}$.", "#### Answer: 12", "<answer>\\boxed{12}</answer>", "<answer>The answer is 12.</answer>", "**Answer:** The answer is 12.",
    ]  # fmt: skip
    twice = [
        "The answer is 12.\n#### 12",
        "Answer: 12\nAnswer: 12",
        "\\boxed{12} \\boxed{12}",
        "A: 12\nB: 13\nThe answer is 12.",
    ]
    assert [count_answers(text) for text in once] == [1] * len(once)
    assert answer_format(once + twice) == [1.0] * len(once) + [0.0] * len(twice)


def test_steps_end_where_the_answer_is_announced() -> None:
    for announced in (
        "**Answer:** 12",
        "### Answer\n12",
        "<answer>12</answer>",
        "The correct answer is 12.",
        "So the final answer is 12.",
    ):
        assert not has_steps(announced), announced
        assert has_steps(f"7 + 5 = 12.\n{announced}"), announced


@pytest.mark.parametrize("piece", [" ", "\n", "*", "#", "_", "a", "answer ", "the answer to ", "the ", "final ", "$", "```", "\\[", "{", "\\frac", "=", "1,", "1 ", "-", "A: ", "<answer>", "~", "x "])  # fmt: skip
def test_reading_takes_time_in_proportion_to_the_text(piece: str) -> None:
    began = time.process_time()
    for before in ("", "The answer is ", "Answer: 1", "<answer>"):
        text = before + piece * (100_000 // len(piece))
        extract_answer(text), count_answers(text), has_steps(text), number((before + piece * 2_000)[-1_900:])
        extract_answer(before + piece * (900 // len(piece)) + "</answer>")
    assert time.process_time() - began < 5
