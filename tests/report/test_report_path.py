"""The picture of the path: every stage in it, with what this run reached."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.report.load import load_run
from pipeline.report.page import render
from pipeline.report.path_picture import path_boxes
from pipeline.stages import STAGES


def test_each_step_has_the_figure_and_the_sample_of_its_stage(whole_run: Path) -> None:
    run = load_run(whole_run)
    steps = {step["stage"]: step for step in path_boxes(run, {"grpo": "#reasoning"})}
    assert list(steps) == ["0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo"]
    shares = {name: round(100 * stage.metrics["pass@1"].value) for name, stage in run.stages.items() if stage.answers}
    assert steps["4_grpo"]["figure"] == f"{shares['4_grpo']}% of unseen problems solved (before: {shares['3_ppo']}%)"
    assert steps["3_ppo"]["figure"].startswith("preferred to 2_sft in ")
    assert "of unseen choices" in steps["3_ppo"]["parts"][1]["figure"], "that of the reward model"
    assert steps["2_sft"]["sample"] == run.stages["2_sft"].answers[0]["answer"].strip()
    assert steps["4_grpo"]["sample"] == run.stages["4_grpo"].traces[0]["answer"], "reasoning is shown on a problem"
    assert "tokens of plain text" in steps["1_pretrain"]["goes_in"]
    assert [step["link"] for step in steps.values()] == ["", "", "", "", "#reasoning"]


def test_a_second_pretraining_is_not_in_the_path(whole_run: Path) -> None:
    run = load_run(whole_run)
    boxes = path_boxes(run, {})
    stages = list(run.stages.items())
    twin = replace(run.stages["0_random"], name="1_pretrain_dense")
    run.stages = dict([*stages[:2], ("1_pretrain_dense", twin), *stages[2:]])
    assert path_boxes(run, {}) == boxes


def test_stages_that_a_run_does_not_have_are_explained_all_the_same(short_run: Path) -> None:
    steps = path_boxes(load_run(short_run), {})
    shown = render("path.html.jinja", {"steps": steps})
    assert shown.count("not in this run") == 2
    boxes = {kind.name: kind.box.about for kind in STAGES.values() if kind.box}
    assert len(boxes) == 5 and all(name in shown and about in shown for name, about in boxes.items())


def test_texts_of_a_run_are_escaped_in_the_picture(hostile_run: Path) -> None:
    shown = render("path.html.jinja", {"steps": path_boxes(load_run(hostile_run), {})})
    assert "&lt;script&gt;" in shown
    assert not any(text in shown for text in ("<script", "<img", "\u202e", "\x1b"))
