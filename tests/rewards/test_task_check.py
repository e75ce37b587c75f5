"""The reward by the verifiers of reasoning-gym: what they pay, and answers that are written for them."""

import json
import time
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.rewards import loading
from pipeline.rewards.functions import reasoning_gym
from pipeline.rewards.loading import load_rewards

SUM = {"answer": "17", "metadata": "{}", "kind": "chain_sum"}
COUNTDOWN = {"answer": "1 + 2", "metadata": json.dumps({"numbers": [1, 2], "target": 3}), "kind": "countdown"}
INSERTION = {"answer": "ABCDA", "metadata": "{}", "kind": "string_insertion"}


def score(row: dict[str, str], *completions: str, **options: Any) -> list[float | None]:
    columns: dict[str, Any] = {name: [value] * len(completions) for name, value in row.items()}
    return reasoning_gym(list(completions), **columns, **options)


def test_the_reward_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'fourstage\[reasoning\]'"):
        load_rewards(["reasoning_gym"])


class TestWithReasoningGym:
    @pytest.fixture(autouse=True, scope="class")
    def installed(self) -> None:
        pytest.importorskip("reasoning_gym")

    def test_verifiers_judge_the_final_answer(self) -> None:
        logged: dict[str, float] = {}
        texts = ("9+8=17. The answer is 17.", "<answer> 17.0\n</answer>", r"\boxed{17}", "17", "The answer is 18.")
        assert score(SUM, *texts, log_metric=logged.__setitem__) == [1.0, 1.0, 1.0, 0.0, 0.0]
        assert logged == {"reasoning_gym/unparseable": 0.2, "reasoning_gym/unparseable_references": 0.0}

    def test_what_a_task_pays_for_trying_is_below_1(self) -> None:
        (wrong,) = score(COUNTDOWN, "The answer is 1 * 2.")
        assert wrong is not None and 0.0 < wrong < 1.0
        assert score(COUNTDOWN, "I do not know.", "The answer is 2 + 1.") == [0.0, 1.0]

    @pytest.mark.parametrize("kind", ["chain_sum", "leg_counting", "simple_equations"])
    def test_the_digits_of_the_right_number_earn_nothing_in_another_one(self, kind: str) -> None:
        wrong = [f"The answer is {number}." for number in ("-4", "14", "40", "4.5")]
        assert score({**SUM, "answer": "4", "kind": kind}, *wrong, "The answer is 4.") == [0.0] * 4 + [1.0]

    def test_an_answer_in_tags_keeps_quotes_and_lines(self) -> None:
        board = {"answer": '"a"\n"b"', "metadata": "{}", "kind": "rotten_oranges"}
        assert score(board, '<answer>"a"\n"b"</answer>') == [1.0]

    def test_rows_that_cannot_be_read_teach_nothing(self) -> None:
        rows = ({**SUM, "kind": "no_task"}, {**SUM, "metadata": "{"}, {**SUM, "metadata": "[]"})
        assert [score(row, "The answer is 17.") for row in rows] == [[None]] * 3

    @pytest.mark.parametrize(
        "program",
        ["entry['answer']", "oracle_answer", "print('1.0')", "[c for c in answer.__class__()]", "(lambda: entry)()"],
    )
    def test_an_answer_is_never_run_as_a_program(self, program: str) -> None:
        refused = score(INSERTION, f"<answer>{program}</answer>")
        assert refused == score(INSERTION, "<answer>wrong</answer>")
        assert score(INSERTION, "<answer>['A', 'B', 'C', 'D', 'A']</answer>") == [0.1], "literals are evaluated"

    @pytest.mark.parametrize(
        "program",
        ["print(1.0) or 1 + 2", "sympify('print(1.0)') + 3", "(1).__add__(2)", "__import__('os').getpid()*0 + 3"],
    )
    def test_a_formula_cannot_call_functions_that_are_not_mathematics(self, program: str) -> None:
        (refused,) = score(COUNTDOWN, f"<answer>{program}</answer>")
        assert refused is not None and refused < 1.0
        assert score(COUNTDOWN, "<answer>2 + 1</answer>") == [1.0], "the child judges as before"

    @pytest.mark.parametrize(
        ("row", "wrong"),
        [
            ({"answer": "True", "metadata": "{}", "kind": "game_of_life_halting"}, ["False", "x", "0", "[]"]),
            ({"answer": "False", "metadata": "{}", "kind": "game_of_life_halting"}, ["True", "x", "0", "[]"]),
            ({"answer": "[[0,1],[1,0]]", "metadata": "{}", "kind": "game_of_life"}, ["[[0,1],[1,1]]", "[]", "x"]),
            ({"answer": "0.375", "metadata": "{}", "kind": "coin_flip"}, ["0", "0.0", "0.3", "nan", "1"]),
            ({"answer": "0.0000305", "metadata": "{}", "kind": "coin_flip"}, ["0", "0.0001"]),
            (
                {"answer": "1.0 + 2.0i", "metadata": json.dumps({"result": [1.0, 2.0]}), "kind": "complex_arithmetic"},
                ["nan", "nan+nanj", "inf", "x", "2.0 + 1.0i"],
            ),
            (
                {"answer": "8*(5*1 - 2)", "metadata": json.dumps({"numbers": [5, 1, 2, 8]}), "kind": "puzzle24"},
                ["6*4*1/1"],
            ),
            (
                {"answer": "67 days", "metadata": json.dumps({"task_type": "date"}), "kind": "time_intervals"},
                ["67 days, 10:32", "68 days"],
            ),
        ],
    )
    def test_what_a_verifier_pays_for_nonsense_is_not_believed(self, row: dict[str, str], wrong: list[str]) -> None:
        assert all(
            reward is not None and reward < 1.0
            for reward in score(row, *(f"<answer>{text}</answer>" for text in wrong))
        )
        believed = row["kind"] not in ("game_of_life_halting", "puzzle24")
        assert score(row, f"<answer>{row['answer']}</answer>") == [float(believed)]

    @pytest.mark.parametrize(
        "text", ["<answer>" * 5_000, f"<answer>{'$' * 20_000}</answer>", f"<answer>{'$' * 100_000}"]
    )
    def test_tags_without_end_cost_no_time(self, text: str) -> None:
        began = time.process_time()
        assert score(SUM, text) == [0.0]
        assert time.process_time() - began < 1

    def test_an_answer_that_takes_forever_scores_nothing(self) -> None:
        assert score(COUNTDOWN, "<answer>1 + 2 + 0*9**9**9**9</answer>", "<answer>1 + 2</answer>") == [0.0, 1.0]
