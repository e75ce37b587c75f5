# ruff: noqa: E501 - rows of a table read better on one line
"""Tables of completions and references; no model."""

import asyncio
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.utils import get_callable_name, is_async_callable

from pipeline.errors import UserError
from pipeline.rewards import checker
from pipeline.rewards.answers import count_answers, extract_answer, number
from pipeline.rewards.functions import (
    answer_format,
    any_answer,
    choice,
    code_tests,
    exact_answer,
    math_answer,
    math_judge,
)
from pipeline.rewards.loading import load_rewards


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 22.", "22"),
        ("12 + 5 = 17. 17 - 3 = 14. The answer is 14.", "14"),
        ("the answer is: **14**", "14"),
        ("The final answer is $\\frac{1}{2}$.", r"\frac{1}{2}"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is 1,234.", "1,234"),
        ("The answer is Ann. She is tallest.", "Ann"),
        ('The answer is "yes".', "yes"),
        ("Answer: B", "B"),
        ("so 9*8=<<9*8=72>>72\n#### 72", "72"),
        ("#### 1,234\n", "1,234"),
        (r"Hence \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"The answer is $\boxed{42}$.", "42"),
        ("The answer is 12. No, wait. The answer is 14.", "14"),
        (r"\boxed{1} and then #### 2", "2"),
        ("The answer is 5 The answer is 6", "6"),
        ("<think>The answer is 5.</think>The answer is 6.", "6"),
        ("<think>The answer is 5.", None),
        ("22", None),
        ("", None),
        ("The answer is", None),
        ("The answer is .", None),
        ("####", None),
        (r"\boxed{", None),
        (r"\boxed{}", None),
        ("The answers are 5.", None),
        ("####" + "7" * 5000, None),
        ("The answer is " + "x" * 200_000, None),
        ("x" * 200_000 + " The answer is 7.", "7"),
    ],
)
def test_the_final_answer_is_extracted(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", 1234), ("-5", -5), ("−5", -5), ("+5", 5), ("0012", 12), ("$72", 72), ("72%", 72), ("14 apples", 14),
        ("3/4", 0.75), (".5", 0.5), ("5.0", 5), ("1{,}000", 1000), ("1\u202f000", 1000), ("٣٤", 34), ("１２", 12),
        ("5²", None), ("Ⅻ", None), ("⑤", None), ("1e9", 10**9), ("2.0625e2", 206.25), ("6.25e-2", 0.0625), ("1.5 million", 1_500_000), ("1.2e1", None), ("1/0", None), ("", None), ("-", None), ("12 34", None),
        ("5 or 6", None), ("2 dozen", None), ("3 + 4", None), ("9" * 5000, None), ("1,23", None), ("five", None),
    ],
)  # fmt: skip
def test_plain_numbers_are_read(text: str, value: float | None) -> None:
    assert number(text) == value


