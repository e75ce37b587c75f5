"""Differences, targets, axes and curves, on figures small enough to check by hand."""

import json
import math
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.intervals import Estimate, outcome_mean
from pipeline.evaluation.metric_info import METRICS
from pipeline.evaluation.results import StageResult
from pipeline.report.curves import Chart, Series, charts_of, layout, overlay, ticks
from pipeline.report.differences import differences, paired_difference
from pipeline.report.load import Run, load_run, step_order
from pipeline.report.page import experts, page_content, render
from pipeline.report.path_picture import path_boxes
from pipeline.report.summary import summarise
from pipeline.report.targets import Target, check_targets, load_targets
from pipeline.report.text import duration, magnitude, number, signed
from pipeline.report.verdict import conclude, find_failures, find_unjudged
from pipeline.stages import STAGES
from tests.helpers.fake_run import write_run


def run_with(**values: float) -> Run:
    """Return a run of two stages, `before` and `after` the pass@1 of each."""
    stages = {
        "3_ppo": StageResult("3_ppo", {"pass@1": Estimate(values["before"], 0.1, 0.9, 10)}),
        "4_grpo": StageResult("4_grpo", {"pass@1": Estimate(values["after"], 0.2, 0.95, 10)}),
    }
    return Run(Path("run"), stages=stages)


def test_paired_difference_uses_shared_examples_and_weights() -> None:
    earlier = {"a": (1.0, 1.0, ""), "b": (2.0, 3.0, ""), "only before": (9.0, 1.0, "")}
    later = {"a": (3.0, 1.0, ""), "b": (1.0, 3.0, ""), "only after": (9.0, 1.0, "")}
    change = paired_difference(earlier, later)
    assert change is not None
    assert change.value == pytest.approx((2.0 * 1 + -1.0 * 3) / 4)
    assert change.n == 2
    assert change.low is not None and change.high is not None and change.low <= change.value <= change.high


def test_without_shared_examples_there_is_no_difference() -> None:
    assert paired_difference({"a": (1.0, 1.0, "")}, {"b": (1.0, 1.0, "")}) is None


def test_an_unchanged_metric_is_the_same() -> None:
    run = run_with(before=0.5, after=0.5)
    for stage in run.stages.values():
        stage.examples = [{"metric": "pass@1", "id": i, "value": float(i % 2)} for i in range(20)]
    (change,) = differences(run)
    assert change.change.value == 0 and change.verdict == "same"
    # One gain and one loss more in 22: 1.96 * sqrt(2 / 22 / 22).
    assert (
        change.change.high == pytest.approx(1.96 * 2**0.5 / 22, abs=1e-4) and change.change.low == -change.change.high
    )


@pytest.mark.parametrize(
    ("target", "measured", "met"),
    [
        (Target("4_grpo", "pass@1", at_least=0.8), 0.87, True),
        (Target("4_grpo", "pass@1", at_least=0.8, lower_end=True), 0.2, False),
        (Target("4_grpo", "pass@1", at_most=0.8), 0.87, False),
        # A promise is kept if it is met to the last digit.
        (Target("4_grpo", "pass@1", against="3_ppo", at_least=-0.03), -0.03, True),
        (Target("4_grpo", "pass@1", against="3_ppo", how="ratio", at_most=0.9), 0.87 / 0.9, False),
    ],
)
def test_targets_are_met_or_missed(target: Target, measured: float, met: bool) -> None:
    (result,) = check_targets(run_with(before=0.9, after=0.87), [], [target])
    assert result["measured"] == pytest.approx(measured)
    assert result["kept"] is met


def test_a_stage_is_compared_with_the_baselines_of_its_aims(whole_run: Path) -> None:
    run = load_run(whole_run)
    changes = {
        (item.stage, item.reference, item.metric): item for item in differences(run) if item.reference in run.baselines
    }
    assert set(changes) == {
        ("3_ppo", "constant", "win_rate"),
        ("3_ppo", "constant", "win_rate_greedy"),
        ("4_grpo", "elicited", "pass@1"),
        ("4_grpo", "majority", "pass@1"),
    }
    for (stage, baseline, metric), item in changes.items():
        of, by = run.stages[stage].outcomes(metric), run.baselines[baseline].outcomes(metric)
        by_hand = sum(of[key][0] - by[key][0] for key in of) / len(of)
        assert item.change.value == pytest.approx(by_hand) and item.change.n == len(of) == 60
    assert changes["4_grpo", "elicited", "pass@1"].verdict == "better"


