"""What did not work in a run is named with its remedy; a run that did well, or is not to be judged, has no findings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.evaluation.intervals import outcome_mean
from pipeline.evaluation.results import StageResult
from pipeline.report.differences import differences
from pipeline.report.load import Run, load_run
from pipeline.report.path_picture import path_boxes
from pipeline.report.verdict import conclude, find_failures

LOST = {"rows": 98, "of": 700, "what": "conversations lose their end", "remedy": "raise max_length"}


def stage(name: str, history: list[dict[str, float]] | None = None, **outcomes: list[float]) -> StageResult:
    """Return a stage with these outcomes, by metric; `pass_at_1` is pass@1."""
    result = StageResult(name, state={"log_history": history or []})
    for argument, values in outcomes.items():
        metric = argument.replace("_at_", "@")
        result.metrics[metric] = outcome_mean(values)
        result.examples += [
            {"metric": metric, "id": number, "kind": "", "value": value} for number, value in enumerate(values)
        ]
    return result


def run_of(*stages: StageResult, **more: Any) -> Run:
    return Run(Path("none"), stages={one.name: one for one in stages}, name="none", **more)


def found(run: Run) -> dict[tuple[str, str], str]:
    """Return the remedy of each finding, by its stage and the first words of what is wrong."""
    return {(one.stage, " ".join(one.what.split()[:2]).lower()): one.remedy for one in find_failures(run)}


def test_a_run_that_learned_has_no_findings_and_says_what_it_reached(whole_run: Path, tmp_path: Path) -> None:
    assert main(["report", str(whole_run), "--output_dir", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert summary["verdict"] == []
    assert summary["conclusion"].startswith("All four stages did what they are for: better bits per byte, ")
    for file in ("index.html", "report.md"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert "All four stages did what they are for" in text and "not work" not in text


def test_a_run_that_learned_nothing_names_each_thing_that_failed() -> None:
    half, none = [1.0, 0.0] * 12, [0.0] * 24
    equal = [{"step": step, "frac_reward_zero_std": 1.0, "reward": 0.0, "reward_std": 0.0} for step in range(3)]
    sft = stage("2_sft", instruction_accuracy=none, stop_rate=none, pass_at_1=none)
    sft.overlap = {"problems": {"rows": 50, "found": 32, "trained_on": 731, "n": 13, "in": {"pairs": 32}}}
    run = run_of(
        stage("1_pretrain", instruction_accuracy=none, pass_at_1=none),
        sft,
        stage("3_reward", reward_accuracy=half),
        stage("3_ppo", [{"step": 1, "reward_std": 0.0}], win_rate=half, stop_rate=none, pass_at_1=none),
        stage("4_grpo", equal, pass_at_1=none, stop_rate=none),
        baselines={"elicited": stage("elicited", pass_at_1=[1.0] * 12 + [0.0] * 12)},
    )
    run.steps = {"2_sft": {"lost": [LOST, LOST | {"rows": 3}]}}
    remedies = found(run)
    assert list(remedies) == [
        ("2_sft", "98 of"),
        ("2_sft", "32 of"),
        ("2_sft", "stop rate"),
        ("2_sft", "instruction accuracy"),
        ("3_reward", "reward accuracy"),
        ("3_ppo", "all rewards"),
        ("3_ppo", "win rate"),
        ("4_grpo", "in 100%"),
        ("4_grpo", "pass@1 went"),
        ("4_grpo", "pass@1 is"),
    ]
    assert remedies["2_sft", "98 of"] == "raise max_length"
    assert "PPO would optimise noise" in remedies["3_reward", "reward accuracy"]
    assert "num_generations" in remedies["4_grpo", "in 100%"]
    assert conclude(run, find_failures(run)) == "10 things did not work, in 2_sft, 3_reward, 3_ppo, 4_grpo"


@pytest.mark.parametrize("smoke", [True, False])
def test_a_miniature_is_named_and_not_judged(short_run: Path, tmp_path: Path, smoke: bool) -> None:
    run = shutil.copytree(short_run, tmp_path / "run")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["steps"]["2_sft"]["lost"] = [LOST]
    (run / "run.json").write_text(json.dumps(record | {"smoke": smoke}))
    loaded = load_run(run)
    findings = find_failures(loaded)
    assert [one.stage for one in findings] == ([] if smoke else ["2_sft"])
    name = "recipes/pocket, smoke: two steps of each stage; the figures mean nothing"
    assert (conclude(loaded, findings) == name) == smoke


def test_nothing_is_invented_about_what_was_not_measured() -> None:
    right = [1.0] * 20
    for run in (
        run_of(),
        run_of(StageResult("2_sft")),
        run_of(stage("2_sft", instruction_accuracy=right)),
        run_of(stage("0_base", instruction_accuracy=right), stage("4_grpo", mean_length=[3.0, 4.0])),
        # Two answers are too few for an interval over pairs.
        run_of(stage("3_reward", reward_accuracy=[1.0] * 9), stage("3_ppo", pass_at_1=[0.0] * 9)),
    ):
        assert find_failures(run) == [], run.stages
    assert conclude(run_of(), []) == ""


def test_a_stage_that_was_not_compared_or_not_measured_is_named_and_not_praised() -> None:
    poor, right = [0.0] * 20, [1.0] * 20
    assert conclude(run_of(stage("2_sft", instruction_accuracy=right)), []) == (
        "Not compared with an earlier stage: 2_sft"
    )
    sft = stage("2_sft", instruction_accuracy=right, pass_at_1=poor)
    grpo = stage("4_grpo", pass_at_1=right)
    first = stage("1_pretrain", instruction_accuracy=poor)
    assert conclude(run_of(first, sft, grpo), []) == (
        "Both stages that were compared did what they are for: better instruction accuracy, pass@1; "
        "not measured: 1_pretrain"
    )
    # Without the file of the rows there is nothing to compare row by row.
    grpo.examples = []
    assert conclude(run_of(stage("0_base", instruction_accuracy=poor), sft, grpo), []) == (
        "The stage that was compared did what it is for: better instruction accuracy; "
        "not compared with an earlier stage: 4_grpo"
    )
    whole = run_of(stage("0_base", instruction_accuracy=poor), sft, stage("4_grpo", pass_at_1=right))
    assert conclude(whole, []) == "Both stages did what they are for: better instruction accuracy, pass@1"


@pytest.mark.parametrize(("after", "works"), [(0.9, True), (0.1, False)])
def test_a_stage_that_only_an_environment_rewards_is_judged_by_its_reward(after: float, works: bool) -> None:
    """The step rate, of which neither more nor less is better, was its aim: it always failed."""
    before = stage("3_ppo", environment_reward=[0.1, 0.2] * 50, step_rate=[0.0] * 100)
    run = run_of(before, stage("4_grpo", environment_reward=[after, 0.2] * 50, step_rate=[1.0] * 100))
    assert found(run).keys() == (set() if works else {("4_grpo", "reward went")})
    if works:
        assert "better reward" in conclude(run, [])


def test_variants_of_a_stage_are_compared_with_their_start_and_with_the_first_of_them() -> None:
    steps: dict[str, Any] = {}
    # The name of a step may differ from its folder's.
    for name, folder in (("4_grpo", "4_grpo"), ("4_dapo", "4_grpo_dapo")):
        values = {"model_name_or_path": "runs/pocket/3_ppo", "output_dir": f"runs/losses/{folder}"}
        steps[name] = {"values": values}
    stages = [stage(name, pass_at_1=[1.0, 0.0] * 10) for name in ("0_base", "4_grpo", "4_grpo_dapo")]
    pairs = [(one.stage, one.before) for one in differences(run_of(*stages, steps=steps))]
    assert pairs == [("4_grpo", "0_base"), ("4_grpo_dapo", "0_base"), ("4_grpo_dapo", "4_grpo")]


def test_a_stage_is_compared_with_the_one_that_it_started_from() -> None:
    poor, good = [0.0] * 30, [1.0] * 30
    stages = stage("2_sft", pass_at_1=poor), stage("3_ppo", pass_at_1=good), stage("4_grpo", pass_at_1=good)
    assert list(found(run_of(*stages))) == [("4_grpo", "pass@1 went")]
    steps = {"4_grpo": {"values": {"model_name_or_path": "runs/mine/2_sft"}}}
    assert found(run_of(*stages, steps=steps)) == {}


@pytest.mark.parametrize(("right", "beats"), [(12, True), (24, False)])
def test_a_stage_has_to_beat_its_baselines(right: int, beats: bool) -> None:
    """One that gains, but no more than a beginning of the answer does, brought nothing."""
    run = run_of(
        stage("2_sft", pass_at_1=[0.0] * 30),
        stage("4_grpo", pass_at_1=[1.0] * 26 + [0.0] * 4),
        baselines={"elicited": stage("elicited", pass_at_1=[1.0] * right + [0.0] * (30 - right))},
    )
    assert list(found(run)) == ([] if beats else [("4_grpo", "pass@1 is")])


@pytest.mark.parametrize("name", ["best_of_4", "one of another release"])
def test_a_stage_need_not_beat_every_baseline(name: str) -> None:
    run = run_of(
        stage("2_sft", pass_at_1=[0.0] * 30),
        stage("4_grpo", pass_at_1=[1.0] * 26 + [0.0] * 4),
        baselines={name: stage(name, pass_at_1=[1.0] * 30)},
    )
    assert found(run) == {} and path_boxes(run, {})[-1]["figure"]["baselines"] == []


@pytest.mark.parametrize(("right", "fails"), [(9, True), (60, False)])
def test_a_significant_gain_that_leaves_nearly_all_answers_wrong_is_named(right: int, fails: bool) -> None:
    sft = stage("2_sft", instruction_accuracy=[1.0] * right + [0.0] * (400 - right))
    run = run_of(stage("1_pretrain", instruction_accuracy=[0.0] * 400), sft)
    assert (("2_sft", "instruction accuracy") in found(run)) is fails
