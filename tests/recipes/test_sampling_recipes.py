"""The recipes that sample, PPO and GRPO, as they are launched: killed and restarted, one process and two."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import tool_toy
from tests.helpers.forked import Started
from tests.helpers.sampling_recipes import ENVIRONMENT, command, run, write_config

STEPS = 12
MODELS = {"ppo": ("model.safetensors", "value_model/model.safetensors"), "grpo": ("model.safetensors",)}
"""The weights that a recipe trains."""
TOLERANCE = {"rtol": 1e-3, "atol": 1e-5}
"""Between one process and two, only the order of sums and the padding differ."""


def weights(recipe: str, output: Path) -> dict[str, torch.Tensor]:
    return {f"{file}/{n}": weight for file in MODELS[recipe] for n, weight in load_file(output / file).items()}


def log_of(output: Path) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return log


@pytest.mark.parametrize(("recipe", "experts"), [("ppo", True), ("grpo", False)])
def test_a_run_killed_at_a_random_moment_and_restarted_ends_the_same(
    recipe: str, experts: bool, tmp_path: Path
) -> None:
    """Whether in the middle of a rollout or not, while it saves or not, and in any epoch of the prompts."""
    options = [*write_config(recipe, tmp_path, experts, max_steps=STEPS, save_steps=1), "--output_dir"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run(f"recipes.{recipe}", *options, str(whole))
    assert done.returncode == 0, done.stderr[-3000:]

    step, seconds = random.SystemRandom().randint(1, STEPS - 3), random.SystemRandom().uniform(0, 0.1)
    moment = f"killed {seconds:.3f} s after checkpoint {step}"
    with Started(command(f"recipes.{recipe}", *options, str(parts)), ENVIRONMENT) as process:
        while process.is_running and not (parts / f"checkpoint-{step}").exists():
            time.sleep(0.002)
        time.sleep(seconds)
        process.kill()
        assert process.wait() == -signal.SIGKILL, moment
    again = run(f"recipes.{recipe}", *options, str(parts))
    assert again.returncode == 0 and "resuming" in again.stderr, f"{moment}\n{again.stderr[-3000:]}"

    expected, found = weights(recipe, whole), weights(recipe, parts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected), moment
    start = load_file(tmp_path / "policy" / "model.safetensors")
    assert any(not torch.equal(start[n], expected[f"model.safetensors/{n}"]) for n in start), "something was learned"


def with_tools(folder: Path) -> dict[str, Any]:
    """Save a policy that can call a tool, and prompts for it. Return the fields that name them."""
    for part in (tool_toy.policy(), tool_toy.tokenizer()):
        part.save_pretrained(folder / "caller")
    tool_toy.prompts(32).to_json(folder / "called.jsonl")
    return {
        "model_name_or_path": str(folder / "caller"),
        "dataset_name": str(folder / "called.jsonl"),
        "reward_model_path": None,
        "reward_funcs": ["tests.helpers.tool_toy:says_yes"],
        "tools": ["tests.helpers.tool_toy:double"],
        "max_completion_length": 24,
        # Most gradients of this policy are rounding errors, which Adam would make as large as the others.
        "adam_epsilon": 1e-3,
    }


@pytest.mark.parametrize(
    ("recipe", "experts", "tools"), [("ppo", False, False), ("grpo", True, False), ("ppo", False, True)]
)
def test_two_processes_learn_what_one_learns(recipe: str, experts: bool, tools: bool, tmp_path: Path) -> None:
    """On the same rollouts or dialogues: equal gradients in every step, equal weights, and equal logs."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, **(with_tools(tmp_path) if tools else {})}
    options = write_config(recipe, tmp_path, experts, max_steps=6, save_steps=3, **evaluation)
    outputs = []
    for processes in (1, 2):
        rows = str(4 // processes)
        batches = ["--per_device_train_batch_size", rows, "--per_device_eval_batch_size", rows]
        outputs.append(tmp_path / str(processes))
        arguments = [recipe, *options, *batches, "--output_dir", str(outputs[-1])]
        done = run("tests.helpers.fixed_rollouts", *arguments, processes=processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(output / "seen.pt", weights_only=True) for output in outputs)
    assert (one["processes"], two["processes"]) == (1, 2)

    assert len(one["gradients"]) == len(two["gradients"]) == 6
    for a, b in zip(one["gradients"], two["gradients"], strict=True):
        assert a.any()
        torch.testing.assert_close(a, b, **TOLERANCE)
    trained = [weights(recipe, output) for output in outputs]
    for name in trained[0]:
        torch.testing.assert_close(trained[0][name], trained[1][name], **TOLERANCE)
    measured = (
        "objective",
        "policy",
        "val/",
        "loss",
        "reward",
        "grad_norm",
        "eval_objective",
        "eval_reward",
        "eval_loss",
        "tools/",
    )
    for a, b in zip(*map(log_of, outputs), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            if name.startswith(measured):
                assert a[name] == pytest.approx(b[name], rel=1e-2, abs=1e-4), name

    if tools:
        assert any(entry.get("tools/call_frequency", 0) >= 0.5 for entry in log_of(outputs[1]))
        assert any(entry.get("tools/failure_frequency", 0) > 0 for entry in log_of(outputs[1]))
    # GRPO's rollouts are kept by the code that keeps PPO's.
    if recipe == "grpo":
        return
    # Resumed in the middle of a rollout, each process finds its own half again.
    middle = outputs[1] / "checkpoint-3"
    assert len(list(middle.glob("rollout_*.safetensors"))) == 2
    resumed = tmp_path / "resumed"
    done = run(
        "tests.helpers.fixed_rollouts",
        *arguments[:-1],
        str(resumed),
        "--resume_from_checkpoint",
        str(middle),
        processes=2,
    )
    assert done.returncode == 0 and "resuming" in done.stderr, done.stderr[-3000:]
    again = weights(recipe, resumed)
    assert all(torch.equal(trained[1][name], again[name]) for name in again)

    # The rollout of one process cannot be halved: both processes sample anew, instead of waiting for each other.
    middle = outputs[0] / "checkpoint-3"
    onto = str(tmp_path / "onto_two")
    done = run(
        "tests.helpers.fixed_rollouts", *arguments[:-1], onto, "--resume_from_checkpoint", str(middle), processes=2
    )
    assert done.returncode == 0 and done.stderr.count("is sampled again") == 1, done.stderr[-3000:]
    assert len(torch.load(Path(onto) / "seen.pt", weights_only=True)["gradients"]) == 3
