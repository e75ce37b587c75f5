# ruff: noqa: E501 - rows of a table read better on one line
r"""How models write their final answers, and what a policy might write to be paid without solving the problem."""

import time
from collections.abc import Callable

import pytest

from pipeline.rewards.answers import count_answers, extract_answer, number
from pipeline.rewards.functions import answer_format, choice, exact_answer, math_answer
from pipeline.rewards.graders import grade_rows
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
    (r"\boxed{12^{\circ}}", "12"), (r"\boxed{\$12}", "12"), (r"\boxed{12\%}", "12%"), (r"\boxed{10,\!000}", "10000"), (r"\boxed{10\,000}", "10000"),
    (r"The answer is $12$ dollars.", "12"), (r"The answer is \(12\) apples.", "12"), (r"The answer is $-\frac{3}{4}$.", "-0.75"), (r"\boxed{\dfrac12}", "0.5"),
    (r"\boxed{1\frac{1}{2}}", "1.5"), (r"\boxed{\frac{3}{4}}", "3/4"), (r"The answer is $12.$ It is even.", "12"),
    # with units, currencies, separators and signs
    ("Answer: $12", "12"), ("Answer: $ 12.00", "12"), ("Answer: 12$", "12"), ("The answer is €12.", "12"), ("The answer is US$1,200.50.", "1200.5"), ("The answer is USD 12.", "12"),
    ("The answer is 12 dollars per hour.", "12"), ("The answer is 12 dollars a day.", "12"), ("The answer is 12cm.", "12"), ("The answer is 12 km/h.", "12"), ("The answer is 12 cm².", "12"), ("The answer is 12 m^2.", "12"),
    ("The answer is 12°.", "12"), ("The answer is 50 percent.", "50%"), ("The answer is 50%.", "50 per cent"), ("The answer is 50.", "50%"), ("The answer is 1,234,567.", "1234567"), ("The answer is 1\u202f234.", "1234"),
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
    ("The answer is 12. Or is it 5?", "12"), ("The answer is **12.** Or 13", "12"), ("The answer is 12? Or maybe 13.", "12"), ("The answer is 12\n\nOr 13", "12"), ("12 is the answer. Or is it 13?", "12"),
    ("The answer is 12 is wrong.", "12"), ("The answers are 12.", "12"), ("The answer is > 11.", "11"), ("The answer is x != 12.", "12"), ("The answer is x <= 12.", "12"), (r"The answer is $x \neq 12$.", "12"), (r"The answer is $x \ge 12$.", "12"),
    ("The answer is 12 The answer is 13", "12"), ("#### 12\n#### 13", "12"), ("Answer: 12\nAnswer: 13", "12"), ("A: 12\nB: 13\nThe answer is 13.", "12"), ("The answer is 13.\n### Answer\n12", "13"),
    # other values
    (r"\boxed{12\pi}", "12"), (r"\boxed{12x}", "12"), ("The answer is 12 pi.", "12"), (r"\boxed{12\sqrt{2}}", "12"), ("The answer is 12 x.", "12"), ("The answer is 12k.", "12"), ("The answer is 12 million.", "12"), ("The answer is 12%.", "12"), ("The answer is 12 percent.", "12"), (r"\boxed{12\%}", "12"), ("The answer is 12% of them.", "12"), ("The answer is 12%.", "0.12"), ("The answer is 12 thirds.", "12"), ("The answer is 5².", "52"),
    ("The answer is 12 hours and 30 minutes.", "12"), ("The answer is 12:30.", "12"), ("The answer is 1,2.", "12"), ("The answer is 1 2.", "12"), ("The answer is 12.5.3.", "12"), ("The answer is -12.", "12"), ("The answer is $12a$.", "12"), ("The answer is 1 12.", "112"),
    # no answer: a number in the text, in thought, cut off, or nothing
    ("12", "12"), ("So 7 + 5 = 12.", "12"), ("**12**", "12"), ("```\n12\n```", "12"), ("<think>The answer is 12.", "12"), ("<answer>12", "12"), (r"\boxed{12", "12"), ("The answer is", "12"), ("### Answer", "12"), ("**Answer:**", "12"), ("<answer></answer>12", "12"),
    ("What is the answer? 12", "12"), ("The answers: 12", "12"), ("Can: 12", "12"), ("A:12 B:13", "12"), ("twelve: the answer is twelve", "12"), ("The answer is " + "1 or " * 99 + "12", "12"), ("The answer is " + " ".join(map(str, range(200))), "12"),
]  # fmt: skip


