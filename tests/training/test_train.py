"""The end of a run: why it ended early is reported, and the saved model works elsewhere."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import RunStopped
from pipeline.training import callbacks, train
from pipeline.training.callbacks import InterruptCallback
from pipeline.training.reliable import Reliable
from tests.helpers import sampling_recipes
from tests.helpers.small_model import ROOT, run_recipe

REWARD = """
import sys

calls = 0


def failing(completions, **columns):
    global calls
    calls += 1
    # The first call is a trial before training.
    if calls > 2:
        {statement}
    return [len(completion[0]["content"]) for completion in completions]
"""
LINE = REWARD.split("\n").index("        {statement}") + 1


@pytest.mark.parametrize(
    ("recipe", "statement", "reason", "more"),
    [
        ("grpo", "raise ValueError('two\\nlines')", "ValueError: two lines", []),
        ("ppo", "sys.exit(0)", "SystemExit: 0", ["--reward_weights", "1", "1"]),
    ],
)
def test_a_reward_that_fails_ends_the_run_with_its_name_its_reason_and_its_line(
    recipe: str, statement: str, reason: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(REWARD.format(statement=statement))
    monkeypatch.setitem(sampling_recipes.ENVIRONMENT, "PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    options = sampling_recipes.write_config(
        recipe, tmp_path, reward_funcs=["my_rewards:failing"], save_steps=1, max_steps=8, eval_strategy="no"
    )
    done = sampling_recipes.run(f"recipes.{recipe}", *options, *more, "--output_dir", str(tmp_path / "run"))
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"reward_funcs: my_rewards:failing: raised {reason} ({tmp_path}/my_rewards.py:{LINE}); ")
    assert "(in step " in last
    assert f"the last good checkpoint is {tmp_path}/run/checkpoint-" in last
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.json").exists()


def test_leaving_training_by_sys_exit_is_an_error(tmp_path: Path) -> None:
    class Leaving(Reliable):
        def train(self, resume_from_checkpoint: str | None) -> None:
            raise SystemExit(0)

    trainer = Leaving(torch.nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    trainer.state.global_step = 3
    with pytest.raises(
        RunStopped, match=r"sys.exit\(0\) was called .* after step 3; the run has saved no checkpoint yet"
    ) as stop:
        train._train(trainer, None)
    assert stop.value.exit_code == 1


def test_saved_configurations_enable_the_cache(tmp_path: Path) -> None:
    done = run_recipe("sft", tmp_path / "inputs", "--output_dir", str(tmp_path / "run"), "--max_steps", "2")
    assert done.returncode == 0, done.stderr
    for folder in ("run", "run/checkpoint-2", "inputs/model"):
        assert json.loads((tmp_path / folder / "config.json").read_text())["use_cache"] is True, folder


def test_an_adapter_names_a_local_base_by_its_absolute_path(tmp_path: Path) -> None:
    inputs = Path(os.path.relpath(tmp_path / "inputs", ROOT))
    run_recipe("sft", tmp_path / "inputs", "--help")
    lora = ["--use_peft", "--lora_target_modules", "all-linear", "--max_steps", "2"]
    named = ["--model_name_or_path", str(inputs / "model"), "--output_dir", str(tmp_path / "run")]
    done = run_recipe("sft", tmp_path / "inputs", *lora, *named)
    assert done.returncode == 0, done.stderr
    for folder in ("run", "run/checkpoint-2"):
        config = json.loads((tmp_path / folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "inputs" / "model")


@pytest.mark.parametrize(("handler", "code"), [(signal.SIG_DFL, 129), (signal.SIG_IGN, None)])
def test_a_terminal_that_closes_saves_unless_nohup_ignores_it(handler: signal.Handlers, code: int | None) -> None:
    """SIGHUP may come more than once."""
    earlier_handler = signal.signal(signal.SIGHUP, handler)
    interrupts = InterruptCallback()
    state, control = TrainerState(global_step=1, max_steps=3), TrainerControl()
    try:
        for _ in range(2):
            signal.raise_signal(signal.SIGHUP)
        interrupts.on_step_end(SimpleNamespace(world_size=1), state, control)
    finally:
        interrupts.restore()
        assert signal.signal(signal.SIGHUP, earlier_handler) is handler
    assert control.should_save is control.should_training_stop is (code is not None)
    assert getattr(interrupts.reason_to_stop(state, "out"), "exit_code", None) == code


def test_ctrl_c_that_a_launcher_repeats_as_another_signal_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1.16 on, accelerate sends its child SIGTERM when the terminal has sent both of them SIGINT."""
    earlier: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: earlier.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    state, control = TrainerState(global_step=1, max_steps=3), TrainerControl()
    try:
        interrupts = InterruptCallback()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert earlier == []
        interrupts.on_step_end(SimpleNamespace(world_size=1), state, control)
        assert control.should_save and interrupts.reason_to_stop(state, "out").exit_code == 130
        # The user presses Ctrl-C again.
        signal.raise_signal(signal.SIGINT)
        assert earlier == [signal.SIGINT]
        # A cluster sends SIGTERM later than that.
        monkeypatch.setattr(callbacks, "SAME_SIGNAL_SECONDS", 0.0)
        interrupts = InterruptCallback()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert earlier == [signal.SIGINT, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("given", "expected"), [(None, False), (True, True)])
def test_unused_parameters_are_looked_for_only_if_asked(given: bool | None, expected: bool, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), ddp_find_unused_parameters=given, use_cpu=True)
    train.run_callbacks(args)
    assert args.ddp_find_unused_parameters is expected


def test_a_signal_that_arrives_while_the_processes_agree_is_for_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stopped alone would leave the others waiting for it."""
    interrupts = InterruptCallback()
    args = SimpleNamespace(world_size=2, device="cpu")
    state, control = TrainerState(global_step=1, max_steps=3), TrainerControl()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda number, op: os.kill(os.getpid(), signal.SIGTERM))
    try:
        interrupts.on_step_end(args, state, control)
        assert not control.should_training_stop and interrupts.reason_to_stop(state, "out") is None
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda number, op: None)
        interrupts.on_step_end(args, state, control)
    finally:
        interrupts.restore()
    assert control.should_save and control.should_training_stop
    assert interrupts.reason_to_stop(state, "out").exit_code == 143