def test_targets_may_be_about_baselines(whole_run: Path) -> None:
    run = load_run(whole_run)
    targets = [
        Target("constant", "win_rate", at_most=0.0),
        Target("4_grpo", "pass@1", against="elicited", at_least=0.15),
        Target("4_grpo", "pass@1", against="elicited", how="interval", at_least=0.0),
    ]
    baseline, gain, lower_end_of_gain = check_targets(run, differences(run), targets)
    assert baseline["measured"] == run.baselines["constant"].metrics["win_rate"].value and not baseline["kept"]
    assert lower_end_of_gain["measured"] < gain["measured"]
    assert gain["kept"] and lower_end_of_gain["kept"]
    assert gain["promise"] == "pass@1 of 4_grpo minus elicited: at least 0.15"


@pytest.mark.parametrize(
    "target",
    [
        Target("constant", "win_rate", at_least=0.5),
        Target("4_grpo", "pass@1", against="elicited", at_least=0.5),
        Target("2_sft", "pass@1", at_least=0.5),
        Target("4_grpo", "win_rate", at_least=0.5),
        Target("4_grpo", "pass@1", against="2_sft", at_least=0.5),
        Target("4_grpo", "pass@1", against="3_ppo", how="interval", at_least=0.0),
    ],
)
def test_a_target_without_a_figure_is_left_out(target: Target) -> None:
    assert check_targets(run_with(before=0.9, after=0.87), [], [target]) == []


def test_the_recipe_has_targets_for_every_stage() -> None:
    targets = load_targets()
    assert {target.stage for target in targets} == {"1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo", "constant"}
    assert {target.metric for target in targets} <= set(METRICS)
    assert len({str(target) for target in targets}) == len(targets)


def test_aims_are_metrics() -> None:
    assert {aim for info in STAGES.values() for aim in info.aims} <= set(METRICS)


def test_steps_are_in_the_order_of_the_run() -> None:
    names = ["report", "evaluate_2_sft", "3_reward", "2_sft", "3_preferences", "0_tokenizer", "0_random", "0_data"]
    expected = ["0_data", "0_tokenizer", "0_random", "2_sft", "evaluate_2_sft", "3_preferences", "3_reward", "report"]
    assert sorted(names, key=step_order) == expected


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9).filter(lambda width: width > 0))
def test_ticks_are_round_few_and_inside(low: float, width: float) -> None:
    high = low + width
    if high - low < abs(low) * 1e-9:
        return
    values = ticks(low, high)
    assert 1 <= len(values) <= 6
    slack = (high - low) * 1e-6 + abs(low) * 1e-9
    assert all(low - slack <= tick <= high + slack for tick in values)


POINTS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(-1e6, 1e6)), min_size=2, max_size=150)


@given(POINTS, st.booleans())
def test_any_curve_is_drawn_inside_of_its_chart(points: list[tuple[float, float]], dots: bool) -> None:
    chart = Chart("2_sft", "Loss <&>", "steps", (Series("training", points, dots),))
    svg = ElementTree.fromstring(render("chart.html.jinja", layout(chart)))
    assert svg.get("role") == "img" and "Loss <&>" in (svg.get("aria-label") or "")
    for circle in svg.iter("circle"):
        x, y = float(circle.get("cx", "nan")), float(circle.get("cy", "nan"))
        assert 0 <= x <= 360 and 0 <= y <= 210 and math.isfinite(x + y)


