"""What did not work in a run is named with its remedy; a run that did well, or is not to be judged, has no findings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.evaluation.results import StageResult
from pipeline.report.load import Run, load_run
from pipeline.report.page import remarks
from pipeline.report.path_picture import headline, path_boxes
from pipeline.report.verdict import conclude, find_failures, find_unjudged
from pipeline.runner.plan import read_plan
from pipeline.stages import STAGES
from pipeline.stages.kinds import StageKind
from tests.helpers.small_model import ROOT

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
    return Run(Path("none"), stages={stage.name: stage for stage in stages}, name="none", **more)


def remedies_of(run: Run) -> dict[tuple[str, str], str]:
    """Return the remedy of each finding, by its stage and the first words of what is wrong."""
    return {
        (finding.stage, " ".join(finding.what.split()[:2]).lower()): finding.remedy for finding in find_failures(run)
    }


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
    remedies = remedies_of(run)
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
    assert [finding.stage for finding in findings] == ([] if smoke else ["2_sft"])
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


def test_the_conclusion_counts_the_stages_that_were_compared_and_names_the_others() -> None:
    poor, right = [0.0] * 20, [1.0] * 20
    assert conclude(run_of(stage("2_sft", instruction_accuracy=right)), []) == (
        "2_sft was not compared (what it started from was not measured)"
    )
    sft = stage("2_sft", instruction_accuracy=right, pass_at_1=poor)
    grpo = stage("4_grpo", pass_at_1=right)
    first = stage("1_pretrain", instruction_accuracy=poor)
    assert conclude(run_of(first, sft, grpo), []) == (
        "Two of three stages did what they are for: better instruction accuracy, pass@1; "
        "1_pretrain was not measured in its aim (Bits per byte)"
    )
    base = stage("0_base", instruction_accuracy=poor)
    assert conclude(run_of(base, sft), []) == "The stage did what it is for: better instruction accuracy"
    assert conclude(run_of(base, sft, grpo), []) == (
        "Both stages did what they are for: better instruction accuracy, pass@1"
    )
    # Without the file of the rows there is nothing to compare row by row.
    grpo.examples = []
    assert conclude(run_of(base, sft, grpo), []) == (
        "One of two stages did what it is for: better instruction accuracy; "
        "4_grpo was not compared with 2_sft (they have no example of pass@1 in common)"
    )


def test_a_stage_is_compared_with_the_one_that_it_started_from() -> None:
    poor, good = [0.0] * 30, [1.0] * 30
    stages = stage("2_sft", pass_at_1=poor), stage("3_ppo", pass_at_1=good), stage("4_grpo", pass_at_1=good)
    assert list(remedies_of(run_of(*stages))) == [("4_grpo", "pass@1 went")]
    steps = {"4_grpo": {"values": {"model_name_or_path": "runs/mine/2_sft"}}}
    assert remedies_of(run_of(*stages, steps=steps)) == {}


@pytest.mark.parametrize(("right", "beats"), [(12, True), (24, False)])
def test_a_stage_has_to_beat_its_baselines(right: int, beats: bool) -> None:
    """One that gains, but no more than a beginning of the answer does, brought nothing."""
    run = run_of(
        stage("2_sft", pass_at_1=[0.0] * 30),
        stage("4_grpo", pass_at_1=[1.0] * 26 + [0.0] * 4),
        baselines={"elicited": stage("elicited", pass_at_1=[1.0] * right + [0.0] * (30 - right))},
    )
    assert list(remedies_of(run)) == ([] if beats else [("4_grpo", "pass@1 is")])


@pytest.mark.parametrize("name", ["best_of_4", "one of another release"])
def test_a_stage_need_not_beat_every_baseline(name: str) -> None:
    run = run_of(
        stage("2_sft", pass_at_1=[0.0] * 30),
        stage("4_grpo", pass_at_1=[1.0] * 26 + [0.0] * 4),
        baselines={name: stage(name, pass_at_1=[1.0] * 30)},
    )
    assert remedies_of(run) == {} and path_boxes(run, {})[-1]["figure"]["baselines"] == []


@pytest.mark.parametrize(("right", "fails"), [(9, True), (60, False)])
def test_a_significant_gain_that_leaves_nearly_all_answers_wrong_is_named(right: int, fails: bool) -> None:
    sft = stage("2_sft", instruction_accuracy=[1.0] * right + [0.0] * (400 - right))
    run = run_of(stage("1_pretrain", instruction_accuracy=[0.0] * 400), sft)
    assert (("2_sft", "instruction accuracy") in remedies_of(run)) is fails


@pytest.mark.parametrize("kind", [kind for kind, info in STAGES.items() if info.aims])
def test_a_stage_that_missed_its_aim_gets_the_remedy_of_its_kind(kind: str) -> None:
    outcomes = {STAGES[kind].aims[0].replace("@", "_at_"): [1.0, 0.0] * 12}
    findings = find_failures(run_of(stage("0_random", **outcomes), stage(f"3_{kind}", **outcomes)))
    assert [finding.remedy for finding in findings] == [STAGES[kind].remedy]
    assert STAGES[kind].remedy != StageKind().remedy


REWARDS = [0.05, 0.1, 0.15] * 10


@pytest.mark.parametrize("gain", [0.8, 0.0, -0.5])
def test_a_stage_that_only_an_environment_rewards_is_judged_by_its_rewards(gain: float) -> None:
    """Its answers show steps now, which is neither good nor bad."""
    run = run_of(
        stage("2_sft", environment_reward=REWARDS, step_rate=[0.0] * 30),
        stage("4_grpo", environment_reward=[reward + gain for reward in REWARDS], step_rate=[1.0] * 30),
    )
    findings = find_failures(run)
    figure = f"{0.1 + gain:.2f}".replace("-", "−")
    assert f"{figure} mean reward of the environment (0.10 before)" in headline(run)
    if gain > 0:
        assert findings == []
        assert "One of two stages did what it is for: better reward;" in conclude(run, findings)
        return
    (finding,) = findings
    assert finding.stage == "4_grpo"
    assert finding.what.startswith(f"reward went from 0.100 (2_sft) to {0.1 + gain:.3f}".replace("-", "−"))
    assert ("a loss (−0.500, " if gain else "no significant gain (0.000, ") in finding.what
    assert ", n = 30)" in finding.what and "better" not in conclude(run, findings)


def test_an_environment_whose_rewards_fall_is_named_although_more_answers_are_right() -> None:
    run = run_of(
        stage("2_sft", pass_at_1=[0.0] * 30, environment_reward=REWARDS),
        stage("4_grpo", pass_at_1=[1.0] * 30, environment_reward=[reward - 1 for reward in REWARDS]),
    )
    assert list(remedies_of(run)) == [("4_grpo", "reward went")]


VERIFIER = {"judge": "pipeline.rewards.functions:reasoning_gym"}
GRADED = {"grade": "reasoning_gym"}
FROM_PAIRS = {"dataset_name": ["runs/x/3_preferences", "runs/x/data/preference/train.parquet"]}
FROM_REWARD_MODEL = {"reward_model_path": ["runs/x/3_reward"]}


def steps_of(
    preferences: dict[str, Any], problems: Any, kind: str, tuning: dict[str, Any], reward: Any = None
) -> dict[str, Any]:
    """Return the recorded steps of a run whose stage 3, of a kind such as "ppo", has these settings."""
    settings = {
        "0_data": {"output_dir": "runs/x/data"},
        "3_preferences": {"output_dir": "runs/x/3_preferences", **preferences},
        "3_reward": {"output_dir": "runs/x/3_reward", **(reward or FROM_PAIRS)},
        f"3_{kind}": {"output_dir": f"runs/x/3_{kind}", "model_name_or_path": "runs/x/2_sft", **tuning},
        f"evaluate_3_{kind}": {"problems": problems},
    }
    return {name: {"values": values} for name, values in settings.items()}


@pytest.mark.parametrize(
    ("preferences", "problems", "kind", "tuning"),
    [
        (VERIFIER, GRADED, "ppo", FROM_REWARD_MODEL),
        # Without `grade`, these two grade.
        ({"judge": "pipeline.rewards.functions:exact_answer"}, {}, "ppo", FROM_REWARD_MODEL),
        ({"judge": "mine:right"}, {"grade": "mine:right"}, "ppo", FROM_REWARD_MODEL | {"reward_funcs": ["call_cost"]}),
        ({}, {"grade": "math"}, "ppo", {"reward_funcs": ["math_answer"]}),
        (VERIFIER, GRADED, "dpo", {"dataset_name": "runs/x/3_preferences"}),
    ],
)
def test_preference_tuning_is_for_right_answers_if_the_grader_preferred_them(
    preferences: dict[str, Any], problems: Any, kind: str, tuning: dict[str, Any]
) -> None:
    """As in recipes/smollm2, where nobody can judge a win rate."""
    name = f"3_{kind}"
    sft, tuned = stage("2_sft", pass_at_1=[0.0] * 30), stage(name, pass_at_1=[1.0] * 26 + [0.0] * 4)
    steps = steps_of(preferences, problems, kind, tuning)
    run = run_of(sft, tuned, steps=steps)
    assert find_failures(run) == [] and f"{name} was" not in conclude(run, [])
    assert conclude(run, []).startswith("One of two stages did what it is for: better pass@1; ")
    assert headline(run).endswith("87% of unseen problems solved (0% before).")
    # One that gains nothing in it has failed, whatever its win rate.
    tuned = stage(name, pass_at_1=[0.0] * 30, win_rate=[1.0] * 30)
    assert (name, "pass@1 went") in remedies_of(run_of(sft, tuned, steps=steps))


@pytest.mark.parametrize(
    ("preferences", "problems", "kind", "tuning", "reward"),
    [
        ({}, GRADED, "ppo", FROM_REWARD_MODEL, None),
        ({"judge": "mine:polite"}, GRADED, "ppo", FROM_REWARD_MODEL, None),
        (VERIFIER, {"grade": "exact"}, "ppo", FROM_REWARD_MODEL, None),
        (VERIFIER, None, "ppo", FROM_REWARD_MODEL, None),
        (VERIFIER, GRADED, "ppo", FROM_REWARD_MODEL, {"dataset_name": ["runs/x/3_preferences", "runs/x/votes"]}),
        (VERIFIER, GRADED, "ppo", FROM_REWARD_MODEL | {"reward_funcs": ["mine:polite"]}, None),
        (VERIFIER, GRADED, "ppo", {"reward_model_path": "someone/else"}, None),
        # Where prompts come from says nothing.
        (VERIFIER, GRADED, "ppo", {"dataset_name": "runs/x/3_preferences", "reward_funcs": ["call_cost"]}, None),
        ({"preferred_column": "answer"}, GRADED, "dpo", {"dataset_name": "runs/x/3_preferences"}, None),
    ],
)
def test_preference_tuning_is_for_liked_answers_if_anyone_else_preferred_them(
    preferences: dict[str, Any], problems: Any, kind: str, tuning: dict[str, Any], reward: Any
) -> None:
    sft, tuned = stage("2_sft", pass_at_1=[0.0] * 30), stage(f"3_{kind}", pass_at_1=[1.0] * 30)
    run = run_of(sft, tuned, steps=steps_of(preferences, problems, kind, tuning, reward))
    assert f"3_{kind} was not measured in its aim (Win rate)" in conclude(run, [])


@pytest.mark.parametrize(("recipe", "aim"), [("smollm2", "pass@1"), ("pocket", "win_rate")])
def test_what_a_recipe_tunes_preferences_for(recipe: str, aim: str) -> None:
    plan = read_plan(ROOT / "recipes" / recipe)
    run = run_of(StageResult("3_ppo"), steps={step.name: {"values": step.values} for step in plan.steps})
    assert run.aims_of(run.stages["3_ppo"])[0] == aim


BITS, ACCURACY, WIN, PASS = "bits per byte", "instruction accuracy", "win rate", "pass@1"


@pytest.mark.parametrize(
    ("removed", "stages", "better", "named"),
    [
        (
            ["evaluations/0_random.*"],
            "Three of four",
            [ACCURACY, WIN, PASS],
            ["1_pretrain was not compared (0_random was not measured)"],
        ),
        (
            ["evaluations/0_random.*", "0_random"],
            "Three of four",
            [ACCURACY, WIN, PASS],
            ["1_pretrain was not compared (0_random was not measured)"],
        ),
        (["evaluations/2_sft.*"], "Three of four", [BITS, WIN, PASS], ["2_sft was not measured"]),
        (["evaluations/2_sft.*", "2_sft"], "Three of four", [BITS, WIN, PASS], ["2_sft was not measured"]),
        (
            # Win rates were measured against `2_sft`, and have intervals of their own.
            ["evaluations/*.jsonl"],
            "One of four",
            [WIN],
            [
                "1_pretrain was not compared with 0_random (they have no example of Bits per byte in common)",
                "2_sft was not compared with 1_pretrain (they have no example of Instruction accuracy in common)",
                "3_ppo was not compared with constant (they have no example in common)",
                "4_grpo was not compared with 3_ppo (they have no example of pass@1 in common)",
                "4_grpo was not compared with elicited (they have no example in common)",
            ],
        ),
        (["evaluations/3_reward.*"], "All four", [BITS, ACCURACY, WIN, PASS], ["3_reward was not measured"]),
        (["evaluations/4_grpo.*", "4_grpo"], "Three of four", [BITS, ACCURACY, WIN], ["4_grpo was not measured"]),
        (["evaluations"], "", [], ["1_pretrain was not measured", "4_grpo was not measured"]),
    ],
)
def test_what_was_not_measured_or_not_compared_is_named_and_not_praised(
    whole_run: Path, tmp_path: Path, removed: list[str], stages: str, better: list[str], named: list[str]
) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    for path in [path for pattern in removed for path in run.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))
    assert summary["verdict"] == [] and set(named) <= set(summary["not_judged"])
    praise = f"{stages} stages did what {'it is' if stages == 'One of four' else 'they are'} for: better "
    praise = praise + ", ".join(better) + "; " if better else ""
    assert summary["conclusion"] == praise + "; ".join(summary["not_judged"])
    for file in ("index.html", "report.md"):
        assert summary["conclusion"] in (run / "report" / file).read_text(encoding="utf-8")


def test_a_run_in_which_something_failed_also_names_what_was_not_judged(whole_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    (run / "evaluations" / "0_random.json").unlink()
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["steps"]["2_sft"]["lost"] = [LOST]
    (run / "run.json").write_text(json.dumps(record))
    assert main(["report", str(run)]) == 0
    for file in ("index.html", "report.md"):
        text = (run / "report" / file).read_text(encoding="utf-8")
        assert "98 of 700 conversations" in text and "1_pretrain was not compared (0_random was not measured)" in text


def test_a_reward_model_without_an_interval_is_not_judged() -> None:
    run = run_of(stage("3_reward"), stage("3_judge"))
    run.stages["3_reward"].metrics["reward_accuracy"] = Estimate(0.9)
    assert find_failures(run) == []
    assert find_unjudged(run) == [
        "3_reward was not judged (too few examples for an interval)",
        "3_judge was not measured",
    ]


@pytest.mark.parametrize("kind", [*(kind for kind, info in STAGES.items() if info.data), "data", "evaluate"])
@pytest.mark.parametrize(("rows", "is_named"), [(500, True), (20, False)])
def test_a_step_of_any_kind_that_loses_many_rows_is_named(
    whole_run: Path, tmp_path: Path, kind: str, rows: int, is_named: bool
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("report"))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    step = "evaluate_2_sft" if kind == "evaluate" else f"3_{kind}"
    lost = [{"rows": rows, "of": 1500, "what": "rows are dropped", "remedy": "raise max_length"}]
    record["steps"][step] = {**record["steps"].get(step, {}), "lost": lost}
    (run / "run.json").write_text(json.dumps(record))
    assert main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "metrics.json").read_text(encoding="utf-8"))
    named = [(finding["stage"], finding["value"], finding["remedy"]) for finding in summary["verdict"]]
    assert named == ([(step, pytest.approx(1 / 3), "raise max_length")] if is_named else [])
    text = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert f"{step}: {rows} of 1,500 rows are dropped" in text


@pytest.mark.parametrize(
    ("values", "more", "is_named"),
    [
        ({"load_best_model_at_end": True}, {"evaluated_on": "test"}, True),
        ({"load_best_model_at_end": True, "dataset_test_split": "test"}, {}, True),
        ({"load_best_model_at_end": True}, {}, False),
        ({}, {"evaluated_on": "test"}, False),
    ],
)
def test_a_checkpoint_that_was_chosen_on_the_test_rows_is_named(
    values: dict[str, Any], more: dict[str, Any], is_named: bool
) -> None:
    lines = remarks(run_of(stage("2_sft"), steps={"2_sft": {"values": values, **more}}))
    assert ["2_sft: its best checkpoint was chosen on the split test" in line for line in lines] == [True] * is_named


def test_promises_about_what_was_not_measured_are_not_kept(whole_run: Path, tmp_path: Path) -> None:
    targets = tmp_path / "targets.yaml"
    targets.write_text(
        "- {stage: 1_pretrain, metric: bits_per_byte, at_most: 2}\n- {stage: 5_more, metric: pass@1, at_least: 0.5}\n"
    )
    assert main(["report", str(whole_run), "--output_dir", str(tmp_path), "--targets", str(targets)]) == 0
    for file in ("index.html", "report.md"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert "1 of 2 promised figures is kept, 1 was not measured." in text
    summary = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert len(summary["promises"]) == 1
    assert summary["promises_not_measured"] == ["pass@1 of 5_more at least 0.50"]
