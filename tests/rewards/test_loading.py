"""Reward functions neither see each other's edits nor pass NaN on, in both trainers."""

import asyncio
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from pipeline.errors import RunStopped, UserError
from pipeline.rewards import loading
from pipeline.rewards.functions import math_answer
from pipeline.rewards.loading import built_in_name, guard_reward, load_reward
from pipeline.rewards.table import REWARDS
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.reward_checks import check_rewards
from tests.helpers import ppo_toy as toy


def vandal(completions: list[Any], prompts: list[Any], completion_ids: list[Any], **columns: Any) -> list[float]:
    """Edit everything in place that it is given."""
    completions[0][0]["content"] = "red"
    prompts[0].clear()
    completion_ids[0].clear()
    for name in ("tags", "answer"):
        if columns[name] and isinstance(columns[name][0], list):
            columns[name][0].append("gone")
        columns[name].clear()
    rewards = [0.0] * len(completions)
    completions.clear()
    return rewards


async def later_vandal(completions: list[Any], **columns: Any) -> list[float]:
    rewards = vandal(completions, **columns)
    await asyncio.sleep(0)
    return rewards


class Witness:
    """Record what a reward function is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        names = ("prompts", "completion_ids", "tags", "answer")
        self.seen.append({"completions": completions} | {name: columns[name] for name in names})
        assert columns["trainer_state"].max_steps == 1, "the trainer's own, not a copy"
        columns["log_metric"]("witnessed", 1.0)
        return [float("red" in completion[0]["content"]) for completion in completions]


def sometimes_nan(completions: list[Any], **columns: Any) -> list[float | None]:
    return [None, 0.5, float("nan"), *[0.0] * (len(completions) - 3)]


def undecided(completions: list[Any], **columns: Any) -> list[float | None]:
    return [None, *[0.5] * (len(completions) - 1)]


def make_trainer(kind: str, path: Path, rewards: list[Any], weights: list[float]) -> Any:
    rows = [{**row, "answer": "12", "tags": ["a", str(i)]} for i, row in enumerate(toy.prompts(32))]
    if kind == "ppo":
        config: Any = toy.config(path, max_steps=1, reward_weights=weights)
        return PPOTrainer(toy.policy(), rewards, config, Dataset.from_list(rows), processing_class=toy.tokenizer())
    config = GRPOConfig(
        str(path), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=1, bf16=False,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, reward_weights=weights, logging_steps=1,
    )  # fmt: skip
    return GRPOTrainer(
        model=toy.policy(), reward_funcs=rewards, args=config, train_dataset=Dataset.from_list(rows),
        processing_class=toy.tokenizer(),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_a_reward_that_edits_its_arguments_changes_nothing_for_the_others(kind: str, tmp_path: Path) -> None:
    before, between, after = Witness(), Witness(), Witness()
    rewards = [before, vandal, between, later_vandal, after]
    run = make_trainer(kind, tmp_path, rewards, [1.0, 0.0, 1.0, 0.5, 1.0])
    run.train()
    assert before.seen and before.seen == between.seen == after.seen
    first = before.seen[0]
    assert first["tags"][0][0] == "a" and "gone" not in str(first) and all(first.values())
    assert run.reward_func_names == ["Witness", "vandal", "Witness", "later_vandal", "Witness"]
    assert any(entry.get("witnessed") == 1.0 for entry in run.state.log_history)


@pytest.mark.parametrize("kind", ["grpo", "ppo"])
def test_nan_stops_the_run_and_none_does_not(kind: str, tmp_path: Path) -> None:
    before = toy.policy().state_dict()
    run = make_trainer(kind, tmp_path, [toy.share_of_red, sometimes_nan], [1.0, 0.0])
    with pytest.raises(RunStopped) as stopped:
        run.train()
    message = str(stopped.value)
    assert "sometimes_nan: returned nan for completion 2 of " in message and "in step 1" in message
    assert len(message.splitlines()) == 1
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items()), "nothing learned"
    make_trainer(kind, tmp_path, [undecided, toy.share_of_red], [1.0, 1.0]).train()


def test_nan_is_found_before_training() -> None:
    train = Dataset.from_list([{"prompt": [{"role": "user", "content": "why"}], "answer": "b"}])
    (problem,) = check_rewards([], ["tests.helpers.ppo_toy:not_a_number"], None, train)
    assert str(problem).startswith(
        "reward_funcs: tests.helpers.ppo_toy:not_a_number: returned nan for completion 0 of 2"
    )


def test_what_is_guarded_already_or_edits_nothing_is_not_wrapped() -> None:
    once = guard_reward(vandal, "vandal")
    assert guard_reward(once, "vandal") is once and guard_reward(math_answer, "math_answer") is math_answer
    with pytest.raises(UserError, match="late: returned nan"):
        asyncio.run(guard_reward(toy.not_a_number_later, "late")(completions=["a"]))


def test_a_function_that_moved_is_found_by_its_earlier_place() -> None:
    taste = load_reward("hidden_taste", "reward_funcs")
    assert load_reward("pipeline.rewards.functions:hidden_taste", "reward_funcs") is taste


@pytest.mark.parametrize("name", REWARDS)
def test_each_built_in_reward_is_the_function_of_its_name(name: str) -> None:
    function = resolve_name(REWARDS[name])
    assert function.__name__ == name and built_in_name(function) == name
    assert guard_reward(function, name) is function and built_in_name(vandal) is None


def test_the_line_is_named_of_a_file_beside_the_package_too() -> None:
    own = Path(loading.__file__).parents[2] / "pipeline_own.py"
    made: dict[str, Any] = {}
    code = "def late(completions, **columns):\n    raise ValueError('no server')"
    exec(compile(code, str(own), "exec"), made)  # noqa: S102 - the code of this test
    with pytest.raises(UserError, match=r"late: raised ValueError: no server \(.*pipeline_own.py:2\); correct it"):
        guard_reward(made["late"], "late")(completions=["a"])