def test_curves_come_from_the_newest_checkpoint(whole_run: Path, tmp_path: Path) -> None:
    for step in (5, 40, 100):
        folder = tmp_path / "1_pretrain" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        history = [{"step": i, "loss": float(step)} for i in range(3)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": step}))
    (chart,) = charts_of(load_run(tmp_path))
    assert chart.series[0].points == [(0.0, 100.0), (1.0, 100.0), (2.0, 100.0)]


def test_a_whole_run_has_every_curve(whole_run: Path) -> None:
    titles = {(chart.stage, chart.title.split(",")[0]) for chart in charts_of(load_run(whole_run))}
    assert titles >= {
        ("1_pretrain", "Loss"),
        ("1_pretrain", "Bits per byte"),
        ("3_reward", "Reward-model accuracy"),
        ("3_ppo", "Reward-model score against KL"),
        ("3_ppo", "Hidden taste against KL"),
        ("4_grpo", "Reward"),
        ("4_grpo", "Entropy"),
        ("4_grpo", "Answer length"),
    }


def test_score_and_taste_of_ppo_are_drawn_against_its_kl(tmp_path: Path) -> None:
    def record(step: int) -> dict[str, float]:
        return {"step": step, "reward": 10.0 + step, "objective/kl": step / 10, "objective/scores": 0.0,
                "rewards/reward/mean": 10.0 + step, "rewards/hidden_taste/mean": float(step),
                "rewards/hidden_taste/std": 9.0}  # fmt: skip

    folder = tmp_path / "3_ppo"
    folder.mkdir()
    history = [record(step) for step in (1, 2, 3)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 3}))
    charts = {chart.title: chart.series[0].points for chart in charts_of(load_run(tmp_path))}
    assert charts["Reward-model score against KL"] == [(0.1, 11.0), (0.2, 12.0), (0.3, 13.0)]
    assert charts["Hidden taste against KL"] == [(0.1, 1.0), (0.2, 2.0), (0.3, 3.0)]


def test_rewards_beside_the_model_are_drawn_apart_from_its_score(tmp_path: Path) -> None:
    def record(step: int) -> dict[str, float]:
        return {"step": step, "reward": -20.0 * step, "objective/kl": step / 10, "rewards/judge/mean": 1.0 * step,
                "rewards/brevity/mean": -1.0 * step, "rewards/hidden_taste/mean": 0.5}  # fmt: skip

    folder = tmp_path / "3_ppo"
    folder.mkdir()
    history = [record(step) for step in (1, 2)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 2}))
    charts = {chart.title: chart for chart in charts_of(load_run(tmp_path))}
    lines = {line.name: line.points for line in charts["Rewards against KL"].series}
    assert lines == {"brevity": [(0.1, -1.0), (0.2, -2.0)], "judge": [(0.1, 1.0), (0.2, 2.0)]}
    assert {line.name for line in charts["Rewards"].series} == {"brevity", "judge"}
    assert charts["Hidden taste against KL"].series[0].points == [(0.1, 0.5), (0.2, 0.5)]


def test_the_last_values_stand_beside_their_lines_without_covering_each_other() -> None:
    lines = tuple(Series(str(i), [(1.0, 0.0), (2.0, 1 - i / 1000)]) for i in range(6))
    svg = ElementTree.fromstring(render("chart.html.jinja", layout(Chart("2_sft", "Loss", "training steps", lines))))
    ends = [(float(text.get("y", "nan")), text.text) for text in svg.iter("text") if text.get("class")]
    assert [value for _, value in ends] == ["1.00", "0.999", "0.998", "0.997", "0.996", "0.995"]
    assert all(10 <= above[0] <= below[0] - 12 <= 200 for above, below in pairwise(ends))
    assert len(list(svg.iter("circle"))) == 6 * 2, "few points are marked"
    assert "0.0" in [text.text for text in svg.iter("text")], "steps start at 0"


def test_several_runs_share_each_chart(whole_run: Path, short_run: Path) -> None:
    charts = overlay([load_run(whole_run), load_run(short_run)])
    loss = next(chart for chart in charts if chart.stage == "1_pretrain")
    assert [line.name for line in loss.series] == ["pocket", "short"]
    assert len(next(chart for chart in charts if chart.stage == "4_grpo").series) == 1