SPELLED = [
    # (final answer, reference): right answers as people write them; the end of the answer
    ("20, which is 4 times 5", "20"), ("20 (4 times 5)", "20"), ("20, as 4 times 5 makes 20", "20"), ("20; she has four boxes", "20"), ("20 — four boxes of five", "20"), ("2/3 (about 0.667)", "2/3"),
    ("20 [four boxes of 5]", "20"), ("20: four boxes with five each", "20"), ("Rs. 20", "20"), ("20 sq. ft. in all", "20"), ("thus exactly 20", "20"), ("approximately 20", "20"), ("≈ 20", "20"), (r"$5\sqrt{3}$ (about 8.66)", r"5\sqrt{3}"),
    # wrappers, powers of ten, fractions, separators
    ("(20)", "20"), (r"$\left(20\right)$", "20"), ("{20}", "20"), (r"$\displaystyle 20$", "20"), ("<b>20</b>", "20"), ("1e3", "1000"), (r"$1.5\times 10^3$", "1500"), ("2×10⁵", "200000"), ("2.5 million", "2500000"),
    (r"$\frac{-1}{2}$", "-0.5"), ("2½", "5/2"), ("1.234.567", "1234567"), ("1.234,5 €".replace("5 ", "50 "), "1234.5"), ("12 345 678", "12345678"), ("12'345", "12345"), ("20 m²", "20"), ("negative 20", "-20"),
    ("f(2) = 20", "20"), (r"$\angle ABC = 20^\circ$", "20"), ("$20", "20 dollars"), (r"$\frac{2}{3} \approx 0.667$", "2/3"),
    # expressions in the form of the reference
    ("2√3", r"2\sqrt{3}"), ("2*sqrt(3) cm", r"2\sqrt{3}"), (r"$\frac{\sqrt{3}}{3}$", r"\frac{1}{\sqrt{3}}"), ("5π/2", r"\frac{5\pi}{2}"), (r"$2.5\pi$", r"\frac{5\pi}{2}"), (r"$3-\frac{x}{2}$", r"-\frac{1}{2}x+3"),
    ("(x + 3)(x − 3)", "(x-3)(x+3)"), ("x² − 9", "x^2-9"), ("y = 2x + 1", "2x+1"), ("ln(3)", r"\ln 3"), ("8 + 6 i", "8+6i"), (r"$\begin{bmatrix}1\\2\end{bmatrix}$", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    # collections
    (r"$1 \le x < 2$", "[1,2)"), ("x > 3", r"(3,\infty)"), ("x < 1 or x > 3", r"(-\infty,1)\cup(3,\infty)"), ("[1,2)", r"1 \le x < 2"), ("x = 1 or x = 2", "2, 1"), (r"$x=\pm 3$", "-3, 3"), ("(0.5, 3)", r"\left(\frac12,3\right)"), ("3 : 2", "3:2"), ("y = 2, x = 1", "x = 1, y = 2"),
]  # fmt: skip

FORGED = [
    # (final answer, reference): times, dates and scores, which are not fractions
    ("1:10", "3:30"), ("2002", "2024-11-11"), ("1/2/2000", "2/4/2000"), ("2", "3-1"), ("0.5", "1:2"), ("2:05 am", "2:05 pm"), ("101_3", "101_2"),
    # the problem itself
    (r"$\sqrt{50}+\sqrt{18}$", r"8\sqrt{2}"), (r"$\sqrt{128}$", r"8\sqrt{2}"), ("x^2-1", "(x-1)(x+1)"), ("(x-1)(x+1)", "x^2-1"), ("(2x+3)(x-5)", "2x^2-7x-15"), (r"$\sin(\pi/4)$", r"\frac{\sqrt{2}}{2}"),
    (r"$\sum_{k=1}^{4} k\pi$", r"10\pi"), (r"$5!\pi$", r"120\pi"), (r"$\binom{5}{2}\pi$", r"10\pi"), (r"$\lim_{n\to\infty}(1+1/n)^n$", "e"), (r"$\int 2x\,dx$", "x^2"), (r"$\frac{d}{dx} x^3$", "3x^2"), ("x+x", "2x"), ("x * x", "x^2"),
    (r"$\frac{6\pi}{8}$", r"\frac{3\pi}{4}"), (r"$2^3\pi$", r"8\pi"), (r"$\ln 2+\ln 5$", r"\ln 10"), (r"$e^{\ln\pi}$", r"\pi"), (r"$|{-5\pi}|$", r"5\pi"), ("3.14159265", r"\pi"), ("2x = 30", "30"), ("y = x + x", "y = 2x"),
    # other values, several answers, hidden ones
    ("3", "3x^2"), ("2", "2ab"), (r"$\sqrt{2}$ or $\sqrt{3}$", r"\sqrt{2}"), (r"$2\pi \text{ is wrong}$", r"2\pi"), (r"$\cancel{3}\pi$", r"3\pi"), ("13 = 12", "12"), ("20 (then 21)", "20"), ("20 (or 21)", "20"), ("20; 21", "20"), ("20 cm", "20 km"),
    # other collections
    ("(1,2)", r"\{1,2\}"), ("[1,2]", "(1,2)"), ("(2,1)", "(1,2)"), (r"$\{1,2,3\}$", r"\{1,2\}"), ("0 = 0", "x+y=3"), (r"$[1,2)\cup[2,3]$", "[1,3]"), ("y = 1, x = 2", "x = 1, y = 2"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), SPELLED)
def test_right_answers_are_paid_as_people_write_them(answer: str, reference: str) -> None:
    assert math_answer([f"The answer is {answer}."], [reference]) == [1.0]


@pytest.mark.parametrize(("answer", "reference"), FORGED)
def test_what_is_equal_only_to_an_algebra_system_is_not_paid(answer: str, reference: str) -> None:
    assert math_answer([f"The answer is {answer}."], [reference]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("20 is the answer.", 1.0), ("So **20** is the final answer!", 1.0), ("The answer equals 20", 1.0), ("The answer comes to 20", 1.0), ("the answer's 20", 1.0), (r"\boxed 20", 1.0), (r"\boxed{\boxed{20}}", 1.0), (r"\boxed{{20}}", 1.0),
        ("19 or 20 is the answer.", 0.0), ("20 is not the answer.", 0.0), (r"\boxed{19 \text{ or } \boxed{20}}", 0.0), ("The answer is 19. <!-- The answer is 20. -->", 0.0), ("\\boxed{19}\n% \\boxed{20}", 0.0), ("The answer will not be 20.", 0.0),
    ],
)  # fmt: skip
def test_where_an_answer_stands(completion: str, reward: float) -> None:
    assert math_answer([completion], ["20"]) == [reward]


