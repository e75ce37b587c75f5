"""TensorBoard and trackio show what the trainers log, under TRL's names."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.integrations.integration_utils import rewrite_logs

from tests.helpers import sampling_recipes
from tests.helpers.small_model import ROOT, recipe_command

Curves = dict[str, dict[int, float]]
"""Name of a curve -> step -> value."""
ONCE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
"""What transformers logs when training has ended, and does not send to trackio."""
NAMES = {
    "sft": {"train/loss", "train/grad_norm", "train/mean_token_accuracy", "train/entropy", "eval/loss"},
    "ppo": {"train/loss", "train/objective/kl", "train/objective/scores", "train/val/grad_norm", "train/reward"},
}
READ = """
import json, sys
from trackio.sqlite_storage import SQLiteStorage
print(json.dumps(SQLiteStorage.get_logs("toy", "first"), default=str))
"""


def logged(folder: Path) -> Curves:
    """Return what the trainer logged, under the names that transformers gives the trackers."""
    curves: Curves = {}
    for record in json.loads((folder / "trainer_state.json").read_text())["log_history"]:
        for name, value in rewrite_logs({k: v for k, v in record.items() if k not in {"step", *ONCE}}).items():
            curves.setdefault(name, {})[record["step"]] = value
    return curves


def in_tensorboard(folder: Path) -> Curves:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


def in_trackio() -> Curves:
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    curves: Curves = {}
    for record in json.loads(done.stdout.splitlines()[-1]):
        for name, value in record.items() if "train/global_step" in record else ():
            curves.setdefault(name, {})[record["train/global_step"]] = value
    return curves


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_the_trackers_show_the_curves_of_the_log(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("tensorboard", "trackio"):
        pytest.importorskip(package)
    output, events = tmp_path / "output", tmp_path / "events"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(events))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    options = ["--output_dir", str(output), "--project", "toy", "--run_name", "first", "--max_steps", "4"]
    trackers = ["tensorboard", "trackio"]
    if recipe == "sft":
        (tmp_path / "sft.yaml").write_text(f"report_to: {trackers}\n")
        command = [sys.executable, *recipe_command("sft", tmp_path / "inputs", *options)]
        command += ["--config", str(tmp_path / "sft.yaml")]
    else:
        config = sampling_recipes.write_config("ppo", tmp_path, report_to=trackers)
        command = sampling_recipes.command("recipes.ppo", *config, *options)
    # A new process, because trackio reads its variables when it is imported.
    environment = os.environ | sampling_recipes.ENVIRONMENT
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    curves = logged(output)
    assert NAMES[recipe] - curves.keys() == set()
    for tracker in (in_tensorboard(events), in_trackio()):
        for name, curve in curves.items():
            assert tracker[name] == pytest.approx(curve, rel=1e-6), name
