"""`PPOConfig`: its defaults, also those that depend on the machine, and the options that it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pipeline import hardware
from pipeline.config.output_directory import RESOLVED
from pipeline.config.parser import parse
from pipeline.errors import UserError
from pipeline.hardware import Choice
from pipeline.rl.ppo import PPOConfig
from tests.helpers import ppo_toy as toy


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fits_a_machine_without_an_accelerator(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's default, bf16, is refused on a CPU without it, and without `use_cpu` on one with it, too."""
    monkeypatch.setattr(hardware, "accelerator", lambda: None)
    monkeypatch.setattr(hardware, "precision", lambda: Choice(dtype, "as the test wants it"))
    config = PPOConfig(str(tmp_path), kl_coef=0.05, max_completion_length=64)
    assert (config.bf16, config.fp16, config.use_cpu) == (dtype == "bf16", False, True)


def test_what_the_user_sets_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator", lambda: None)
    for dtype in ("bf16", "fp32"):
        monkeypatch.setattr(hardware, "precision", lambda dtype=dtype: Choice(dtype, "as the test wants it"))
        for bf16 in (True, False):
            assert PPOConfig(str(tmp_path), bf16=bf16, use_cpu=True).bf16 is bf16
        fp16 = PPOConfig(str(tmp_path), fp16=True, use_cpu=True)
        assert (fp16.bf16, fp16.fp16) == (False, True)


def test_leaves_the_device_alone_where_there_is_an_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "accelerator", lambda: "cuda")
    monkeypatch.setattr(hardware, "precision", lambda: Choice("fp32", "as the test wants it"))
    config = PPOConfig(str(tmp_path))
    assert (config.bf16, config.use_cpu, config.ddp_backend) == (False, False, None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"gamma": 1.5},
        {"lam": -0.1},
        {"cliprange": 0.0},
        {"cliprange_value": -1.0},
        {"kl_coef": -0.1},
        {"value_lam": 1.1},
        {"value_warmup_steps": -1},
        {"reward_normalization": "max"},
        {"beta": 0.1},
        {"sync_ref_model": True},
        {"trust_remote_code": True},
        {"epsilon": 0.3},
        {"loss_type": "grpo"},
        {"num_generations": 0},
        {"num_generations": 3},
        {"per_device_train_batch_size": 1},
    ],
    ids=str,
)
def test_wrong_options_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "per_device" not in str(wrong) else "batch"):
        toy.config(tmp_path, **wrong)


@pytest.mark.parametrize("batch", [{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, {}])
def test_one_completion_per_prompt_is_the_default(tmp_path: Path, batch: dict[str, Any]) -> None:
    config = toy.config(tmp_path, **batch)
    assert isinstance(config, PPOConfig)
    assert (config.num_generations, config.num_generations_eval, config.epsilon) == (1, None, 0.2)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_launch_file_that_shards_is_refused_before_anything_loads(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=r"distributed_type: .*: policy and critic cannot be sharded, use DDP"):
        PPOConfig(str(tmp_path))


def test_the_estimator_of_earlier_releases_is_refused_with_what_to_do(tmp_path: Path) -> None:
    """It had one allowed value. For a run that recorded it, see `test_due.py` and `test_watch.py` as well."""
    file = tmp_path / "3_ppo.yaml"
    file.write_text(f"output_dir: {tmp_path / 'run'}\nkl_estimator: k1\n")
    for argv in (["--config", str(file)], ["--output_dir", str(tmp_path / "run"), "--kl_estimator", "k1"]):
        with pytest.raises(UserError) as caught:
            parse(PPOConfig, argv=argv)
        (problem,) = caught.value.problems
        assert problem.field == "kl_estimator"
        assert re.search(r"always uses k1.*objective/kl_k3.*omit it", problem.remedy)


def test_a_run_of_an_earlier_release_that_recorded_its_estimator_is_resumed(tmp_path: Path) -> None:
    argv = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--report_to", "none"]
    (args,) = parse(PPOConfig, argv=argv)
    (tmp_path / "run").mkdir()
    record = {**getattr(args, RESOLVED), "kl_estimator": "k1"}
    (tmp_path / "run" / "arguments.json").write_text(json.dumps(record))
    (again,) = parse(PPOConfig, argv=argv)
    assert getattr(again, RESOLVED) == getattr(args, RESOLVED)