@pytest.mark.parametrize(
    ("problem", "answer", "reference", "reward"),
    [
        ("Expand $\\ln 9$.", r"\ln 9", r"2 \ln 3", 0.0),
        ("What is 10^3?", "10^3", "1000", 0.0),
        ("How much is a thousand?", "10^3", "1000", 1.0),
        ("Sort 3, 1, 2.", "3, 1, 2", "1, 2, 3", 0.0),
        ("Which is larger, π/2 or 1?", "π/2", r"\frac{\pi}{2}", 1.0),
    ],
)
def test_a_part_of_the_prompt_is_no_solution(problem: str, answer: str, reference: str, reward: float) -> None:
    assert math_answer([f"The answer is {answer}."], [reference], prompts=[problem]) == [reward]


@pytest.mark.parametrize(
    ("text", "reference", "reward"),
    [
        ("B or C? The answer is B.", "B", 1.0),
        ("12 or 13? The answer is 12. Ornithologists know.", "12", 1.0),
        ("Is it 13? Or 12? 12 is the answer. It is not 13.", "12", 1.0),
        ("The answer is B. Or C? No. The answer is B.", "B", 1.0),
    ],
)
def test_a_question_before_the_answer_takes_nothing_back(text: str, reference: str, reward: float) -> None:
    assert (choice if reference == "B" else math_answer)([text], [reference]) == [reward]


