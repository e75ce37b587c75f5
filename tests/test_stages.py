"""A stage in one place: an invented kind is one entry of the table and one recipe, and all who need it find it."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from pipeline.__main__ import main
from pipeline.evaluation.evaluate_yaml import read_record
from pipeline.evaluation.metric_info import METRICS, MetricInfo
from pipeline.hub.cards import Trained, model_card
from pipeline.report.load import load_run
from pipeline.report.page import render
from pipeline.report.path_picture import headline, path_boxes
from pipeline.runner.plan import read_plan
from pipeline.stages import STAGES, kind_in_name, stage_order
from pipeline.stages.kinds import Box, Card, LoggedChart, StageKind
from tests.helpers.fake_run import write_run
from tests.helpers.small_model import ROOT

RECIPE = """
from trl import ModelConfig, SFTConfig
from pipeline.data.arguments import DataArguments

def main(data_args: DataArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    pass
"""

DISTIL = StageKind(
    name="Distillation",
    method="KD",
    module="distil_recipe",
    launched=True,
    measured=True,
    data="conversation",
    held_out="instructions",
    length="max_length",
    aims=("stop_rate",),
    smoke={"max_steps": 2, "max_train_samples": 64},
    charts=(LoggedChart("Divergence from the teacher", (("training", "loss"),)),),
    box=Box("It imitates a larger model.", "the teacher's answers", "the distance from the teacher", place="curves"),
    card=Card("A small chat model.", "By imitating a larger one.", "It knows no more than its teacher.", ("distil",)),
)


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe folder whose last stage is of an invented kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(STAGES, "distil", DISTIL)
    (tmp_path / "distil_recipe.py").write_text(RECIPE)
    (tmp_path / "accelerate_config.yaml").write_text((ROOT / "accelerate_config.yaml").read_text())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "What is a fox?", "completion": "A mammal."}\n')
    (tmp_path / "recipe").mkdir()
    values = {
        "output_dir": "runs/r/5_distil",
        "model_name_or_path": "runs/r/4_grpo",
        "dataset_name": "rows.jsonl",
        "max_length": 99,
    }
    earlier = {"output_dir": "runs/r/4_grpo", "model_name_or_path": "sshleifer/tiny-gpt2", "dataset_name": "rows.jsonl"}
    (tmp_path / "recipe" / "4_sft.yaml").write_text(yaml.safe_dump(earlier))
    (tmp_path / "recipe" / "5_distil.yaml").write_text(yaml.safe_dump(values))
    yield tmp_path / "recipe"
    sys.modules.pop("distil_recipe", None)


def test_the_runner_runs_measures_and_shrinks_an_invented_stage(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "recipe", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "-m distil_recipe --config recipe/5_distil.yaml" in out
    assert "run evaluate_5_distil: has not run yet" in out

    assert main(["run", "recipe", "--dry-run", "--smoke"]) == 0
    assert re.search(r"-m distil_recipe .*--max_steps 2 --max_train_samples 64", capsys.readouterr().out)

    plan = read_plan(Path("recipe"))
    measured = next(step for step in plan.steps if step.name == "evaluate_5_distil").values
    assert measured["trained_on"]["instructions"]["dataset_name"] == "rows.jsonl"
    assert measured["lengths"]["instructions"] == 99, "as the last stage that is trained on conversations"


def test_an_invented_stage_has_a_state_and_settings(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {"recipe": "recipe", "steps": {}}
    run = Path("runs/r")
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(record))
    assert main(["status", str(run)]) == 0
    assert re.search(r"5_distil +not run yet", capsys.readouterr().out)

    (run / "5_distil").mkdir()
    arguments = {"output_dir": "runs/r/5_distil", "dataset_name": "rows.jsonl", "max_length": 99}
    (run / "5_distil" / "arguments.json").write_text(json.dumps(arguments))
    _, facts = read_record(run, "5_distil")
    assert facts.lengths["instructions"] == 99


def test_an_invented_stage_is_in_report_page_and_card(recipe: Path) -> None:
    run = write_run(recipe.parent / "runs/r")
    for path in (run / "evaluations").glob("4_grpo.*"):
        path.with_stem("5_distil").write_text(path.read_text().replace("4_grpo", "5_distil"))
    (run / "5_distil").mkdir()
    for name in ("config.json", "trainer_state.json"):
        (run / "5_distil" / name).write_text((run / "2_sft" / name).read_text())
    assert main(["report", str(run)]) == 0
    page = (run / "report" / "index.html").read_text()
    assert "Distillation (KD)" in page and "Divergence from the teacher" in page
    assert "It imitates a larger model." in page
    assert "5_distil" in (run / "report" / "report.md").read_text()

    boxes = path_boxes(load_run(run), {"distil": "#compare"})
    assert [box["stage"] for box in boxes][-1] == "5_distil"
    assert boxes[-1]["link"] == "#compare" and boxes[-1]["figure"]["what"] == "stop rate"
    assert "the teacher&#39;s answers" in render("path.html.jinja", {"steps": boxes})

    card = model_card(Trained(run / "5_distil", "distil", "me/distil"))
    assert "**Stage 5, distillation.** A small chat model." in card and "- distil" in card


def test_an_invented_variant_of_a_stage_is_in_its_box(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STAGES, "distil", replace(DISTIL, box=None, box_of="grpo"))
    run = write_run(recipe.parent / "runs/r")
    for path in (run / "evaluations").glob("4_grpo.*"):
        text = path.read_text().replace("4_grpo", "5_distil")
        path.rename(path.with_stem("5_distil")).write_text(text)
    (run / "4_grpo").rename(run / "5_distil")
    assert path_boxes(load_run(run), {})[-1]["stage"] == "5_distil"


def test_an_invented_metric_is_one_entry_of_a_table(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = MetricInfo(
        "Politeness", "held-out instructions, answered politely", "instructions", phrase="of answers polite"
    )
    monkeypatch.setitem(METRICS, "politeness", info)
    monkeypatch.setitem(STAGES, "distil", replace(DISTIL, aims=("politeness",)))
    run = write_run(recipe.parent / "runs/r")
    for path in (run / "evaluations").glob("4_grpo.*"):
        text = path.read_text().replace("4_grpo", "5_distil").replace('"stop_rate"', '"politeness"')
        path.with_stem("5_distil").write_text(text)
    assert main(["report", str(run)]) == 0

    text = (run / "report" / "report.md").read_text()
    assert "| Politeness " in text and "held-out instructions, answered politely" in text
    assert headline(load_run(run)).endswith("100% of answers polite.")
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    data = {"instructions": {"dataset_name": "me/questions"}}
    card = model_card(Trained(run / "5_distil", "distil", "me/distil", metrics=metrics, measured_on=data))
    (result,) = [result for result in ModelCard(card).data.eval_results if result.metric_type == "politeness"]
    assert (result.metric_name, result.dataset_type) == ("Politeness", "me/questions")


def tables(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Return the line and the keys of each dictionary that a file writes down with two or more texts as keys."""
    for node in ast.walk(ast.parse(path.read_text())):
        keys: list[Any] = []
        if isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
            keys = [keyword.arg for keyword in node.keywords]
        if len(keys) > 1:
            yield node.lineno, keys


def test_no_other_table_has_kinds_of_stages_or_metrics_as_keys() -> None:
    """Words about a kind of stage are fields of `StageKind`, and words about a metric are fields of `MetricInfo`."""
    tables_elsewhere = []
    for path in (ROOT / "pipeline").rglob("*.py"):
        package = path.relative_to(ROOT / "pipeline").parts[0]
        for line, keys in tables(path):
            # What measures metrics may return them by name.
            if (package != "stages" and set(keys) <= set(STAGES)) or (
                package != "evaluation" and set(keys) <= set(METRICS)
            ):
                tables_elsewhere.append(f"{path}:{line}: {keys}")
    assert not tables_elsewhere


def test_one_file_names_the_title_of_a_stage() -> None:
    """What a stage is called, what happens in it and what its card says stands in `pipeline/stages/` alone."""
    texts = {kind.box.about for kind in STAGES.values() if kind.box}
    texts |= {kind.card.summary for kind in STAGES.values()}
    texts |= {f'"{name}"' for kind in STAGES.values() for name in (kind.name, kind.module) if name}
    for path in (ROOT / "pipeline").rglob("*.py"):
        if path.parent != ROOT / "pipeline" / "stages":
            content = path.read_text()
            assert not [text for text in texts if text in content], path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("2_sft", "sft"), ("10_sft_again", "sft"), ("sft", "sft"), ("4_my_model", "my_model"), ("other", "other")],
)
def test_the_name_of_a_stage_says_its_kind(name: str, kind: str) -> None:
    assert kind_in_name(name) == kind


def test_stages_are_in_the_order_of_training() -> None:
    names = ["4_grpo", "2000_sft", "3_ppo", "3_mine", "other", "3_reward", "10_later", "2_sft", "0_random"]
    expected = ["0_random", "2_sft", "3_reward", "3_ppo", "3_mine", "4_grpo", "10_later", "2000_sft", "other"]
    assert sorted(names, key=stage_order) == expected