def test_numbers_read_well() -> None:
    assert (number(-0.5, 2), signed(0.5, 1), number(None), signed(None)) == ("−0.50", "+0.5", "–", "–")
    assert (number(-0.0001, 2), signed(-0.0001, 2), signed(0.0, 1), signed(1e-9, 2)) == (
        "0.00",
        "0.00",
        "0.0",
        "0.00",
    )
    # Halves are rounded alike, wherever floating point puts them.
    assert (
        number(-0.0025) == number(-0.00249999999999) == "−0.003" and number(80.5, 0) == number(0.805 * 100, 0) == "81"
    )
    assert [duration(x) for x in (None, 9.44, 59.96, 98.1, 7500)] == [
        "–",
        "9.4 s",
        "1 min 0 s",
        "1 min 38 s",
        "2 h 5 min",
    ]
    assert [magnitude(x) for x in (None, 80, 1234, 1.97e6, 999_600, 5.76e13)] == [
        "–",
        "80",
        "1.23 k",
        "1.97 M",
        "1 M",
        "57.6 T",
    ]


def test_a_second_pretraining_is_beside_the_first_and_not_before_the_next_stage() -> None:
    stages = {
        name: StageResult(
            name,
            {"bits_per_byte": Estimate(bits, None, None, 2)},
            [{"metric": "bits_per_byte", "id": letter, "value": bits} for letter in "ab"],
        )
        for name, bits in (("1_pretrain", 1.0), ("1_pretrain_dense", 1.25), ("2_sft", 1.5))
    }
    changes = [(item.stage, item.reference, item.change.value) for item in differences(Run(Path("run"), stages=stages))]
    assert changes == [("1_pretrain", "1_pretrain_dense", -0.25), ("2_sft", "1_pretrain", 0.5)]


def test_ways_to_tune_one_model_are_compared_with_it_and_not_with_each_other() -> None:
    stages = {
        name: StageResult(
            name, {"win_rate": Estimate(rate, None, None, 1)}, [{"metric": "win_rate", "id": "a", "value": rate}]
        )
        for name, rate in (("2_sft", 0.5), ("3_ppo", 0.75), ("3_dpo", 0.625), ("4_grpo", 0.25))
    }
    start = {"3_ppo": "2_sft", "3_dpo": "2_sft", "4_grpo": "3_ppo"}
    steps = {name: {"values": {"model_name_or_path": f"runs/mine/{parent}"}} for name, parent in start.items()}
    changes = differences(Run(Path("run"), stages=stages, steps=steps))
    assert {item.stage: (item.reference, item.change.value) for item in changes} == {
        "3_ppo": ("2_sft", 0.25),
        "3_dpo": ("2_sft", 0.125),
        "4_grpo": ("3_ppo", -0.5),
    }


def variants(start: str = "runs/pocket/3_ppo") -> Run:
    """Return a run of three variants of one stage, whose directories are not named like their files."""
    rates = {"0_base": 0.25, "4_grpo": 0.5, "4_dapo": 0.75, "4_dr": 0.25}
    rows = {name: [float(row < 40 * rate) for row in range(40)] for name, rate in rates.items()}
    stages = {}
    for name, values in rows.items():
        stages[name] = StageResult(
            name, {"pass@1": outcome_mean(values)}, written_by=f"4_grpo_{name}" * (name != "0_base")
        )
        stages[name].examples = [{"metric": "pass@1", "id": row, "value": value} for row, value in enumerate(values)]
    settings = {"model_name_or_path": start}
    steps = {
        f"4_grpo_{name}": {"values": {**settings, "output_dir": f"runs/losses/{name}"}}
        for name in rates
        if name != "0_base"
    }
    return Run(Path("run"), stages=stages, steps={"evaluate_0_base": {"values": {"base": start}}, **steps})


