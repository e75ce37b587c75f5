"""Which rewards are accepted, and which are refused."""

import os
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from pipeline.rl.arguments import PPORewardArguments
from pipeline.rl.reward_checks import check_reward_model, check_rewards, check_value_model
from tests.helpers import ppo_toy as toy


def save_reward_model(folder: Path, labels: int = 1, tokenizer: bool = True) -> str:
    LlamaForSequenceClassification(toy.llama_config(num_labels=labels)).save_pretrained(folder)
    if tokenizer:
        toy.tokenizer().save_pretrained(folder)
    return str(folder)


def test_accepts_models_and_functions_that_can_be_used(tmp_path: Path) -> None:
    path = save_reward_model(tmp_path)
    train = Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})
    assert check_rewards([path], ["math_answer", "tests.helpers.ppo_toy:share_of_red"], None, train) == []
    assert check_rewards([path], ["hidden_taste"], [1.0, 0.0], train) == []
    assert check_rewards([], ["math_answer"], None, None) == []
    assert check_value_model(path, toy.tokenizer()) == []


def test_everything_wrong_is_reported_together(tmp_path: Path) -> None:
    three = save_reward_model(tmp_path / "three", labels=3)
    args = PPORewardArguments([three, str(tmp_path / "missing")], ["exact_anser"], str(tmp_path / "nothing"))
    reported = [str(problem) for problem in args.preflight(None, toy.tokenizer(), None)]
    assert len(reported) == 4
    assert "3 labels" in reported[0] and str(tmp_path / "missing") in reported[1] and "exact_answer" in reported[2]
    assert reported[3].startswith("value_model_path")


def test_a_run_without_any_reward_is_refused() -> None:
    (problem,) = PPORewardArguments().preflight(None, None, None)
    assert "reward_funcs" in str(problem)


def test_a_reward_model_needs_a_tokenizer_that_fits_it_and_formats_conversations(tmp_path: Path) -> None:
    (problem,) = check_reward_model(save_reward_model(tmp_path / "none", tokenizer=False))
    assert "no tokenizer" in problem.remedy and problem.field == "reward_model_path"
    path = save_reward_model(tmp_path / "other", tokenizer=False)
    other = toy.tokenizer()
    other.add_tokens(["yellow"])
    other.chat_template = None
    other.save_pretrained(path)
    template, vocabulary = (problem.remedy for problem in check_reward_model(path))
    assert "chat template" in template and "15 tokens and its tokenizer 16" in vocabulary


def test_a_critic_needs_the_vocabulary_of_the_policy(tmp_path: Path) -> None:
    larger = toy.tokenizer()
    larger.add_tokens(["yellow"])
    (problem,) = check_value_model(save_reward_model(tmp_path / "with"), larger)
    assert "a different tokenizer" in problem.remedy
    (problem,) = check_value_model(save_reward_model(tmp_path / "without", tokenizer=False), larger)
    assert "15 tokens" in problem.remedy and "16" in problem.remedy
    (problem,) = check_value_model(save_reward_model(tmp_path / "three", labels=3), toy.tokenizer())
    assert "3 labels" in problem.remedy
    LlamaForCausalLM(toy.llama_config()).save_pretrained(tmp_path / "policy")
    assert check_value_model(str(tmp_path / "policy"), toy.tokenizer()) == []


def test_weights_that_are_damaged_or_of_a_different_model_are_refused(tmp_path: Path) -> None:
    path = save_reward_model(tmp_path / "reward")
    os.truncate(tmp_path / "reward" / "model.safetensors", 100)
    for (problem,) in (check_reward_model(path), check_value_model(path, toy.tokenizer())):
        assert "model.safetensors is damaged" in problem.remedy
    path = save_reward_model(tmp_path / "wider")
    config = toy.llama_config(num_labels=1)
    config.intermediate_size = 8
    config.save_pretrained(path)
    for (problem,) in (check_reward_model(path), check_value_model(path, toy.tokenizer())):
        assert "do not fit its config.json" in problem.remedy


@pytest.mark.parametrize(
    ("functions", "weights", "reported"),
    [
        (["math_answer"], [1.0, 1.0], "one weight for each of the 1"),
        (["math_answer", "choice"], [0.0, 0.0], "all weights are 0"),
        (["math_answer", "hidden_taste"], None, "weight 0"),
        (["math_answer", "pipeline.rewards.functions:hidden_taste"], [1.0, 0.1], "weight 0"),
        (["code_tests"], None, "no column test"),
        ([], None, "at least one"),
    ],
)
def test_reward_weights_and_columns_that_do_not_fit_are_refused(
    functions: list[str], weights: list[float] | None, reported: str
) -> None:
    train = Dataset.from_dict({"prompt": ["a"], "answer": ["b"]})
    (problem,) = check_rewards([], functions, weights, train)
    assert reported in problem.remedy


@pytest.mark.parametrize(
    ("function", "reported"),
    [
        ("always_fails", "raised LookupError: an index is missing"),
        ("fails_later", "raised LookupError: an index is missing"),
        ("its_text", "returned str"),
        ("infinite", "returned inf for completion 0 of 2"),
        ("only_one", "returned 1 rewards"),
    ],
)
def test_a_function_is_tried_before_training(function: str, reported: str) -> None:
    train = Dataset.from_list([{"prompt": [{"role": "user", "content": "why"}], "answer": "b"}])
    (problem,) = check_rewards([], [f"tests.helpers.ppo_toy:{function}"], None, train)
    assert problem.field == "reward_funcs" and reported in problem.remedy
    assert function != "always_fails" or "ppo_toy.py:" in problem.remedy
