"""DPO by hand: the loss and its gradient from plain forward passes of the policy and of the right reference."""

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from pipeline.__main__ import main
from pipeline.config.fields import argument_types
from pipeline.config.parser import parse
from recipes import dpo
from tests.helpers.answers_by_hand import adapted, log_prob, trained
from tests.helpers.files import write_rows
from tests.helpers.small_model import recipe_command

BETA = 0.3
TOLERANCE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs, and an adapter of the model whose weights are not zero."""
    folder = tmp_path_factory.mktemp("inputs")
    recipe_command("dpo", folder)
    adapted(folder)
    return folder


def trainer_of(inputs: Path, output: Path, *options: str) -> Any:
    """Return the trainer that the recipe would train."""
    made: list[Any] = []
    words = recipe_command("dpo", inputs, "--bf16", "false", "--beta", str(BETA), *options)[2:]
    with patch("pipeline.training.train.train_and_save", made.append):
        dpo.main(*parse(*argument_types(dpo.main), argv=[*words, "--output_dir", str(output)]))
    return made[0]


def by_hand(policy: Any, reference: Any, rows: list[dict[str, Any]]) -> torch.Tensor:
    """Return -log sigmoid(beta x (how much likelier the chosen answer became - how much likelier the other)), mean."""
    losses = []
    for row in rows:
        sides = []
        for side in ("chosen", "rejected"):
            with torch.no_grad():
                before = log_prob(reference, row["prompt"], row[side])
            sides.append(log_prob(policy, row["prompt"], row[side]) - before)
        losses.append(-logsigmoid(BETA * (sides[0] - sides[1])))
    return torch.stack(losses).mean()


CASES = {
    "full": ("model", []),
    "LoRA": ("model", ["--use_peft", "--lora_target_modules", "all-linear"]),
    "merged": ("adapter", []),
    "LoRA on merged": ("adapter", ["--use_peft", "--lora_target_modules", "all-linear"]),
    "computed beforehand": ("adapter", ["--precompute_ref_log_probs"]),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_computed_by_hand(case: str, inputs: Path, tmp_path: Path) -> None:
    name, options = CASES[case]
    trainer = trainer_of(inputs, tmp_path, "--model_name_or_path", str(inputs / name), *options)
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator(rows)
    load = AutoModelForCausalLM if name == "model" else AutoPeftModelForCausalLM
    reference = load.from_pretrained(inputs / name).eval()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0.6931, abs=1e-4), "log 2 at the start"

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trained(trainer.model).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {key: weight.grad.clone() for key, weight in trained(trainer.model).items()}
    trainer.model.zero_grad()

    expected = by_hand(trainer.model, reference, rows)
    assert abs(expected.item() - 0.6931) > 0.05, "the policy has moved"
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    expected.backward()
    for key, weight in trained(trainer.model).items():
        torch.testing.assert_close(found[key], weight.grad, **TOLERANCE, msg=key)
    if name == "adapter":
        base = AutoModelForCausalLM.from_pretrained(inputs / "model").eval()
        wrong = by_hand(trainer.model, base, rows)
        assert abs((wrong - loss).item()) > 0.01, "the base without its adapter, which TRL would load"


LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "nca_pair", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down",
)  # fmt: skip


def test_every_loss_of_trl_can_be_computed(inputs: Path, tmp_path: Path) -> None:
    trainer = trainer_of(inputs, tmp_path, "--label_smoothing", "0.1")
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for loss in LOSSES:
        trainer.loss_types = [loss]
        assert torch.isfinite(trainer.compute_loss(trainer.model, batch)), loss


@pytest.mark.parametrize("streamed", [False, True])
def test_pairs_that_are_too_long_are_dropped_and_never_cut(inputs: Path, tmp_path: Path, streamed: bool) -> None:
    options = ["--dataset_streaming"] if streamed else []
    trainer = trainer_of(inputs, tmp_path, "--max_length", "30", *options)
    whole = trainer_of(inputs, tmp_path / "whole", *options)
    kept = [row["rejected_ids"] for row in trainer.train_dataset]
    every = [row["rejected_ids"] for row in whole.train_dataset]
    assert 0 < len(kept) < len(every) and all(ids in every for ids in kept)
    assert max(len(row["prompt_ids"] + row["rejected_ids"]) for row in trainer.train_dataset) <= 30


@pytest.mark.usefixtures("shared_warm_process")
def test_a_run_goes_through_dpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """From pairs in ShareGPT's style and a model of one's own: trained, measured, reported, planned, shown."""
    monkeypatch.chdir(tmp_path)
    recipe_command("dpo", tmp_path)
    rows = [
        {
            "conversations": [{"from": "human", "value": f"What is {i}?"}],
            "chosen": {"from": "gpt", "value": f"It is {i}."},
            "rejected": {"from": "gpt", "value": "No. " * (i % 3 + 1)},
        }
        for i in range(40)
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "mine").mkdir()
    values = {
        "dataset_name": "rows.jsonl",
        "max_length": 64,
        "model_name_or_path": "model",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": "runs/mine/3_dpo",
    }
    (tmp_path / "mine" / "3_dpo.yaml").write_text(yaml.safe_dump(values))
    evaluation = {"prompts": {"dataset_name": "rows.jsonl"}, "judge": "pipeline.rewards.functions:answer_format"}
    (tmp_path / "mine" / "evaluate.yaml").write_text(yaml.safe_dump({**evaluation, "limit": 4, "max_new_tokens": 8}))

    assert main(["run", "mine"]) == 0, capsys.readouterr()
    metrics = json.loads(Path("runs/mine/report/metrics.json").read_text())
    assert {"win_rate", "win_rate_greedy"} <= set(metrics["stages"]["3_dpo"])
    page = Path("runs/mine/report/index.html").read_text()
    assert "Preference tuning (DPO)" in page and "Preferred answers that became likelier" in page
    card = Path("runs/mine/3_dpo/README.md").read_text()
    assert "By DPO on pairs of answers" in card and "- dpo" in card and "recipes.dpo" in card
    capsys.readouterr()
    assert main(["status", "runs/mine"]) == 0
    assert re.search(r"3_dpo +done", capsys.readouterr().out)
