"""A collapse is named once, in the log and in the log's entries; a sound run, and success, are not."""

import logging
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOConfig

from pipeline.rl.alarms import CollapseAlarms
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from tests.helpers import ppo_toy as toy

SOUND = {
    "entropy": 0.4,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.1,
    "reward": 0.4,
    "reward_std": 0.5,
    "reward_max": 1.0,
    "frac_reward_zero_std": 0.5,
    "objective/kl": 2.0,
}
COLLAPSES: dict[str, tuple[dict[str, float], float]] = {
    "entropy": ({"entropy": 0.008}, 0.008),
    "length_at_limit": ({"completions/clipped_ratio": 0.7}, 0.7),
    "length_near_zero": ({"completions/mean_length": 1.9, "objective/kl": 1.0}, 1.9),
    "reward_spread": ({"reward_std": 0.001}, 0.001),
    "uninformative_groups": ({"frac_reward_zero_std": 1.0}, 1.0),
    "kl": ({"objective/kl": 30.0}, 1.5),
}
"""Changes of a sound entry, and the figure that is reported."""


def history(
    entries: list[dict[str, Any]], checked: bool = True, stop_after: int = 0, batch_size: int = 32, ends: bool = False
) -> list[dict[str, Any]]:
    """Return the log of a run with these entries, of which some are logged before the run is resumed."""
    # accelerate's logger needs a state.
    PartialState()
    state, control = TrainerState(), TrainerControl()
    config = GRPOConfig(use_cpu=True, bf16=False, per_device_train_batch_size=batch_size, num_generations=2)
    for number, entry in enumerate(entries, start=1):
        if number in (1, stop_after + 1):
            alarms = CollapseAlarms(checked)
            alarms.on_train_begin(config, state, control)
        state.global_step = number
        state.log_history.append({**entry, "step": number})
        alarms.on_log(config, state, control, logs=entry)
    state.max_steps = len(entries) + (not ends)
    alarms.on_train_end(config, state, control)
    return state.log_history


