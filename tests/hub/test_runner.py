"""The runner pushes what a step could not push, or was not asked to push when it ran, without running it again."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import main
from pipeline.runner import processes
from pipeline.runner.plan import read_plan
from pipeline.runner.records import RunRecord
from pipeline.stages import STAGES
from tests.helpers.hub_server import Hub
from tests.helpers.small_model import save_model

TESTS = Path(__file__).parents[1]
MODEL = Path("runs/r/2_sft")
PUSH = {"push_to_hub": True, "hub_model_id": "chat", "hub_revision": "v1", "hub_private_repo": True}
COMMAND = "$ fourstage push runs/r/2_sft --repo_id chat --revision v1 --private"
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a recipe of stage 2, changed as given, beside a model that this stage seems to have written.

    Returns the exit code and all that was written.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
    monkeypatch.setattr(processes, "PRELOADED", ())
    (tmp_path / "accelerate_config.yaml").write_text((TESTS.parent / "accelerate_config.yaml").read_text())
    (tmp_path / "recipe").mkdir()
    save_model(tmp_path / MODEL)

    def run(**changes: object) -> tuple[int, str]:
        configure(**changes)
        code = main(["run", "recipe"])
        return code, "".join(capfd.readouterr())

    return run


def configure(**changes: object) -> None:
    values = {"output_dir": str(MODEL), "dataset_name": "alice/data", **changes}
    Path("recipe/2_sft.yaml").write_text(yaml.safe_dump(values))


def test_a_push_that_failed_is_tried_again_at_the_end(hub: Hub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = replace(STAGES["sft"], module="tests.helpers.stand_in_step", launched=False, measured=False)
    monkeypatch.setitem(STAGES, "sft", stand_in)
    code, written = run(**PUSH, fails=3)
    assert code == 0, written
    assert "2_sft was not pushed to the Hub, which is tried again at the end" in written and COMMAND in written
    assert hub.files("alice/chat", revision="v1")["model.safetensors"] == (MODEL / "model.safetensors").read_bytes()
    assert hub.repos["model", "alice/chat"].private
    number = len(hub.requests)
    assert run(**PUSH, fails=3)[0] == 0 and len(hub.requests) == number, "nothing is left to push"


def test_a_push_that_is_turned_on_later_trains_nothing(hub: Hub, run: Run) -> None:
    configure()
    plan = read_plan(Path("recipe"))
    record = RunRecord.read(plan.run_dir)
    # As far as the runner can see, all steps have finished.
    for step in plan.steps:
        record.start(step, "start", "")
        record.stop(step, 1.0, finished=True, peak_memory=0)
        step.product.parent.mkdir(parents=True, exist_ok=True)
        if not step.product.exists():
            step.product.write_text("{}")
    (MODEL.parent / "report/metrics.json").write_text('{"promises": []}')
    first_entries = RunRecord.read(plan.run_dir).steps
    assert run()[0] == 0 and not hub.requests
    hub.fail(403, path="POST .*/commit/", times=100)
    code, written = run(**PUSH)
    assert code == 3 and COMMAND in written and "Traceback" not in written
    assert "the token may not write to alice/chat" in written
    hub.faults.clear()
    assert run(**PUSH)[0] == 0
    assert hub.files("alice/chat", revision="v1")["model.safetensors"] == (MODEL / "model.safetensors").read_bytes()
    entries = RunRecord.read(plan.run_dir).steps
    assert {name: entry["id"] for name, entry in entries.items()} == {
        name: e["id"] for name, e in first_entries.items()
    }
    assert "hf_alice" not in str(entries)
