"""Two processes step along the gradient of the whole batch: tested with SGD, because Adam hides a constant factor."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers.forked import RANKS, run_forked
from tests.helpers.small_model import recipe_command, weights

SGD = {
    "bf16": "false",
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    # Gradients are never clipped, but their norm is logged.
    "max_grad_norm": 1e9,
    "max_steps": 2,
    "save_strategy": "no",
    "eval_strategy": "no",
}


def train(recipe: str, inputs: Path, processes: int, batch: int, accumulated: int) -> tuple[Path, list[float]]:
    """Train, and return the output directory and the gradient norm of each step."""
    output = inputs / f"{recipe}-{processes}-{accumulated}"
    options = {
        **SGD,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulated,
        "output_dir": output,
        # The other loss compares with an estimate that depends on the processes, as `KTOTrainer` says.
        **({"loss_type": "apo_zero_unpaired"} if recipe == "kto" else {}),
    }
    more = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launch = [*RANKS, str(processes)] if processes > 1 else []
    result = run_forked([sys.executable, *launch, *recipe_command(recipe, inputs, *more)])
    assert result.returncode == 0, result.stderr
    group = "2 on cpu, one group (gloo)" if processes == 2 else "processes   1 on cpu"
    assert group in result.stderr
    assert result.stderr.count("sharding ") == 1, "one process speaks"
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return output, [entry["grad_norm"] for entry in history if "grad_norm" in entry]


@pytest.mark.parametrize("recipe", ["pretrain", "sft", "reward", "dpo", "kto"])
def test_the_gradient_is_that_of_the_whole_batch(recipe: str, tmp_path: Path) -> None:
    one, norms = train(recipe, tmp_path, processes=1, batch=8, accumulated=1)
    assert len(norms) == 2 and min(norms) > 0.01
    before = weights(one)
    other, others = train(recipe, tmp_path, processes=2, batch=2, accumulated=2)
    assert others == pytest.approx(norms, rel=1e-4)
    after = weights(other)
    # With a learning rate of 1 the weights differ by what the gradients differ.
    difference = max((before[name] - after[name]).abs().max().item() for name in before)
    assert difference < 1e-4 * max(norms)