def raised(log: list[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(name.removeprefix("alarm/"), e["step"]) for e in log for name in e if name.startswith("alarm/")]


@pytest.mark.parametrize("name", COLLAPSES)
def test_each_collapse_has_a_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, figure = COLLAPSES[name]
    with caplog.at_level(logging.WARNING):
        log = history([SOUND, *[SOUND | changes] * 5])
    assert [entry for entry in log if "reward" not in entry] == [{f"alarm/{name}": figure, "step": 4}]
    assert [f"{name} at step 4: {figure:g} " in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("name", COLLAPSES)
def test_once(name: str) -> None:
    bad = SOUND | COLLAPSES[name][0]
    assert raised(history([SOUND, bad, bad, SOUND, bad, bad, SOUND])) == []
    twice = [SOUND, *[bad] * 4, *[SOUND] * 3, *[bad] * 4]
    assert raised(history(twice)) == [(name, 4)]
    for stop in range(1, len(twice)):
        assert history(twice, stop_after=stop) == history(twice), "resumed there"


def test_small_batches_need_more_patience() -> None:
    entries = [SOUND, *[SOUND | {"frac_reward_zero_std": 1.0}] * 10]
    assert raised(history(entries, batch_size=8)) == [("uninformative_groups", 9)]
    assert raised(history(entries, batch_size=4)) == []


@pytest.mark.parametrize("name", COLLAPSES)
def test_a_run_that_is_too_short_for_an_alarm_is_judged_at_its_end(name: str) -> None:
    bad = SOUND | COLLAPSES[name][0]
    entries = [SOUND, bad, bad]
    assert raised(history(entries)) == [], "interrupted"
    assert raised(history(entries, ends=True)) == raised(history(entries, ends=True, stop_after=2)) == [(name, 3)]
    assert raised(history([SOUND, bad, SOUND, bad], ends=True)) == []
    assert raised(history([SOUND, *[bad] * 4, *[SOUND] * 2], ends=True)) == [(name, 4)], "once"


def test_success_is_not_a_collapse() -> None:
    """Where answers are checked, equal rewards and low entropy at the best reward are; a reward model has no best."""
    solved = SOUND | {"reward": 0.96, "reward_std": 0.0, "frac_reward_zero_std": 1.0, "entropy": 0.001}
    assert raised(history([SOUND, *[solved] * 5])) == []
    names = ["entropy", "reward_spread", "uninformative_groups"]
    assert raised(history([SOUND, *[solved] * 5], checked=False)) == [(name, 4) for name in names]
    unsolved = solved | {"reward": 0.5}
    assert raised(history([SOUND, *[unsolved] * 5])) == [(name, 4) for name in names]


def test_entries_without_figures_change_nothing() -> None:
    """Steps without a rollout, rewards of None only, evaluations, and the summary at the end."""
    bad = SOUND | {"frac_reward_zero_std": 1.0}
    others: list[dict[str, Any]] = [{"loss": 0.1}, {"eval_entropy": 0.0}, {"train_runtime": 1.0}, {"reward": None}]
    assert raised(history([SOUND, bad, *others, bad, bad])) == [("uninformative_groups", 8)]


def tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def fewest(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def half_red(row: list[int], completions: list[Any], **kwargs: Any) -> list[float]:
    """Pay for "red", but only for every other prompt, so that a policy that always says it has half the reward."""
    return [r % 2 * share for r, share in zip(row, toy.share_of_red(completions), strict=True)]


def the_same(completions: list[Any], **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


class EndWith(TrainerCallback):
    """End a training with the first alarm of this name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        control.should_training_stop |= self.name in [name for name, _ in raised(state.log_history)]
        return control


def run(
    kind: str, reward: Any, path: Path, checkpoint: Path | None = None, until: str | None = None, **changes: Any
) -> list[tuple[str, int]]:
    """Train a policy of random words, `until` there is an alarm of this name or to the end, and return the alarms."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 16, "max_completion_length": 24, "learning_rate": 2e-2, "max_steps": 40,
        "logging_steps": 1, "report_to": "none", "bf16": False, "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "lr_scheduler_type": "constant",
    }  # fmt: skip
    own = {"num_generations": 8} if kind == "grpo" else {"num_iterations": 2, "kl_coef": 1e-6}
    config = GRPOConfig if kind == "grpo" else toy.PPOConfig
    trainer = (GRPOTrainer if kind == "grpo" else PPOTrainer)(
        toy.policy(),
        reward,
        config(str(path), **options | own | changes),
        toy.prompts(),
        processing_class=toy.tokenizer(),
        callbacks=[EndWith(until)] if until else [],
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return raised(trainer.state.log_history)


@pytest.mark.parametrize(
    ("kind", "reward", "changes", "first"),
    [
        ("grpo", tokens, {}, "length_at_limit"),
        ("grpo", fewest, {}, "length_near_zero"),
        ("grpo", the_same, {"max_steps": 6}, "reward_spread"),
        ("ppo", tokens, {"kl_coef": 0.0}, "length_at_limit"),
        ("ppo", half_red, {"max_steps": 80, "learning_rate": 3e-2}, "kl"),
        ("grpo", toy.share_of_red, {"max_steps": 6, "learning_rate": 1e-3}, None),
        ("ppo", toy.share_of_red, {"max_steps": 6, "learning_rate": 1e-3}, None),
    ],
)
def test_a_run_that_collapses_raises_its_alarm(
    kind: str, reward: Any, changes: dict[str, Any], first: str | None, tmp_path: Path
) -> None:
    alarms = run(kind, reward, tmp_path, until=first, **changes)
    assert (alarms[0][0] if alarms else None) == first, alarms


def test_a_policy_that_no_longer_explores_raises_the_alarm_of_entropy(tmp_path: Path) -> None:
    """Answers of one word are short as well, so that other alarms may come first."""
    changes = {"kl_coef": 0.0, "max_steps": 120, "learning_rate": 3e-2, "max_completion_length": 4}
    alarms = run("ppo", half_red, tmp_path, until="entropy", missing_eos_penalty=1.0, **changes)
    assert "entropy" in [name for name, _ in alarms], alarms


def test_a_resumed_run_raises_the_alarms_of_an_uninterrupted_one(tmp_path: Path) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1}
    whole = run("grpo", the_same, tmp_path / "whole", **options)
    assert whole == [("reward_spread", 4), ("uninformative_groups", 4)]
    for step in (2, 4, 5):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert run("grpo", the_same, tmp_path / str(step), checkpoint, **options) == whole