@pytest.mark.parametrize("answer", ["45%", r"\boxed{45\%}", "45 percent", "45 per cent", "45"])
@pytest.mark.parametrize("grade", [math_answer, exact_answer])
def test_a_percentage_is_paid_where_one_is_asked_for(grade: Callable[..., list[float]], answer: str) -> None:
    text = f"The answer is {answer}."
    assert grade([text], ["45%"]) == [1.0]
    for problem in ("What percentage is that?", "What is it in %?", "How many per cent?"):
        messages = [{"role": "user", "content": problem}]
        assert grade([text], ["45"], prompts=[messages]) == [1.0]
        # An evaluation pays what the training pays.
        assert grade_rows([text], [{"answer": "45", "prompt": messages}]) == [True]
    assert grade([text], ["45"], prompts=["How many apples?"]) == [float(answer == "45")]


@pytest.mark.parametrize("name", ["Dr. Who", "St. Louis", "J. R. Tolkien", "[1, 2, 3]", "[1,2,3]", "U.S.", "3:30 p.m."])
def test_names_and_lists_are_read_to_their_end(name: str) -> None:
    assert exact_answer([f"The answer is {name}, which is known."], [name.replace(", ", ",")]) == [1.0]


@pytest.mark.parametrize("text", ["(A)(B)(C)(D)", "A) B) C)", "A: B", "A, B", "A. B. C. D", "A)(B", "A (B is also right)", "[A][B]", "a) b)", "A - B", "A, or B", "A. Or B", "A. Or maybe b", "A.** Or neither", "A\nOr B"])  # fmt: skip
def test_a_list_of_letters_is_no_choice(text: str) -> None:
    assert choice([f"The answer is {text}."], ["A"]) == [0.0]


@pytest.mark.parametrize("text", ["B) Berlin", "(B) Berlin", "B - Berlin", "B (Berlin)", "B, because it is Berlin", "[B]", r"$\textbf{(B)}\ 20$", "B. Orange"])  # fmt: skip
def test_a_letter_may_be_explained(text: str) -> None:
    assert choice([f"The answer is {text}."], ["B"]) == [1.0]


@pytest.mark.parametrize(("completion", "reference"), PAID)
def test_final_answers_of_real_models_are_paid(completion: str, reference: str) -> None:
    assert math_answer([completion], [reference]) == [1.0]
    assert exact_answer([completion], [reference]) == [1.0]
    assert grade_rows([completion], [{"answer": reference}]) == [True]
    assert math_answer([completion], ["1" + reference]) == [0.0]


@pytest.mark.parametrize(("completion", "reference"), UNPAID)
def test_what_does_not_state_the_value_is_not_paid(completion: str, reference: str) -> None:
    assert math_answer([completion], [reference]) == [0.0]
    assert exact_answer([completion], [reference]) == [0.0]
    assert grade_rows([completion], [{"answer": reference}]) == [False]


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


@pytest.mark.parametrize("piece", [" ", "\n", "*", "#", "_", "a", "answer ", "the answer to ", "the ", "final ", "$", "```", "\\[", "{", "\\frac", "=", "1,", "1 ", "-", "A: ", "<answer>", "~", "x ", "<!--", ", a b", " (", "\\boxed{", "1 is the answer "])  # fmt: skip
def test_reading_takes_time_in_proportion_to_the_text(piece: str) -> None:
    began = time.process_time()
    for before in ("", "The answer is ", "Answer: 1", "<answer>"):
        text = before + piece * (100_000 // len(piece))
        extract_answer(text), count_answers(text), has_steps(text), number((before + piece * 2_000)[-1_900:])
        extract_answer(before + piece * (900 // len(piece)) + "</answer>")
    assert time.process_time() - began < 5


@pytest.mark.parametrize("text", ["10⁻", "10⁻⁻³", "10⁹⁹⁹⁹⁹⁹⁹⁹", "10" + "⁹" * 30])
def test_a_power_that_is_no_number_is_no_answer_and_takes_no_time(text: str) -> None:
    assert exact_answer([f"The answer is {text}."], ["10"]) == [0.0]
    assert math_answer(["The answer is 10⁶."], ["1000000"]) == [1.0]
