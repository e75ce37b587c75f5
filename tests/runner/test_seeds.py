"""Runs of several seeds, on recipe folders whose steps are stand-ins."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.runner.steps import Step
from pipeline.stages import STAGES
from tests.runner.conftest import Runner, configure, times

# Stands in for the evaluation of a stage: one figure, which is 0.5 + seed / 100.
EVALUATION = """
import json, sys
from pathlib import Path
for path in map(Path, sys.argv[1:]):
    path.parent.mkdir(exist_ok=True)
    value = 0.5 + json.loads((path.parents[1] / "run.json").read_text())["seed"] / 100
    entry = {"value": value, "ci95": [value - 0.01, value + 0.01], "n": 100}
    path.write_text(json.dumps({"metrics": {"pass@1": entry}}))
"""


@pytest.fixture
def measured(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """`2_sft` is evaluated by a stand-in. The folder has a `pipeline.py` of its own, which no step may run."""
    Path("pipeline.py").write_text("raise SystemExit(f'{__file__} was run')")
    executable = Step.executable

    def stand_in(step: Step, launch: list[str], launcher: Sequence[str] = ()) -> list[str]:
        evaluation = [sys.executable, "-c", EVALUATION, str(step.leftovers[0])] if step.kind == "evaluate" else []
        return evaluation or executable(step, launch, launcher)

    monkeypatch.setitem(STAGES, "sft", replace(STAGES["sft"], measured=True))
    monkeypatch.setattr(Step, "is_complete", property(lambda step: step.product.exists()))
    monkeypatch.setattr(Step, "executable", stand_in)


def read_report(run_dir: str = "runs/r") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(run_dir, "report/metrics.json").read_text())
    return content


def test_each_of_several_seeds_is_the_run_with_that_seed(run: Runner) -> None:
    assert run("--seeds", "3", "1")[0] == 0
    for seed in (3, 1):
        run("--seed", str(seed), "--output_dir", f"alone/seed{seed}")
        several, alone = (json.loads(Path(top, f"seed{seed}/run.json").read_text()) for top in ("runs/r", "alone"))
        assert several["seed"] == alone["seed"] == seed
        for name, entry in alone["steps"].items():
            assert several["steps"][name]["values"] == entry["values"]
            assert several["steps"][name]["command"] == entry["command"].replace("alone/", "runs/r/")
        _, out, _ = run("--seed", str(seed), "--output_dir", f"runs/r/seed{seed}")
        assert "$ " not in out, "it is finished for the runner of one seed as well"
    _, out, _ = run("--seeds", "3", "1")
    assert "$ " not in out
    assert times("runs/r/seed1") == {"0_random": 1, "1_pretrain": 1, "2_sft": 1, "3_reward": 1, "data": 1}


def test_several_seeds_have_a_report(run: Runner, measured: None) -> None:
    assert run("--seeds", "0", "2")[0] == 0
    summary = read_report()
    assert [of_run["seed"] for of_run in summary["runs"]] == [0, 2]
    assert summary["stages"]["2_sft"]["pass@1"]["values"] == pytest.approx([0.5, 0.52])
    assert read_report("runs/r/seed2")["stages"]["2_sft"]["pass@1"]["value"] == pytest.approx(0.52)
    assert run("--seeds", "0", "2", "4", "--until", "sft")[0] == 0
    assert read_report()["stages"]["2_sft"]["pass@1"]["n"] == 3
    assert run("--seeds", "4")[0] == 0
    assert read_report()["stages"]["2_sft"]["pass@1"]["n"] == 1


def test_before_anything_is_measured_several_seeds_have_no_report(run: Runner, measured: None) -> None:
    assert run("--seeds", "0", "1", "--until", "pretrain")[0] == 0
    assert Path("runs/r/seed1/1_pretrain").exists() and not Path("runs/r/report").exists()


def test_a_run_that_lies_there_is_kept_but_for_its_report(run: Runner, measured: None) -> None:
    run("--seed", "7")
    before = {path: path.read_bytes() for path in Path("runs/r").rglob("*") if path.is_file()}
    assert run("--seeds", "0", "1")[0] == 0
    for path, content in before.items():
        assert path.parent.name == "report" or path.read_bytes() == content
    assert len(read_report()["runs"]) == 2
    _, out, _ = run("--seed", "7")
    assert "$ " not in out


def test_new_seeds_share_the_steps_before_a_step_with_the_run(run: Runner, folder: Path, measured: None) -> None:
    configure(folder, "2_sft", seed=0)
    assert run()[0] == 0
    before = {path: path.read_bytes() for path in Path("runs/r").rglob("*") if path.is_file()}
    _, out, _ = run("--seeds", "0", "2", "--from", "sft", "--dry-run")
    assert out.count("run 2_sft: has not run yet") == 1
    code, out, _ = run("--seeds", "0", "2", "--from", "sft")
    assert code == 0 and out.count("$ python -m tests.helpers.stand_in_step") == 2, (
        "seed 2's sft and reward model; seed 0 is the run's own"
    )
    whole, own, same = (json.loads(Path("runs/r", name, "run.json").read_text()) for name in (".", "seed2", "seed0"))
    assert same["steps"] == {name: entry for name, entry in whole["steps"].items() if name != "report"} | {
        "report": same["steps"]["report"]
    }
    assert own["steps"]["1_pretrain"] == whole["steps"]["1_pretrain"]
    assert own["steps"]["2_sft"]["values"]["seed"] == 2
    assert "runs/r/seed2/1_pretrain" in own["steps"]["2_sft"]["command"]
    assert Path("runs/r/seed2/1_pretrain/ran.txt").samefile("runs/r/1_pretrain/ran.txt")
    assert [of_run["seed"] for of_run in read_report()["runs"]] == [0, 2]
    for path, content in before.items():
        assert path.parent.name == "report" or path.read_bytes() == content
    _, out, _ = run("--seeds", "0", "2")
    assert out.count("$ ") == 1, "the command that resumes them only reports again"
    assert run("--seed", "2", "--output_dir", "runs/r/seed2")[1].count("$ ") == 0


def test_seeds_do_not_share_steps_that_have_not_run(run: Runner) -> None:
    run("--until", "pretrain")
    code, _, err = run("--seeds", "1", "--from", "reward")
    assert code == 2 and "2_sft: is needed first (has not run yet)" in err
    code, out, _ = run("--seeds", "1", "--from", "sft", "--dry-run")
    assert code == 0 and "run 2_sft: has not run yet" in out and "1_pretrain: has not" not in out
    assert not Path("runs/r/seed1").exists()


def test_options_apply_to_every_seed(run: Runner) -> None:
    code, out, _ = run("--seeds", "0", "1", "--dry-run", "--output_dir", "x")
    assert code == 0 and out.count("run 2_sft: has not run yet") == 2
    assert "seed 1, in x/seed1:" in out and "--output_dir x/seed1/2_sft" in out and not Path("x").exists()
    run("--seeds", "0", "1", "--smoke", "--until", "pretrain")
    assert sorted(path.name for path in Path("runs/r-smoke").glob("seed*")) == ["seed0", "seed1"]
    run("--seeds", "0", "1", "--output_dir", "x")
    for argv in (["--force", "sft"], ["--from", "sft"]):
        _, out, _ = run("--seeds", "0", "1", "--output_dir", "x", *argv)
        assert out.count("2_sft: finished, but asked to run again") == 2 and "-m tests.helpers.stand_in_step" in out
        assert times("x/seed1")["1_pretrain"] == 1


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seeds", "0", "1", "--seed", "2"], "argument --seed: not allowed with argument --seeds"),
        (["--seeds"], "argument --seeds: expected at least one argument"),
        (["--seeds", "0", "-1"], "--seeds: -1: must be between 0 and 4294967295"),
        (["--seeds", "0", "1", "0"], "--seeds: 0: is repeated; name each seed once"),
        (["--seeds", "0", "1", "--until", "dpo"], "--until: dpo: no such step"),
        (["--seeds", "0", "1", "--output_dir", "recipe/2_sft.yaml"], "output_dir: recipe/2_sft.yaml: is not a dir"),
    ],
)
def test_wrong_seeds_are_refused(run: Runner, argv: list[str], expected: str) -> None:
    code, _, err = run(*argv)
    assert code == 2
    assert expected in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_mistake_in_a_later_seed_is_found_before_the_first_one_runs(run: Runner) -> None:
    Path("runs/r/seed1").mkdir(parents=True)
    for name in ("2_sft", "3_reward"):
        Path("runs/r/seed1", name).touch()
    code, _, err = run("--seeds", "0", "1", "2")
    assert code == 2
    assert [line.split(": ")[1] for line in err.splitlines()] == ["runs/r/seed1/2_sft", "runs/r/seed1/3_reward"]
    assert not Path("runs/r/seed0").exists()


def test_a_seed_that_fails_ends_the_command_which_then_goes_on(folder: Path, run: Runner) -> None:
    configure(folder, "2_sft", fails=7)
    code, out, _ = run("--seeds", "0", "1")
    assert code == 7
    assert "seed 0 ended with exit code 7" in out
    assert not Path("runs/r/seed1").exists()
    code, out, _ = run("--seeds", "0", "1")
    assert code == 7 and "2_sft: was interrupted" in out and "seed 1 ended with exit code 7" in out
    code, out, _ = run("--seeds", "0", "1")
    assert code == 0
    assert times("runs/r/seed0")["1_pretrain"] == times("runs/r/seed1")["1_pretrain"] == 1