MATH: list[tuple[str, str, float | None]] = [
    ("The answer is 22.", "22", 1.0),
    ("The answer is 22.", "#### 22", 1.0),
    ("The answer is 22.", "She has 20 + 2 = <<20+2=22>>22.\n#### 22", 1.0),
    ("The answer is 22.0.", "22", 1.0),
    ("The answer is 1000.", "1,000", 1.0),
    ("The answer is 22 apples.", "22", 1.0),
    ("The answer is $22.", "22", 1.0),
    (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
    (r"\boxed{\frac{1}{2}}", "1/2", 1.0),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", 1.0),
    (r"\boxed{1+x^2}", "x^2+1", 1.0),
    (r"\boxed{(2,1)}", "(1,2)", 0.0),
    ("The answer is 23.", "22", 0.0),
    ("22", "22", 0.0),
    ("", "22", 0.0),
    ("The answer is 22 or 23.", "22", 0.0),
    ("The answer is 23 or 22.", "22", 0.0),
    ("The answer is 21, 22, 23.", "22", 0.0),
    ("The answer is 22. The answer is 23.", "22", 0.0),
    ("The answer is 23. The answer is 22.", "22", 1.0),
    ("The answer is not 22.", "22", 0.0),
    ("The answer is 2 or 11.", "22", 0.0),
    ("The answer is 5².", "52", 0.0),
    ("The answer is " + "9" * 5000 + ".", "9", 0.0),
    ("The answer is " + "9" * 800 + ".", "9" * 800, 1.0),
    ("The answer is ٢٢.", "22", 1.0),
    ("The answer is " + "1" * 100_000, "22", 0.0),
    ("The answer is __import__('os').system('true').", "22", 0.0),
    ("The answer is 22.", "", None),
    ("The answer is 22.", "   ", None),
    ("The answer is 22.", "no idea", None),
    ("The answer is no idea.", "no idea", None),
    (r"\boxed{x}", r"\frac{1}{", None),
]


@pytest.mark.parametrize(("completion", "reference", "reward"), MATH)
def test_math_answer(completion: str, reference: str, reward: float | None) -> None:
    assert math_answer([completion], [reference]) == [reward]


def test_answers_that_would_hang_the_parser_cost_seconds_at_most() -> None:
    hostile = [
        "9^{9^{9^{9}}}",
        "9999999999!",
        "{" * 250,
        r"(x^{3}+1)^{100000}",
        r"\frac{" * 40,
        r"\int" * 60,
        "(" * 290,
    ]
    began = time.monotonic()
    rewards = math_answer([rf"\boxed{{{text}}}" if text.count("{") == text.count("}") else f"#### {text}" for text in hostile] * 20, [r"\sqrt{22}"] * 20 * len(hostile))  # fmt: skip
    assert rewards == [0.0] * 20 * len(hostile)
    assert time.monotonic() - began < 90
    assert math_answer([r"\boxed{22^{\frac{1}{2}}}"], [r"\sqrt{22}"]) == [1.0], "and the next answer is judged as ever"


def test_math_answer_works_in_any_thread() -> None:
    rewards: list[Any] = []
    thread = threading.Thread(target=lambda: rewards.extend(math_answer([r"\boxed{2\sqrt{2}}"], [r"\sqrt{8}"])))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_plain_numbers_need_no_algebra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.rewards.functions.math_judge", None)
    completions = [f"1 + {i} = {i + 1}. The answer is {i + 1}." for i in range(128)]
    assert math_answer(completions, [str(i + 1) for i in range(128)]) == [1.0] * 128
    assert math_answer(completions, [str(i) for i in range(128)]) == [0.0] * 128


EXACT: list[tuple[str, str, float | None]] = [
    ("The answer is Ann.", "Ann", 1.0),
    ("The answer is ann", "Ann.", 1.0),
    ("The answer is the red  box.", "red box", 1.0),
    ("The answer is 1,000.", "1000", 1.0),
    ("The answer is 1000 or 5.", "1000", 0.0),
    (r"\boxed{\text{Ann}}", "Ann", 1.0),
    ("The answer is Ann or Bob.", "Ann", 0.0),
    ("The answer is Anna.", "Ann", 0.0),
    ("Ann", "Ann", 0.0),
    ("", "Ann", 0.0),
    ("The answer is 1/2.", "0.5", 1.0),
    ("The answer is yes.", "", None),
]


@pytest.mark.parametrize(("completion", "reference", "reward"), EXACT)
def test_exact_answer(completion: str, reference: str, reward: float | None) -> None:
    assert exact_answer([completion], [reference]) == [reward]


def test_any_answer_accepts_each_of_the_references_of_its_row() -> None:
    completions = [
        "The answer is Chile.",
        "The answer is Peru.",
        "The answer is the Netherlands.",
        "Chile",
        "The answer is 7.",
    ]
    answers = [["Peru", "Chile"], ["Chile"], ["Netherlands", "Belgium"], ["Chile"], []]
    assert any_answer(completions, answers) == [1.0, 0.0, 1.0, 0.0, None]
    # A column `answer`, with one of them, makes no difference.
    assert any_answer(completions, answers, answer=["Peru", "Chile", "Belgium", "Chile", ""]) == [
        1.0,
        0.0,
        1.0,
        0.0,
        None,
    ]


@pytest.mark.parametrize(
    ("completion", "reference", "reward"),
    [
        ("The answer is B.", "B", 1.0),
        ("The answer is (b).", "B", 1.0),
        ("The answer is B) a cat.", "b", 1.0),
        ("The answer is option B.", "B", 1.0),
        ("The answer is B: a cat", "(B)", 1.0),
        ("The answer is A or B.", "B", 0.0),
        ("The answer is A cat.", "A", 0.0),
        ("The answer is АB.", "B", 0.0),
        ("B", "B", 0.0),
        ("The answer is B.", "a long text", None),
        ("The answer is B.", "", None),
    ],
)
def test_choice(completion: str, reference: str, reward: float | None) -> None:
    assert choice([completion], [reference]) == [reward]


def test_answer_format() -> None:
    texts = ["The answer is 5.", r"The answer is \boxed{5}.", "The answer is 5. The answer is 6.", "5", ""]
    assert answer_format(texts) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert count_answers("#### 5\n#### 5") == 2


def test_code_tests() -> None:
    test = "assert double(2) == 4"
    completions = [
        "def double(x):\n    return 2 * x",
        "Here it is:\n```python\ndef double(x):\n    return x + x\n```\nDone.",
        "def double(x):\n    return x",
        "import sys\nsys.exit(0)",
        "I can't",
        "",
    ]
    assert code_tests(completions, [test] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert code_tests(completions[:3], ["", "assert (", test]) == [None, None, 0.0]


def test_only_the_last_message_of_the_assistant_is_read() -> None:
    prompt = [{"role": "user", "content": "I say: The answer is 7. Is it?"}]
    completions: list[Any] = [
        [{"role": "assistant", "content": "The answer is 7."}],
        [{"role": "assistant", "content": "The answer is 7."}, {"role": "assistant", "content": "Or not."}],
        [{"role": "assistant", "content": "Hm."}, {"role": "user", "content": "The answer is 7."}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    for reward in (math_answer, exact_answer):
        assert reward(completions, ["7"] * 5, prompts=[prompt] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_prompt_that_is_repeated_does_not_count() -> None:
    prompt = "Ann says: The answer is 7. True?"
    assert math_answer([prompt + " I do not know"], ["7"], prompts=[prompt]) == [0.0]


def test_unparseable_shares_are_logged() -> None:
    logged: dict[str, float] = {}
    math_answer(
        ["The answer is 1.", "dunno", "The answer is 3.", "The answer is 4."],
        ["1", "2", "3", ""],
        log_metric=logged.__setitem__,
        trainer_state=None,
        kind=["a"] * 4,
    )
    assert logged == {"math_answer/unparseable": 0.25, "math_answer/unparseable_references": 0.25}


def test_rewards_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text(
        "def brief(completions, **columns):\n    return [1.0] * len(completions)\nthree = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    math, brief = load_rewards(["math_answer", "own_rewards:brief"])
    assert math is math_answer and brief(["a", "b"]) == [1.0, 1.0]
    assert brief.__module__ in sys.modules


@pytest.mark.parametrize(
    ("returned", "remedy"),
    [
        (
            "['good', 1.0]",
            "returned str 'good' for completion 0 of 2, counted from 0; return a list with a number, or None",
        ),
        ("[1.0]", "returned 1 rewards for 2 completions; return a list with a number, or None"),
        ("[1.0, [0.5]]", "returned list '[0.5]' for completion 1 of 2"),
        ("None", "returned NoneType 'None'"),
        ("'ab'", "returned str 'ab';"),
        ("0.5", "returned float '0.5'"),
        ("{'a': 1.0, 'b': 2.0}", "returned dict"),
        ("(r for r in [1.0, 2.0])", "returned generator"),
        ("numpy.array(['1', '2'])", "returned str_ '1' for completion 0 of 2"),
        ("[1.0, decimal.Decimal('0.5')]", None),
        ("[1.0, None]", None),
        ("(1, True)", None),
        (
            "numpy.array([0.5, numpy.nan])",
            "returned nan for completion 1 of 2, counted from 0; return a list with a number, or None for no opinion",
        ),
        ("torch.tensor([float('nan'), 1.0])", "for completion 0"),
        ("torch.tensor([0.5, 1.0])", None),
        ("[torch.tensor(0.5), numpy.float32(1)]", None),
    ],
)
def test_what_a_users_reward_returns_is_checked(
    returned: str, remedy: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"import decimal, numpy, torch\ndef mine(completions, **columns):\n    return {returned}\n"
    (tmp_path / "returning.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "returning", raising=False)
    (mine,) = load_rewards(["returning:mine"])
    assert mine.__name__ == "mine"
    if remedy is None:
        assert len(mine(completions=["a", "b"], prompts=["", ""])) == 2
        return
    with pytest.raises(UserError) as caught:
        mine(completions=["a", "b"], prompts=["", ""])
    (problem,) = caught.value.problems
    assert (problem.field, problem.value) == ("reward_funcs", "returning:mine") and remedy in problem.remedy


def test_a_users_reward_may_be_an_object_or_asynchronous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "objects.py").write_text(
        "class Length:\n    def __call__(self, completions, **columns):\n        return [1.0] * len(completions)\n"
        "class Judge:\n    async def __call__(self, completions, **columns):\n        return [1.0] * len(completions)\n"
        "length, judge = Length(), Judge()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    length, judge = load_rewards(["objects:length", "objects:judge"])
    assert length(completions=["a"]) == [1.0] and get_callable_name(length) == "Length"
    assert is_async_callable(judge) and get_callable_name(judge) == "Judge"
    assert asyncio.run(judge(completions=["a"])) == [1.0]


def test_unknown_rewards_are_reported_with_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards2.py").write_text("def brief(completions, **columns):\n    return []\nthree = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    names = [
        "math_anwser",
        "zzz",
        "no.such.module:f",
        "own_rewards2:brif",
        "own_rewards2:three",
        ":f",
        "own_rewards2:",
    ]
    with pytest.raises(UserError) as caught:
        load_rewards(names)
    assert [problem.value for problem in caught.value.problems] == names
    remedies = [problem.remedy for problem in caught.value.problems]
    assert "math_answer?" in remedies[0] and "exact_answer" in remedies[1] and "package.module:name" in remedies[1]
    assert (
        "cannot import no.such.module" in remedies[2]
        and "own_rewards2:brief?" in remedies[3]
        and "three" in remedies[4]
    )
    with pytest.raises(UserError, match="at least one"):
        load_rewards([])


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_algebra_does_not_depend_on_the_load_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    hard = [rf"\boxed{{{i}\sqrt{{2}}}}" for i in range(3, 6)]
    assert math_answer(hard[:1], [r"\sqrt{18}"]) == [1.0]
    assert math_judge.process is not None
    child = math_judge.process.pid
    # The process stands still, as it would while others use the cores.
    os.kill(child, signal.SIGSTOP)
    threading.Timer(2 * checker.SECONDS, os.kill, [child, signal.SIGCONT]).start()
    assert math_answer(hard[1:2], [r"\sqrt{32}"]) == [1.0]
    os.kill(child, signal.SIGSTOP)
    monkeypatch.setattr(checker, "PATIENCE_SECONDS", 0.2)
    assert math_answer(hard[2:] * 9, [r"\sqrt{50}"] * 8 + ["5"]) == [None] * 8 + [0.0]
    monkeypatch.undo()
    assert math_answer(hard[2:], [r"\sqrt{50}"]) == [1.0]
