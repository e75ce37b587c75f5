"""Tasks of lm-evaluation-harness: measured on a stage, and shown in the results and in the report."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pipeline.__main__ import main
from pipeline.evaluation.intervals import outcome_mean
from tests.helpers import small_model
from tests.helpers.files import write_rows
from tests.helpers.refusals import refused

pytest.importorskip("lm_eval")

CHOICES = [" on the mat.", " is not 21.", " of text."]
DOCUMENTS = [
    {"question": text, "choices": CHOICES, "answer": i % 3} for i, text in enumerate(["The cat sat", "The 12"] * 5)
]
METRICS = [{"metric": "acc"}, {"metric": "acc_norm"}]


def write_task(folder: Path, name: str, documents: list[dict[str, Any]], **fields: Any) -> str:
    data = write_rows(folder / f"{name}.jsonl", documents)
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"}
    task = folder / f"{name}.yaml"
    task.write_text(yaml.safe_dump({"task": name, **source, **fields, "metadata": {"version": 1}}))
    return str(task)


def write_choices(folder: Path, name: str = "toy_choice", documents: list[dict[str, Any]] = DOCUMENTS) -> str:
    return write_task(
        folder,
        name,
        documents,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        target_delimiter="",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=METRICS,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    small_model.save_model(folder / "2_sft")
    return folder


def measure(run: Path, *options: str, name: str = "lm_eval") -> dict[str, Any]:
    assert main(["evaluate", str(run), "--stage", "2_sft", *options]) == 0
    return json.loads((run / "evaluations" / name / "2_sft.json").read_text())["metrics"]


def test_a_task_is_measured_with_n_and_interval_and_shown_in_the_report(run: Path, tmp_path: Path) -> None:
    settings = tmp_path / "evaluate.yaml"
    settings.write_text(f"lm_eval_tasks: {write_choices(tmp_path)}\n")
    figure = measure(run, "--config", str(settings), name="")["toy_choice:acc"]

    model = AutoModelForCausalLM.from_pretrained(run / "2_sft")
    correct = []
    for row in DOCUMENTS:
        scores = []
        for choice in row["choices"]:
            start = small_model.tokenizer()(row["question"])["input_ids"]
            ids = torch.tensor([small_model.tokenizer()(row["question"] + choice)["input_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1)
            taken = logps[len(start) - 1 :].gather(1, ids[0, len(start) :, None])
            scores.append(taken.sum().item())
        correct.append(float(scores.index(max(scores)) == row["answer"]))
    expected = outcome_mean(correct)
    assert figure == expected.to_json() and figure["n"] == len(DOCUMENTS)
    lines = [json.loads(line) for line in (run / "evaluations" / "2_sft.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines if line["metric"] == "toy_choice:acc"] == correct

    assert main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "metrics.json").read_text())
    assert summary["stages"]["2_sft"]["toy_choice:acc"] == figure
    assert "choice, acc |" in (run / "report" / "report.md").read_text()


def test_tasks_of_the_command_line_are_measured_beside_the_own_figures(run: Path, tmp_path: Path) -> None:
    evaluation = run / "evaluations" / "2_sft.json"
    evaluation.parent.mkdir()
    evaluation.write_text('{"metrics": {"bits_per_byte": {"value": 2.0, "ci95": [1.0, 3.0], "n": 5}}}')
    figures = measure(run, "--lm_eval_tasks", write_choices(tmp_path))
    assert figures.keys() == {"toy_choice:acc", "toy_choice:acc_norm"}
    assert main(["report", str(run)]) == 0
    summary = json.loads((run / "report" / "metrics.json").read_text())
    assert summary["other"]["lm_eval"]["2_sft"] == figures
    assert "choice, acc | " in (page := (run / "report" / "report.md").read_text()) and f" | {len(DOCUMENTS)} |" in page
    assert summary["stages"]["2_sft"].keys() == {"bits_per_byte"}


def test_a_group_a_perplexity_and_a_limit(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    for i in range(2):
        write_choices(folder, f"part{i}", DOCUMENTS[: 4 + i])
    group = folder / "both.yaml"
    aggregated = [{"metric": "acc", "weight_by_size": False}]
    group.write_text(yaml.safe_dump({"group": "both", "task": ["part0", "part1"], "aggregate_metric_list": aggregated}))
    text = write_task(
        tmp_path,
        "toy_text",
        [{"page": small_model.TEXT * i} for i in (1, 2, 3)],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": "bits_per_byte"}],
    )
    found = measure(run, "--lm_eval_tasks", str(group), text, "--limit", "2")
    both = found["both:acc"]
    assert both["n"] == 4 and both["by_kind"].keys() == {"part0", "part1"}
    assert both["value"] == pytest.approx(sum(part["value"] for part in both["by_kind"].values()) / 2)
    assert both["ci95"][0] <= both["value"] <= both["ci95"][1]
    assert not any(name.startswith("part") for name in found)
    bits = found["toy_text:bits_per_byte"]
    assert bits["n"] == 2 and 1 < bits["ci95"][0] < bits["value"] < bits["ci95"][1]


def test_tasks_that_cannot_be_measured_are_refused_in_one_line_each(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def messages(*tasks: str) -> list[str]:
        error = refused(capsys, "evaluate", run, "--stage", "2_sft", "--lm_eval_tasks", *tasks)
        assert not list(run.glob("evaluations/**/2_sft.json"))
        return [line for line in error.splitlines() if "lm_eval_tasks: " in line]

    unknown, missing = messages("piqa", "arc_eazy", "no.yaml")
    assert unknown.startswith("--lm_eval_tasks: arc_eazy: ") and missing.startswith("--lm_eval_tasks: no.yaml: ")
    fields = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
    (line,) = messages(write_task(tmp_path, "away", [], dataset_path="nobody/nothing", dataset_kwargs={}, **fields))
    assert "the Hub cannot be reached" in line
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: [")
    (line,) = messages(str(broken))
    assert "lm-eval cannot measure it" in line
