"""Arguments come from YAML, the command line and the machine; test_bad_input has most refusals."""

import os
from pathlib import Path

import pytest
import torch
from trl import ModelConfig, SFTConfig

from pipeline import hardware, launch
from pipeline.config.parser import parse
from pipeline.data.arguments import DataArguments
from pipeline.errors import UserError
from pipeline.hardware import Choice
from pipeline.training.preference_config import KTOConfig
from pipeline.training.pretraining import PretrainConfig


def sft(tmp_path: Path, yaml: str = "", *argv: str) -> SFTConfig:
    (tmp_path / "config.yaml").write_text(yaml + f"\noutput_dir: {tmp_path / 'output'}\n")
    arguments = parse(DataArguments, SFTConfig, ModelConfig, argv=["--config", str(tmp_path / "config.yaml"), *argv])
    assert [type(item) for item in arguments] == [DataArguments, SFTConfig, ModelConfig]
    return arguments[1]


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    args = sft(tmp_path, "learning_rate: 1e-4\nmax_steps: 5\npacking: true", "--max_steps", "7", "--max-length=9")
    assert (args.learning_rate, args.max_steps, args.packing, args.max_length) == (1e-4, 7, True, 9)


def test_a_value_that_the_command_line_overrides_may_be_of_another_recipe(tmp_path: Path) -> None:
    """DPO and KTO share a file, and have different losses."""
    (tmp_path / "dpo.yaml").write_text(f"loss_type: sigmoid\noutput_dir: {tmp_path / 'output'}\n")
    argv = ["--config", str(tmp_path / "dpo.yaml")]
    with pytest.raises(UserError) as caught:
        parse(DataArguments, KTOConfig, ModelConfig, argv=argv)
    assert [problem.field for problem in caught.value.problems] == ["loss_type"]
    assert parse(DataArguments, KTOConfig, ModelConfig, argv=[*argv, "--loss_type", "kto"])[1].loss_type == "kto"


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("learning_rate: 3E-4", "learning_rate", 3e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 5.0", "max_steps", 5),
        ("run_name: 2026", "run_name", "2026"),
        ("report_to: none", "report_to", []),
        ("lr_scheduler_kwargs: {min_lr: 0.1}", "lr_scheduler_kwargs", {"min_lr": 0.1}),
        ("max_length: null", "max_length", None),
        ("label_names: labels", "label_names", ["labels"]),
        ("optim: sgd", "optim", "sgd"),
    ],
)
def test_values_are_converted_to_the_types_of_fields(tmp_path: Path, line: str, field: str, value: object) -> None:
    assert getattr(sft(tmp_path, line), field) == value


@pytest.mark.parametrize("content", ["seed: 1\nseed: 2", "- seed", "seed: ["])
def test_a_file_that_cannot_be_read_is_the_only_problem(tmp_path: Path, content: str) -> None:
    (tmp_path / "sft.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        parse(DataArguments, SFTConfig, ModelConfig, argv=["--config", str(tmp_path / "sft.yaml")])
    assert [problem.field for problem in caught.value.problems] == ["--config"]


def test_null_on_the_command_line_unsets_a_field_of_the_file(tmp_path: Path) -> None:
    assert sft(tmp_path, "max_length: 9", "--max_length", "null").max_length is None


def test_a_run_may_be_shorter_than_its_warm_up(tmp_path: Path) -> None:
    """A trial with `--max_steps 2` does not have to lower the warm-up as well."""
    assert sft(tmp_path, "warmup_steps: 100", "--max_steps", "2").max_steps == 2


@pytest.mark.parametrize(("machine", "bf16"), [("bf16", True), ("fp32", False)])
def test_the_machine_decides_the_precision_unless_the_user_does(
    tmp_path: Path, machine: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "precision", lambda: Choice(machine, "because"))
    args = sft(tmp_path)
    assert (args.bf16, args.fp16, args.use_cpu, args.gradient_checkpointing) == (bf16, False, True, False)
    assert sft(tmp_path, "bf16: false").bf16 is False
    assert sft(tmp_path, "gradient_checkpointing: true").activation_checkpointing is True


def test_pretraining_counts_tokens_and_leaves_compilation_to_the_machine(tmp_path: Path) -> None:
    (args,) = parse(PretrainConfig, argv=["--output_dir", str(tmp_path)])
    assert args.include_num_input_tokens_seen == "all"
    assert args.torch_compile is None


def test_the_seed_is_set_before_anything_is_drawn(tmp_path: Path) -> None:
    draws = []
    for _ in range(2):
        torch.rand(3)
        sft(tmp_path, "seed: 3")
        draws.append(torch.rand(2).tolist())
    assert draws[0] == draws[1]


def test_telemetry_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY")
    launch.prepare_process()
    assert constants.HF_HUB_DISABLE_TELEMETRY is True
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    launch.prepare_process()
    assert constants.HF_HUB_DISABLE_TELEMETRY is False
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def test_a_token_goes_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    assert sft(tmp_path, "hub_token: hf_secret").hub_token is None
    assert os.environ["HF_TOKEN"] == "hf_secret"


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("--save_steps 2.5 --eval_strategy steps --eval_steps 3.5", ["eval_steps", "save_steps"]),
        ("--save_steps 2.5 --warmup_steps 50 --max_steps 10", ["save_steps", "warmup_steps"]),
        ("--debug foo", ["debug"]),
    ],
)
def test_what_only_a_constructor_refuses_is_reported_at_once(tmp_path: Path, words: str, fields: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        sft(tmp_path, "", *words.split())
    assert sorted(problem.field for problem in caught.value.problems) == fields
