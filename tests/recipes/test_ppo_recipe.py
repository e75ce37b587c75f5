"""The PPO recipe from the command line: from files to a policy and a critic; refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer
from trl import ModelConfig

from pipeline.data.arguments import DataArguments
from pipeline.models.adapters import starting_model
from pipeline.rl.arguments import PPORewardArguments, load_rl_inputs
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.training import entry
from recipes import ppo
from tests.helpers import ppo_toy as toy
from tests.helpers.sampling_recipes import run


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Save a policy, a reward model and prompts, and return the options that name them."""
    for name, model in (("policy", toy.policy()), ("reward", toy.reward_model())):
        model.save_pretrained(tmp_path / name)
        toy.tokenizer().save_pretrained(tmp_path / name)
    toy.prompts(16).to_json(tmp_path / "prompts.jsonl")
    fields = {
        "output_dir": tmp_path / "run",
        "model_name_or_path": tmp_path / "policy",
        "reward_model_path": tmp_path / "reward",
        "reward_funcs": "tests.helpers.ppo_toy:share_of_red",
        "dataset_name": tmp_path / "prompts.jsonl",
        "validation_share": 0.25,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_iterations": 2,
        "max_steps": 7,
        "max_completion_length": 6,
        "logging_steps": 1,
        "report_to": "none",
    }
    config = tmp_path / "ppo.yaml"
    config.write_text("".join(f"{name}: {json.dumps(value, default=str)}\n" for name, value in fields.items()))
    return ["--config", str(config)]


