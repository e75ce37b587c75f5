"""The picture of the path: every stage in it, with what this run reached."""

import re
from dataclasses import replace
from pathlib import Path

from pipeline.report.load import Run, load_run
from pipeline.report.page import render
from pipeline.report.path_picture import headline, path_boxes, showcase, title
from pipeline.stages import STAGES


def test_each_step_has_the_figure_and_the_sample_of_its_stage(whole_run: Path) -> None:
    run = load_run(whole_run)
    steps = {step["stage"]: step for step in path_boxes(run, {"grpo": "#reasoning"})}
    assert list(steps) == ["0_random", "1_pretrain", "2_sft", "3_ppo", "4_grpo"]
    stages = run.stages
    shares = {name: f"{100 * stage.metrics['pass@1'].value:.0f}%" for name, stage in stages.items() if stage.answers}
    figure = steps["4_grpo"]["figure"]
    assert (figure["was"], figure["now"]) == (shares["3_ppo"], shares["4_grpo"])
    assert figure["what"] == "of unseen problems of 1 to 4 steps solved"
    assert [text.partition(" ")[0] for text in figure["baselines"]] == [
        f"{100 * run.baselines[name].metrics['pass@1'].value:.0f}%" for name in ("elicited", "majority")
    ]
    assert steps["3_ppo"]["figure"]["what"] == "of comparisons with 2_sft won"
    assert steps["3_ppo"]["parts"][1]["figure"]["what"] == "of unseen choices predicted", "that of the reward model"
    assert steps["2_sft"]["sample"]["sides"][0]["text"] == stages["2_sft"].answers[0]["answer"].strip()
    assert "tokens of plain text" in steps["1_pretrain"]["goes_in"]
    assert [step["link"] for step in steps.values()] == ["", "", "", "", "#reasoning"]


def test_the_showcase_is_the_first_problem_right_or_wrong_with_the_tally_beside_it(whole_run: Path) -> None:
    run = load_run(whole_run)
    # The last stage fails at the first problem, and the one before it solves that one alone.
    for name in ("3_ppo", "4_grpo"):
        for trace in run.stages[name].traces:
            trace["correct"] = (name == "3_ppo") == (trace is run.stages[name].traces[0])
    solved = {name: sum(value for value, *_ in run.stages[name].outcomes("pass@1").values()) for name in run.stages}
    sample = path_boxes(run, {})[-1]["sample"]
    assert sample["problem"] == run.stages["4_grpo"].traces[0]["problem"]
    sides = [(side["stage"], side["text"], side["correct"], side["of_all"]) for side in sample["sides"]]
    ppo_answer, grpo_answer = (run.stages[name].traces[0]["answer"] for name in ("3_ppo", "4_grpo"))
    assert sides == [
        ("3_ppo", ppo_answer, True, f"{solved['3_ppo']:.0f} of 60"),
        ("4_grpo", grpo_answer, False, f"{solved['4_grpo']:.0f} of 60"),
    ]
    html = render("path.html.jinja", {"steps": path_boxes(run, {})})
    assert html.index("✓&nbsp;right") < html.index("✗&nbsp;wrong")
    kinds = [(item["kind"], [side["correct"] for side in item["sides"]]) for item in showcase(run)]
    assert kinds == [
        ("arithmetic", [True, False]),
        *((kind, [False, True]) for kind in ("ordering", "counting", "logic")),
    ]
    # A run whose problems only one stage has solved, and one without any.
    assert [len(item["sides"]) for item in showcase(run, "0_random")] == [1] * 4
    for stage in run.stages.values():
        stage.traces = []
    assert showcase(run) == [] and path_boxes(run, {})[-1]["sample"]["problem"] == "What is an LLM?"


def test_one_sentence_says_it_all(whole_run: Path, short_run: Path) -> None:
    run = load_run(whole_run)
    assert title(run) == "pocket, seed 0"
    told = headline(run)
    assert re.fullmatch(r"From random weights to reasoning in \d+ min \d+ s on 2 cores: .*\.", told)
    for box in path_boxes(run, {})[1:]:
        assert f"{box['figure']['now']} {box['figure']['what']}" in told
    run.record |= {"smoke": True, "recipe": None, "seed": None}
    assert title(run) == "pocket, smoke run", "the directory, where the recipe is not known"
    run.hardware, run.steps = {"gpu": "8 x NVIDIA H100", "cores": 64}, {}
    assert " on 8 x NVIDIA H100: " in headline(run)
    assert headline(load_run(short_run)).startswith("From random weights to instruction tuning in ")
    assert headline(Run(Path("empty"))) == "Nothing yet."


def test_blank_lines_do_not_stretch_a_box(whole_run: Path) -> None:
    run = load_run(whole_run)
    run.stages["2_sft"].answers[0] |= {"answer": "\n\nOne.\n \n\n\nTwo.\nThree."}
    assert path_boxes(run, {})[2]["sample"]["sides"][0]["text"] == "One. ⏎\nTwo.\nThree."


def test_a_second_pretraining_is_not_in_the_path(whole_run: Path) -> None:
    run = load_run(whole_run)
    boxes = path_boxes(run, {})
    stages = list(run.stages.items())
    twin = replace(run.stages["0_random"], name="1_pretrain_dense")
    run.stages = dict([*stages[:2], ("1_pretrain_dense", twin), *stages[2:]])
    assert path_boxes(run, {}) == boxes


def test_stages_that_a_run_does_not_have_are_explained_all_the_same(short_run: Path) -> None:
    steps = path_boxes(load_run(short_run), {})
    html = render("path.html.jinja", {"steps": steps})
    assert html.count("not in this run") == 2
    boxes = {kind.name: kind.box.about for kind in STAGES.values() if kind.box}
    assert len(boxes) == 5 and all(name in html and about in html for name, about in boxes.items())


def test_texts_of_a_run_are_escaped_in_the_picture(hostile_run: Path) -> None:
    html = render("path.html.jinja", {"steps": path_boxes(load_run(hostile_run), {})})
    assert "&lt;script&gt;" in html
    assert not any(text in html for text in ("<script", "<img", "\u202e", "\x1b"))
