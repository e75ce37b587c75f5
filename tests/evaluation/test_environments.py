"""The reward that an environment gives itself, measured as in training, with what an untouched environment gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.metrics import measure_problems
from pipeline.evaluation.results import StageResult
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.loading import Toolbox
from tests.app.test_tools import SAMPLED
from tests.helpers import tool_toy as toy
from tests.helpers.files import write_rows
from tests.helpers.refusals import refused

COUNTER = "tests.helpers.tool_toy:Counter"


class Silent(toy.Counter):
    """An environment without an opinion about rows that allow one question."""

    def get_reward(self) -> float | None:  # type: ignore[override]
        """Return how often it was asked, if it was allowed more."""
        return float(self._asked) if self._most > 1 else None


class Asynchronous(toy.Counter):
    """An environment whose reward is awaited, as TRL allows it."""

    async def get_reward(self) -> float:  # type: ignore[override]
        """Return how often it was asked."""
        return super().get_reward()


def make_run(run: Path, stage: str, environment: str, **columns: Any) -> Path:
    """Return a run of two stages of which the later one, which calls more often, trained in an environment."""
    run.mkdir()
    write_rows(run / "rows.jsonl", [{**row, **columns} for row in toy.prompts(24).to_list()])
    for name, calls in (("2_sft", 0.05), (stage, 0.9)):
        toy.policy(calls).save_pretrained(run / name)
        toy.tokenizer().save_pretrained(run / name)
    values = {"dataset_name": "old/run/rows.jsonl", "model_name_or_path": "old/run/2_sft", "reward_funcs": []}
    values = {**SAMPLED, **values, "environment": environment, "output_dir": f"old/run/{stage}"}
    (run / stage / "arguments.json").write_text(json.dumps(values | {"validation_share": 0.5}))
    return run


# The names of the environments come from the run's files.
TRUST = ["--trust", "tests.helpers.tool_toy:Counter", "--trust", f"{__name__}:Silent"]


def evaluate(run: Path, *stages: str) -> list[dict[str, Any]]:
    for stage in stages:
        assert main(["evaluate", str(run), "--stage", stage, "--against", "2_sft", "--samples", "2", *TRUST]) == 0
    return [json.loads((run / "evaluations" / f"{stage}.json").read_text()) for stage in stages]


@pytest.mark.parametrize("stage", ["4_grpo", "3_ppo"])
def test_rows_without_answers_are_measured_by_the_reward_alone(tmp_path: Path, stage: str) -> None:
    run = make_run(tmp_path / "run", stage, COUNTER)
    opponent, trained = evaluate(run, "2_sft", stage)
    reward = trained["metrics"]["environment_reward"]
    assert reward["ci95"][0] <= reward["value"] <= reward["ci95"][1]
    assert reward["n"] == 12, "the half of the rows that is held out"
    assert opponent["metrics"]["environment_reward"]["value"] < 0.5 < reward["value"]
    # Environments in which nothing is called are a baseline, measured once, with the opponent.
    assert opponent["metrics"]["untouched/environment_reward"]["value"] == 0
    assert "untouched/environment_reward" not in trained["metrics"]
    assert not [name for name in trained["metrics"] if "pass@" in name]
    if stage == "4_grpo":
        assert {"tool_calls", "stop_rate", "reasoning_length"} < trained["metrics"].keys()
        trace = trained["traces"][0]
        assert trace["correct"] is None and "-> double" in trace["answer"]

    assert main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "metrics.json").read_text())
    assert summary["baselines"]["untouched"]["environment_reward"]["value"] == 0
    assert summary["stages"][stage]["environment_reward"] == reward
    text = (run / "report" / "report.md").read_text()
    assert "environment without calls" in text and f"`{stage}` − `untouched`" in text


def test_problems_with_answers_are_graded_and_measured_by_the_reward(tmp_path: Path) -> None:
    (result,) = evaluate(make_run(tmp_path / "run", "4_grpo", COUNTER, answer="yes"), "4_grpo")
    assert {"pass@1", "pass@2", "environment_reward"} < result["metrics"].keys()


@pytest.mark.parametrize(("environment", "counted"), [(Silent, 2), (Asynchronous, 4)])
def test_a_reward_may_be_none_or_awaited(environment: type, counted: int) -> None:
    chat = ChatModel(toy.policy(0.9), toy.tokenizer(), 24, toolbox=Toolbox(environment=environment))
    rows = [{**row, "id": number, "kind": ""} for number, row in enumerate(toy.prompts(4).to_list())]
    result = StageResult("2_sft", against="2_sft")
    measure_problems(result, chat, HeldOut(problems=rows, graded=False), samples=1)
    assert result.metrics["environment_reward"].n == result.metrics["untouched/environment_reward"].n == counted
    assert result.metrics["environment_reward"].value >= 1


def test_without_a_reward_rows_need_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", "4_grpo", "guess_letter")
    message = refused(capsys, "evaluate", run, "--stage", "4_grpo", "--against", "2_sft", *TRUST)
    assert "problems: answer_column: answer: does not exist" in message
