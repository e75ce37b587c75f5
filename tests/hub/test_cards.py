"""Cards: what the Hub reads of them, and what a reader does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import DatasetCard, ModelCard, SpaceCard

from pipeline.hub.repositories import Outputs
from tests.helpers import fresh
from tests.helpers.small_run import MODELS, STARTS_FROM, write_small_run

TASKS = {"text-generation", "text-classification"}
REQUIRED = {
    "model": {"library_name", "pipeline_tag", "tags", "license"},
    "dataset": {"configs", "license", "tags", "task_categories"},
    "space": {"title", "sdk", "emoji", "colorFrom", "colorTo", "app_file"},
}
# See "model-index" in https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
REQUIRED_OF_RESULTS = {
    "task": {"type"},
    "dataset": {"type", "name"},
    "metrics": {"type", "value"},
}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_run(tmp_path_factory.mktemp("runs") / "mini")


@pytest.fixture(scope="module")
def texts(run: Path) -> dict[str, dict[str, str]]:
    """Every card by the name of its repository, by kind."""
    cards: dict[str, dict[str, str]] = {"model": {}, "dataset": {}, "space": {}}
    for item in Outputs(run, namespace="alice").repositories():
        readme = item.files["README.md"]
        assert isinstance(readme, bytes)
        cards[item.type][item.id.removeprefix("alice/mini-")] = readme.decode()
    return cards


def test_cards_have_the_fields_that_the_hub_requires(texts: dict[str, dict[str, str]]) -> None:
    kinds: dict[str, Any] = {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}
    for kind, cards in texts.items():
        for name, text in cards.items():
            card = kinds[kind](text)
            assert set(card.data.to_dict()) >= REQUIRED[kind], name
            assert str(card) == text
    space = SpaceCard(texts["space"]["report"]).data
    assert space.sdk == "static" and {space.colorFrom, space.colorTo} <= COLORS
    for name, text in texts["model"].items():
        for result in ModelCard(text).data.to_dict()["model-index"][0]["results"]:
            assert set(result["task"]) >= REQUIRED_OF_RESULTS["task"] and result["task"]["type"] in TASKS, name
            assert set(result["dataset"]) >= REQUIRED_OF_RESULTS["dataset"], name
            assert all(set(metric) >= REQUIRED_OF_RESULTS["metrics"] for metric in result["metrics"]), name


def test_results_are_those_of_the_run_with_their_intervals(run: Path, texts: dict[str, dict[str, str]]) -> None:
    measured = json.loads((run / "report" / "metrics.json").read_text())["stages"]
    for stage in MODELS:
        results = ModelCard(texts["model"][stage]).data.eval_results
        read = {item.metric_type: {"value": item.metric_value, **item.metric_args} for item in results}
        assert read == {
            metric.removeprefix("piqa:"): {name: entry[name] for name in ("value", "ci95", "n")}
            for metric, entry in measured[stage].items()
            if metric != "pass@1_by_length"
        }
        data = {item.dataset_type for item in results}
        if stage == "3_reward":
            assert data == {"alice/mini-3_preferences"}
        elif stage == "2_sft":
            assert data == {"alice/mini-data", "piqa"}
        else:
            assert data == {"alice/mini-data"}


def test_figures_of_an_earlier_training_are_left_out(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "mini")
    record = json.loads((again / "run.json").read_text())
    record["steps"]["2_sft"]["finished_at"] = "2999-01-01T00:00:00+00:00"
    record["steps"]["3_ppo"]["started_at"] = "2026-01-01T00:00:00+00:00"
    (again / "run.json").write_text(json.dumps(record))
    texts = {item.id: item.files["README.md"] for item in Outputs(again, namespace="alice").repositories()}
    for stage in MODELS:
        is_old = stage in ("2_sft", "3_ppo")
        assert (b"## Results" not in texts[f"alice/mini-{stage}"]) == is_old, stage


def test_lineage_goes_from_stage_to_stage(texts: dict[str, dict[str, str]]) -> None:
    cards = {stage: ModelCard(texts["model"][stage]).data for stage in MODELS}
    bases = {stage: card.base_model for stage, card in cards.items()}
    assert bases == {stage: f"alice/mini-{STARTS_FROM[stage]}" if stage in STARTS_FROM else None for stage in MODELS}
    assert cards["3_reward"].datasets == ["alice/mini-3_preferences"] and cards["2_sft"].datasets == ["alice/mini-data"]
    assert cards["0_random"].datasets is None
    kinds = {stage: (card.library_name, card.pipeline_tag) for stage, card in cards.items()}
    assert kinds["4_grpo"] == ("peft", "text-generation") and kinds["3_reward"][1] == "text-classification"


@pytest.mark.parametrize("stage", MODELS)
def test_a_reader_finds_what_the_model_is_and_how_it_was_made(stage: str, texts: dict[str, dict[str, str]]) -> None:
    text = texts["model"][stage]
    for heading in ("## How to use it", "## Results", "## How it was trained", "## Limits"):
        assert heading in text
    assert f"alice/mini-{stage}" in text.split("## Results")[0], "code that loads it"
    for fact in ("12 s", "Imaginary Xeon, 2 cores", "torch 2.13.0", "0123456789abcdef", "--seed 0"):
        assert fact in text, fact
    if stage in STARTS_FROM:
        assert f"model_name_or_path: alice/mini-{STARTS_FROM[stage]}" in text, "the YAML runs anywhere"
    if stage in ("3_ppo", "4_grpo"):
        assert "elicited (baseline)" in text and "| `3_ppo` |" in text and "> What is an LLM?" in text
    assert ("## Samples" in text) == (stage != "3_reward")


def test_the_code_on_the_cards_runs(run: Path, texts: dict[str, dict[str, str]], tmp_path: Path) -> None:
    for stage in ("1_pretrain", "2_sft", "3_reward"):
        code = texts["model"][stage].split("```python\n")[1].split("```")[0]
        code = code.replace(f"alice/mini-{stage}", str(run / stage)).replace("max_new_tokens=256", "max_new_tokens=3")
        fresh.run_python(code, tmp_path)


def test_the_data_card_names_what_was_pushed_and_keeps_its_text(texts: dict[str, dict[str, str]]) -> None:
    assert "Answers sampled from `alice/mini-2_sft`." in texts["dataset"]["3_preferences"]
    assert 'load_dataset("alice/mini-data", "sft")' in texts["dataset"]["data"]
    assert DatasetCard(texts["dataset"]["data"]).data.language == "en"


def test_the_report_of_the_space_needs_nothing_else(run: Path) -> None:
    space = Outputs(run, namespace="alice").repositories()[-1]
    files = space.files
    assert space.type == "space" and {"index.html", "metrics.json", "run.json"} <= set(files)
    page = files["index.html"]
    html = page.decode() if isinstance(page, bytes) else page.read_text()
    assert 'src="http' not in html and "@import" not in html and 'rel="stylesheet"' not in html
    assert json.loads(files["run.json"].decode() if isinstance(files["run.json"], bytes) else "")["steps"]["2_sft"]