def test_variants_are_compared_with_their_start_and_with_the_first_of_them() -> None:
    run = variants()
    assert [(item.stage, item.reference, item.change.value, item.aim) for item in differences(run)] == [
        ("4_grpo", "0_base", 0.25, True),
        ("4_dapo", "0_base", 0.5, True),
        ("4_dapo", "4_grpo", 0.25, True),
        ("4_dr", "0_base", 0.0, True),
        ("4_dr", "4_grpo", -0.25, True),
    ]
    # Each stage is judged by what it gained over its start.
    findings = find_failures(run)
    assert [(finding.stage, finding.what.partition(",")[0]) for finding in findings] == [
        ("4_dr", "pass@1 went from 0.250 (0_base) to 0.250")
    ]
    del run.stages["4_dr"], run.steps["4_grpo_4_dr"]
    assert conclude(run, find_failures(run)) == "Both stages did what they are for: better pass@1"
    assert [box["stage"] for box in path_boxes(run, {}) if box["stage"]] == ["0_base", "4_grpo"]


def test_a_stage_is_not_compared_with_a_model_that_it_did_not_start_from() -> None:
    """What another run calls `4_grpo` is not the stage of this run, and only the first such model is `0_base`."""
    run = variants()
    run.steps["4_grpo_4_dr"]["values"]["model_name_or_path"] = "runs/pocket/4_grpo"
    assert ("4_dr", "4_grpo") not in {(item.stage, item.reference) for item in differences(run)}
    assert "4_dr was not compared (runs/pocket/4_grpo was not measured)" in find_unjudged(run)


def test_without_a_record_arguments_say_what_a_stage_started_from(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "run.json").unlink()
    settings = {"model_name_or_path": "x/run/2_sft/checkpoint-20", "output_dir": "x/run/4_grpo"}
    (run / "4_grpo" / "arguments.json").write_text(json.dumps(settings))
    changes = differences(load_run(run))
    assert {item.reference for item in changes if item.stage == "4_grpo"} == {"2_sft", "elicited", "majority"}


def test_a_directory_of_another_name_has_the_kind_of_its_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for path in [*run.glob("evaluations/4_grpo.*"), run / "4_grpo"]:
        path.rename(path.with_name(path.name.replace("4_grpo", "4_dapo")))
    record = json.loads((run / "run.json").read_text())
    step = record["steps"].pop("4_grpo") | {"values": {"output_dir": "runs/x/4_dapo"}}
    (run / "run.json").write_text(json.dumps({**record, "steps": {**record["steps"], "4_grpo_dapo": step}}))
    loaded = load_run(run)
    assert conclude(loaded, find_failures(loaded)).startswith("All four stages did what they are for: ")
    summary = summarise(loaded, differences(loaded), [])
    content = page_content(loaded, summary, differences(loaded))
    assert [chart["title"] for chart in content["charts"]][-1] == "Reasoning (GRPO)"
    assert {item["aim"] for item in summary["differences"] if item["stage"] == "4_dapo"} == {True, False}
    assert "| **" in render("report.md.jinja", content).split("| pass@1 |")[1].split("\n")[0]


def test_the_experts_are_in_a_table_in_curves_and_in_the_colours_of_a_text() -> None:
    stage = StageResult("1_pretrain", {"expert_load": Estimate(0.5)})
    stage.experts = {"layers": [[0.5, 1.5]], "documents": [{"pieces": ["a", "b", "c"], "chosen": [[1, 1, 0]]}]}
    logged = {"router/layer_0/expert_0": 0.5, "router/layer_0/expert_1": 1.5, "router/layer_0/entropy": 0.6}
    stage.state = {"log_history": [{"step": step, **logged} for step in (1, 2)]}
    run = Run(Path("run"), stages={"1_pretrain": stage})
    content = experts(run)
    assert content["rows"] == [{"stage": "1_pretrain", "layer": "1", "shares": ["0.50", "1.50"]}]
    assert content["drawn"][0][0]["runs"] == [{"expert": 1, "text": "ab"}, {"expert": 0, "text": "c"}]
    assert [(chart.title, len(chart.series)) for chart in charts_of(run)] == [
        ("Load of the experts, layer 1", 2),
        ("Entropy of the routers, nats", 1),
    ]
    assert summarise(run, [], [])["stages"]["1_pretrain"]["expert_load"]["layers"] == [[0.5, 1.5]]