def test_trains_evaluates_and_saves(tmp_path: Path, options: list[str]) -> None:
    done = run("recipes.ppo", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    output = tmp_path / "run"
    AutoModelForCausalLM.from_pretrained(output)
    AutoModelForTokenClassification.from_pretrained(output / "value_model")
    assert AutoTokenizer.from_pretrained(output).chat_template
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert any("eval_objective/scores" in entry for entry in log)
    assert any("rewards/reward/mean" in entry for entry in log)


TRAINER = """
from pathlib import Path
from pipeline.rl.ppo import PPOTrainer

class Count:
    belongs_to_model = False
    steps = 0

    def save(self, folder):
        Path(folder, "count.txt").write_text(str(self.steps))

    def load(self, folder):
        self.steps = int(Path(folder, "count.txt").read_text())

class FadingEntropyPPO(PPOTrainer):
    learns_from_entropy = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count = Count()
        self.parts.append(self.count)

    def policy_loss(self, model, batch):
        if model.training:
            self.count.steps += 1
        loss = super().policy_loss(model, batch)
        return loss - self.mean_over_tokens(self.latest_entropies, batch) / (1 + self.count.steps)
"""
"""A trainer whose loss depends on what it counts."""


def test_a_trainer_of_the_user_trains_and_resumes_exactly(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_trainer.py").write_text(TRAINER)
    monkeypatch.syspath_prepend(tmp_path)

    def trained(name: str, *words: str) -> dict[str, torch.Tensor]:
        entry.run(ppo.main, [*options, "--output_dir", str(tmp_path / name), *words])
        return AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()

    plain = trained("run")
    whole = trained("whole", "--trainer", "my_trainer:FadingEntropyPPO")
    assert json.loads((tmp_path / "whole/arguments.json").read_text())["trainer"] == "my_trainer:FadingEntropyPPO"
    assert any(not torch.equal(plain[name], weight) for name, weight in whole.items())
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    assert (tmp_path / "resumed/checkpoint-3/count.txt").read_text() == "3"
    shutil.copy(tmp_path / "whole/arguments.json", tmp_path / "resumed")
    resumed = trained("resumed", "--trainer", "my_trainer:FadingEntropyPPO")
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_refuses_a_trainer_of_another_stage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        entry.run(ppo.main, [*options, "--trainer", "pipeline.rl.grpo:GRPOTrainer"])
    assert "trainer: pipeline.rl.grpo:GRPOTrainer: must be a subclass of pipeline.rl.ppo" in capsys.readouterr().err


def test_refuses_before_it_writes(tmp_path: Path, options: list[str]) -> None:
    rewards = ["--reward_model_path", str(tmp_path / "nothing"), "--reward_funcs", "exact_anser"]
    refused = run("recipes.ppo", *options, *rewards, "--max_completion_length", "62")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    lines = refused.stderr.strip().splitlines()[-3:]
    assert [line.partition(":")[0] for line in lines] == ["reward_model_path", "reward_funcs", "max_completion_length"]
    assert not (tmp_path / "run").exists()


def test_refuses_a_reward_function_that_returns_text(options: list[str]) -> None:
    refused = run("recipes.ppo", *options, "--reward_funcs", "tests.helpers.ppo_toy:its_text")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "\nreward_funcs: tests.helpers.ppo_toy:its_text: returned str " in refused.stderr


@pytest.mark.parametrize(
    ("changes", "reported"),
    [
        (["--lam", "2", "--beta", "0.1"], ["lam: 2.0", "kl_coef"]),
        (["--value_warmup_steps", "8", "--value_lam", "1.5"], ["value_warmup_steps: 8", "max_steps (7)", "value_lam"]),
        (["--lam", "2", "--reward_funcs", "exact_anser"], ["lam: 2.0"]),
        (["--reward_funcs", "exact_anser"], ["exact_answer"]),
        (["--reward_model_path", "{tmp}/policy"], ["is a LlamaForCausalLM; give a reward model"]),
        (["--reward_weights", "1", "--dataset_train_split", "trian"], ["each of the 2 rewards", "trian"]),
        (
            ["--reward_funcs", "code_tests", "--max_completion_length", "63"],
            ["no column test", "every prompt takes", "context of 64"],
        ),
        (["--reward_funcs", "hidden_taste"], ["weight 0"]),
        (
            ["--value_model_path", "{tmp}/prompts.jsonl", "--model_name_or_path", "{tmp}"],
            ["value_model_path", "model_name_or_path", "no model can be loaded"],
        ),
        (["--use_peft", "--lora_target_modules", "qkv", "--value_model_path", "{tmp}/no"], ["qkv", "value_model_path"]),
        (["--lr_scheduler_type", "cosine_with_min_lr", "--reward_funcs", "os:getcwd"], ["min_lr", "**columns"]),
        (["--per_device_train_batch_size", "32"], ["generation_batch_size", "takes 32 rows"]),
    ],
)
def test_refuses_arguments_that_do_not_fit_together(
    tmp_path: Path, options: list[str], changes: list[str], reported: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def main(
        data_args: DataArguments, reward_args: PPORewardArguments, training_args: PPOConfig, model_args: ModelConfig
    ) -> None:
        load_rl_inputs(data_args, reward_args, training_args, model_args)

    with pytest.raises(SystemExit, match="2"):
        entry.run(main, [*options, *(word.replace("{tmp}", str(tmp_path)) for word in changes)])
    message = capsys.readouterr().err
    assert all(word in message for word in reported), message


def test_a_reward_model_is_loaded_with_its_own_options(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the Hub, of which the policy's revision does not exist, beside a policy in another dtype."""
    cache = tmp_path / "cache"
    repo = cache / "models--bob--reward"
    snapshot = repo / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(tmp_path / "reward", snapshot)
    toy.reward_model().to(torch.bfloat16).save_pretrained(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", str(cache), raising=False)
    trainers = []

    def main(
        data_args: DataArguments, reward_args: PPORewardArguments, training_args: PPOConfig, model_args: ModelConfig
    ) -> None:
        rewards, tokenizer, train, _ = load_rl_inputs(data_args, reward_args, training_args, model_args)
        training_args.eval_strategy = "no"
        policy = starting_model(model_args, training_args)
        trainers.append(PPOTrainer(policy, rewards, training_args, train, processing_class=tokenizer))

    # A machine without bfloat16 would refuse it. Nothing is computed here.
    monkeypatch.setattr("pipeline.hardware.supports", lambda precision: True)
    policy = ["--model_revision", "v2", "--attn_implementation", "eager", "--dtype", "bfloat16"]
    entry.run(main, [*options, *policy, "--reward_model_path", "bob/reward", "--reward_weights", "1", "0.5"])
    (ppo,) = trainers
    judge = ppo.reward_funcs[0].model
    found = [(model.config._attn_implementation, model.dtype) for model in (ppo.model, judge)]
    assert found == [("eager", torch.bfloat16), ("sdpa", torch.float32)]
    assert ppo.reward_func_names == ["reward", "share_of_red"]
