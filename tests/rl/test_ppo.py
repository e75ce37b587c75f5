"""What `PPOTrainer` learns, and what its options do."""

import dataclasses
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
from trl import GRPOTrainer

from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_metrics import Averages, of_update
from recipes.worlds.pocket.annotators import hidden_taste
from tests.helpers import ppo_toy as toy
from tests.helpers.small_model import ROOT

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trainer(tmp_path: Path, rewards: Any = toy.share_of_red, **changes: Any) -> PPOTrainer:
    """Build a trainer on the toy world. `changes` are arguments of the trainer or fields of its configuration."""
    names = (
        "model",
        "train_dataset",
        "eval_dataset",
        "value_model",
        "peft_config",
        "reward_processing_classes",
        "optimizers",
    )
    given = {name: changes.pop(name) for name in names if name in changes}
    model = given.pop("model", None) or toy.policy()
    dataset = given.pop("train_dataset", None) or toy.prompts()
    config = toy.config(tmp_path, **changes)
    return PPOTrainer(model, rewards, config, dataset, processing_class=toy.tokenizer(), **given)


def logged(trainer: PPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def is_red(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(completion[0]["content"] == "red") for completion in completions]


BANDIT = {
    "max_completion_length": 1,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-2,
    "kl_coef": 0.0,
    "num_iterations": 2,
}


def test_learns_a_bandit(tmp_path: Path) -> None:
    """One of fifteen arms pays."""
    ppo = trainer(tmp_path, is_red, max_steps=80, train_dataset=toy.prompts(64), **BANDIT)
    ppo.train()
    scores = logged(ppo, "objective/scores")
    assert scores[0] < 0.3
    assert sum(scores[-5:]) / 5 > 0.95


def test_the_kl_penalty_keeps_the_policy_near_the_reference(tmp_path: Path) -> None:
    options = BANDIT | {"max_steps": 40, "train_dataset": toy.prompts(64)}
    free = trainer(tmp_path / "free", is_red, **(options | {"kl_coef": 1e-6}))
    held = trainer(tmp_path / "held", is_red, **(options | {"kl_coef": 10.0}))
    for ppo in (free, held):
        ppo.train()
    assert sum(logged(free, "objective/kl")[-5:]) / 5 > 1.0
    assert abs(sum(logged(held, "objective/kl")[-5:]) / 5) < 0.1
    assert logged(held, "objective/scores")[-1] < 0.5


def test_the_critic_learns_to_predict_the_reward(tmp_path: Path) -> None:
    """The policy does not change, and the reward depends on the prompt only."""

    def by_row(row: list[int], **kwargs: Any) -> list[float]:
        return [float(r % 3) for r in row]

    ppo = trainer(
        tmp_path,
        by_row,
        learning_rate=0.0,
        value_learning_rate=1e-2,
        vf_coef=1.0,
        cliprange_value=10.0,
        num_iterations=4,
        max_steps=80,
        per_device_train_batch_size=16,
    )
    before = weights(ppo.model)
    ppo.train()
    losses = logged(ppo, "loss/value_avg")
    assert losses[-1] < 0.1 * losses[0]
    assert logged(ppo, "val/explained_variance")[-1] > 0.8
    assert torch.equal(before, weights(ppo.model))


def test_the_critic_alone_is_trained_at_first(tmp_path: Path) -> None:
    """Then the policy learns as if its training began there: without decay, and without steps in its optimizer."""
    ppo = trainer(tmp_path, value_warmup_steps=2, max_steps=3, weight_decay=0.5, learning_rate=1e-2)
    seen = []
    original = ppo.training_step

    def step(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((weights(ppo.model), weights(ppo.value_model)))
        return original(*args, **kwargs)

    ppo.training_step = step
    ppo.train()
    seen.append((weights(ppo.model), weights(ppo.value_model)))
    policies, critics = zip(*seen, strict=True)
    assert [not torch.equal(a, b) for a, b in pairwise(policies)] == [False, False, True]
    assert [not torch.equal(a, b) for a, b in pairwise(critics)] == [True, True, True]
    for network, optimizer, expected in (
        (ppo.model, ppo.optimizer, 1),
        (ppo.value_model, ppo.critic.optimizer, 3),
    ):
        steps = {int(optimizer.state[parameter]["step"]) for parameter in network.parameters()}
        assert steps == {expected}


def test_the_critic_has_its_own_lambda(tmp_path: Path) -> None:
    """With 1, it learns the rewards that really follow; the advantages stay those of `lam`."""
    batches, originals = [], []
    for value_lam in (None, 1.0):
        options = {"lam": 0.5, "value_lam": value_lam, "kl_coef": 0.0, "whiten_advantages": False}
        ppo = trainer(tmp_path, toy.share_of_red, max_steps=1, value_model=toy.reward_model(), **options)
        originals.append(ppo._generate_and_score_completions)
        ppo._generate_and_score_completions = lambda inputs: batches.append(originals[-1](inputs)) or batches[-1]
        ppo.train()
        batch, mask = batches[-1], batches[-1]["completion_mask"]
        error = ((batch["returns"] - batch["old_values"]) * mask).double().square().sum() / mask.sum()
        returns = batch["returns"][mask > 0].double()
        explained = 1 - error / (returns.square().mean() - returns.mean().square())
        assert logged(ppo, "val/explained_variance")[0] == pytest.approx(float(explained), rel=1e-4)
    same, own = batches
    mask = same["completion_mask"]
    assert torch.equal(same["advantages"], own["advantages"])
    torch.testing.assert_close(same["returns"], (same["advantages"] + same["old_values"]) * mask)
    assert own["returns"].max() > 0
    torch.testing.assert_close(own["returns"], own["returns"][:, :1] * mask, msg="the score, at each token")


@pytest.mark.parametrize("normalization", ["none", "batch", "running"])
def test_reward_model_and_function_together(tmp_path: Path, normalization: str) -> None:
    ppo = trainer(
        tmp_path,
        [toy.reward_model(), toy.share_of_red],
        reward_processing_classes=[toy.tokenizer(), None],
        reward_weights=[1.0, 2.0],
        reward_normalization=normalization,
        max_steps=2,
    )
    ppo.train()
    assert len(logged(ppo, "rewards/share_of_red/mean")) == 2
    scores = logged(ppo, "objective/scores")
    if normalization == "none":
        assert scores == pytest.approx(logged(ppo, "reward"), abs=1e-5)
    else:
        assert scores[0] == pytest.approx(0.0, abs=1e-5)


def test_nothing_is_learned_from_rewards_of_none(tmp_path: Path) -> None:
    """If a reward function scores no completion, the weights stay the same."""

    def none(prompts: list[Any], **kwargs: Any) -> list[None]:
        return [None] * len(prompts)

    ppo = trainer(tmp_path, none, max_steps=2)
    before = weights(ppo.model)
    ppo.train()
    assert torch.equal(before, weights(ppo.model))


def test_the_hidden_taste_is_measured_and_changes_nothing(tmp_path: Path) -> None:
    graded = toy.prompts(16).map(lambda row: {"require": [["red"]], "reject": ["blue"], "test": ""})
    runs = []
    for functions in ([], [hidden_taste]):
        runs.append(
            trainer(
                tmp_path / str(len(functions)),
                [toy.reward_model(), *functions],
                reward_processing_classes=[toy.tokenizer(), None][: 1 + len(functions)],
                reward_weights=[1.0, 0.0][: 1 + len(functions)],
                reward_normalization="running",
                num_iterations=2,
                train_dataset=graded,
            )
        )
        runs[-1].train()
    without, measured = runs
    assert torch.equal(weights(without.model), weights(measured.model))
    assert torch.equal(weights(without.value_model), weights(measured.value_model))
    for name in ("loss", "reward", "objective/scores", "objective/kl", "grad_norm", "val/grad_norm"):
        assert logged(without, name) == logged(measured, name)
    # What the report plots: the log has KL and reward in every entry that has the taste.
    tastes = [entry for entry in measured.state.log_history if "rewards/hidden_taste/mean" in entry]
    assert len(tastes) == 2
    assert all({"reward", "objective/kl"} <= set(entry) for entry in tastes)


def test_a_reward_model_reads_a_truncated_completion_as_it_stands(tmp_path: Path) -> None:
    judge = {"rewards": toy.end_detector(), "reward_processing_classes": toy.tokenizer()}
    ppo = trainer(tmp_path, **judge, max_steps=1, max_completion_length=3, per_device_train_batch_size=16)
    ppo.train()
    ended = logged(ppo, "val/num_eos_tokens")[0]
    assert 0 < ended < 16
    assert logged(ppo, "objective/scores")[0] == pytest.approx(ended / 16, abs=1e-4)


def test_truncated_completions(tmp_path: Path) -> None:
    """They are penalised by `missing_eos_penalty`, and left out by `mask_truncated_completions`."""

    def always(prompts: list[Any], **kwargs: Any) -> list[float]:
        return [1.0] * len(prompts)

    options: dict[str, Any] = {"max_completion_length": 1, "max_steps": 2, "per_device_train_batch_size": 16}
    ppo = trainer(tmp_path / "penalty", always, missing_eos_penalty=3.0, **options)
    ppo.train()
    ended = logged(ppo, "val/num_eos_tokens")
    assert 0 < sum(ended) < 32
    assert logged(ppo, "objective/scores") == pytest.approx([1 - 3 * (16 - count) / 16 for count in ended])

    ppo = trainer(tmp_path / "masked", always, mask_truncated_completions=True, **options)
    # Neither padding nor the end of a turn is sampled.
    ppo.generation_config.suppress_tokens = [0, 2]
    before = weights(ppo.model)
    ppo.train()
    assert torch.equal(before, weights(ppo.model))


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """One batch of 8 and 8 batches of 1 give the same rollouts and the same updates."""
    runs = []
    for rows in (8, 1):
        ppo = trainer(
            tmp_path / str(rows),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=8 // rows,
            num_iterations=2,
            max_grad_norm=0.1,
        )
        ppo.train()
        runs.append(ppo)
    whole, parts = runs
    torch.testing.assert_close(weights(whole.model), weights(parts.model), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(whole.value_model), weights(parts.value_model), rtol=1e-4, atol=1e-6)
    assert logged(whole, "loss") == pytest.approx(logged(parts, "loss"), abs=1e-5)


def test_several_optimizer_steps_per_rollout(tmp_path: Path) -> None:
    """16 completions are trained on twice, 4 at a time, which makes 8 steps until the next rollout."""
    calls = []

    def count(completions: list[Any], **kwargs: Any) -> list[float]:
        calls.append(len(completions))
        return toy.share_of_red(completions)

    ppo = trainer(
        tmp_path,
        count,
        per_device_train_batch_size=4,
        generation_batch_size=16,
        num_iterations=2,
        max_steps=16,
    )
    ppo.train()
    assert calls == [16, 16]
    ratios = logged(ppo, "val/ratio")
    assert [round(ratios[step], 4) for step in (0, 8)] == [1.0, 1.0]
    assert all(abs(ratios[step] - 1) > 1e-6 for step in (1, 7, 9, 15))


def test_clipping_and_learning_rates_are_in_force(tmp_path: Path) -> None:
    options = {"max_grad_norm": 1e-3, "value_learning_rate": 0.5, "learning_rate": 0.25, "warmup_steps": 2}
    ppo = trainer(tmp_path, max_steps=3, lr_scheduler_type="constant_with_warmup", **options)
    ppo.create_optimizer()
    ppo.create_scheduler(3)
    norms: dict[str, list[float]] = {"policy": [], "critic": []}
    rates: dict[str, list[float]] = {"policy": [], "critic": []}

    def spy(name: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def look(*_: Any) -> None:
            gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
            norms[name].append(round(torch.cat(gradients).norm().item(), 5))
            rates[name] += {group["lr"] for group in optimizer.param_groups}

        optimizer.register_step_pre_hook(look)

    spy("policy", ppo.model, ppo.optimizer)
    spy("critic", ppo.value_model, ppo.critic.optimizer)
    ppo.train()
    assert norms == {"policy": [1e-3] * 3, "critic": [1e-3] * 3}
    assert logged(ppo, "grad_norm")[0] > 1e-3
    assert logged(ppo, "val/grad_norm")[0] > 1e-3
    assert rates == {"policy": [0.0, 0.125, 0.25], "critic": [0.0, 0.25, 0.5]}


def test_without_clipping_the_critic_learns(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_steps=1, max_grad_norm=0.0, value_learning_rate=0.1)
    before = [weight.clone() for weight in ppo.value_model.parameters()]
    ppo.train()
    assert not all(map(torch.equal, before, ppo.value_model.parameters()))


def test_a_schedule_that_follows_evaluations_is_the_critics_as_well(tmp_path: Path) -> None:
    """The reward never changes, so that both learning rates are halved again and again."""

    def same(prompts: list[Any], **kwargs: Any) -> list[float]:
        return [1.0] * len(prompts)

    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0}}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "reward", "max_steps": 4}
    ppo = trainer(tmp_path, same, eval_dataset=toy.prompts(2), value_learning_rate=3e-3, **plateau, **evaluation)
    ppo.train()
    policy, critic = (o.param_groups[0]["lr"] for o in (ppo.optimizer, ppo.critic.optimizer))
    assert policy < 1e-3
    assert critic in (3 * policy, pytest.approx(6 * policy)), "that of the last step, or of the step before"


def test_critic_gradients_are_zeroed_at_every_step(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_steps=3, value_learning_rate=0.0, learning_rate=0.0, vf_coef=1.0)
    ppo.train()
    norms, losses = logged(ppo, "val/grad_norm"), logged(ppo, "loss/value_avg")
    assert max(norms) / min(norms) < 3 * max(losses) / min(losses)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        ppo = trainer(tmp_path / str(on), activation_checkpointing=on, max_steps=2)
        ppo.train()
        runs.append(ppo)
    assert runs[1].value_model.is_activation_checkpointing
    torch.testing.assert_close(weights(runs[0].model), weights(runs[1].model))
    torch.testing.assert_close(weights(runs[0].value_model), weights(runs[1].value_model))


def test_bf16_runs_both_networks_in_bf16(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, bf16=True, max_steps=1)
    dtypes = set()
    for model in (ppo.model, ppo.value_model):
        model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, output: dtypes.add(output.dtype))
    ppo.train()
    assert dtypes == {torch.bfloat16}
    assert weights(ppo.value_model).dtype == torch.float32


@pytest.mark.parametrize("cast", [True, False])
def test_cast_lm_head_to_fp32_holds_for_sampling_and_for_every_score(tmp_path: Path, cast: bool) -> None:
    ppo = trainer(tmp_path, bf16=True, max_steps=1, cast_lm_head_to_fp32=cast, kl_coef=0.1)
    passes = set()
    ppo.model.lm_head.register_forward_hook(
        lambda *_: passes.add((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
    )
    errors = toy.rounding_errors(ppo.model.lm_head), toy.rounding_errors(ppo.ref_model.lm_head)
    ppo.train()
    assert len(passes) == 3, "sampling, scoring and training"
    assert all((max(found) < 1e-5) == cast for found in errors)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_on_cpus_are_those_of_the_fused_head(tmp_path: Path, temperature: float) -> None:
    ppo = trainer(tmp_path, temperature=temperature)
    ids, mask = torch.randint(3, 15, (5, 9)), torch.ones(5, 9, dtype=torch.long)
    mask[:2, :3] = 0
    plain = ppo._get_per_token_logps_and_entropies(ppo.model, ids, mask, 4, 2, compute_entropy=True)
    fused = GRPOTrainer._get_per_token_logps_and_entropies(ppo, ppo.model, ids, mask, 4, 2, compute_entropy=True)
    for a, b in zip(plain[:2], fused[:2], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("ratio", [1.0, 0.9, 1.1, 1.3])
def test_the_variance_of_equal_ratios_is_not_negative(ratio: float) -> None:
    averages = Averages()
    for tokens in (3, 5, 7):
        mask = torch.ones(2, tokens)
        averages.add(mask, of_update(torch.full_like(mask, ratio).log(), mask, mask))
    metrics = averages.take(lambda sums: sums)
    assert metrics["val/ratio"] == pytest.approx(ratio)
    assert 0 <= metrics["val/ratio_var"] < 1e-12


def test_the_variance_of_ratios_near_1_is_exact() -> None:
    log_ratio = torch.tensor([[1e-6, -1e-6, 3e-6, -3e-6]])
    averages = Averages()
    averages.add(torch.ones(1, 4), of_update(log_ratio.double(), log_ratio, log_ratio))
    variance = averages.take(lambda sums: sums)["val/ratio_var"]
    assert variance == pytest.approx(5e-12, rel=1e-4)


def test_a_subclass_can_score_completions_as_the_docstring_shows(tmp_path: Path) -> None:
    """The metrics follow, and so does what is learned."""
    code = re.search(r"^        class .*?\n\n", PPOTrainer.__doc__, re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {"PPOTrainer": PPOTrainer, "dataclasses": dataclasses}
    exec(textwrap.dedent(code.group()), namespace)  # noqa: S102
    runs = []
    for kind in (PPOTrainer, namespace["BriefPPOTrainer"]):
        args = toy.config(tmp_path / kind.__name__, max_steps=1)
        ppo = kind(toy.policy(), toy.share_of_red, args, toy.prompts(), processing_class=toy.tokenizer())
        ppo.train()
        runs.append(ppo)
    plain, brief = runs
    length = logged(plain, "completions/mean_length")[0]
    assert logged(brief, "completions/mean_length")[0] == length, "the same rollout"
    assert logged(brief, "reward") == logged(plain, "reward")
    scores = [logged(ppo, "objective/scores")[0] for ppo in runs]
    assert scores[0] - scores[1] == pytest.approx(0.01 * length, rel=1e-4)
    assert not torch.equal(weights(plain.value_model), weights(brief.value_model))


def entropy_trainer(coefficient: str) -> type[PPOTrainer]:
    """Return the class in `docs/ppo.md`, with another coefficient of the entropy."""
    page = (ROOT / "docs/ppo.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n((?:(?!```).)*class EntropyPPO.*?)```", page, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code.replace("0.01", coefficient), namespace)  # noqa: S102
    return namespace["EntropyPPO"]


def test_the_entropy_bonus_of_the_page_trains_the_policy_as_entropy_coef_does(tmp_path: Path) -> None:
    def trained(name: str, kind: type[PPOTrainer], **changes: Any) -> torch.Tensor:
        args = toy.config(tmp_path / name, max_steps=3, optim="sgd", learning_rate=0.1, **changes)
        ppo = kind(toy.policy(), toy.share_of_red, args, toy.prompts(), processing_class=toy.tokenizer())
        ppo.train()
        return weights(ppo.model)

    plain = trained("plain", PPOTrainer)
    option = trained("option", PPOTrainer, entropy_coef=0.5)
    subclass = trained("subclass", entropy_trainer("0.5"))
    torch.testing.assert_close(subclass, option)
    assert (subclass - plain).abs().max() > 1e-4


def test_without_its_attribute_the_entropy_of_a_subclass_has_no_gradient(tmp_path: Path) -> None:
    kind = entropy_trainer("0.5")
    policies = []
    for learns in (True, False):
        kind.learns_from_entropy = learns
        args = toy.config(tmp_path / str(learns), max_steps=1)
        ppo = kind(toy.policy(), toy.share_of_red, args, toy.prompts(), processing_class=toy.tokenizer())
        ppo.train()
        assert ppo.latest_entropies.requires_grad == learns
        policies.append(weights(ppo.model))
    plain = trainer(tmp_path / "plain", max_steps=1)
    plain.train()
    assert torch.equal(policies[1], weights(plain.model))
    assert not torch.equal(policies[0], policies[1])


def test_what_tokens_add_to_the_loss_does_not_depend_on_how_a_step_is_divided(tmp_path: Path) -> None:
    """With completions of different lengths, in one micro-batch or in four."""
    kind = entropy_trainer("0.5")
    policies = []
    for size in (8, 2):
        options: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        args = toy.config(tmp_path / str(size), max_steps=1, optim="sgd", learning_rate=0.1, **options)
        policy = toy.policy()
        with torch.no_grad():
            # Otherwise, hardly a completion of so small a model ends before the limit.
            policy.lm_head.weight[toy.tokenizer().eos_token_id] += 0.5
        ppo = kind(policy, toy.share_of_red, args, toy.prompts(), processing_class=toy.tokenizer())
        ppo.train()
        assert logged(ppo, "completions/min_length") < logged(ppo, "completions/max_length")
        policies.append(weights(ppo.model))
    torch.testing.assert_close(*policies)


def test_an_entropy_that_is_only_logged_costs_no_gradient(tmp_path: Path) -> None:
    needs_gradient = []
    ppo = trainer(tmp_path, max_steps=1)
    compute = ppo._get_per_token_logps_and_entropies

    def look(*args: Any, **kwargs: Any) -> Any:
        log_probs, entropies, more = compute(*args, **kwargs)
        if entropies is not None:
            needs_gradient.append((log_probs.requires_grad, entropies.requires_grad))
        return log_probs, entropies, more

    ppo._get_per_token_logps_and_entropies = look
    ppo.train()
    assert needs_gradient == [(True, False)]


def tokens(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def test_an_evaluation_counts_every_completion_equally(tmp_path: Path) -> None:
    """With two data sets, whose last batches are smaller than the others. Compare with all that was sampled."""
    ppo = trainer(
        tmp_path, tokens, eval_dataset={"a": toy.prompts(5), "b": toy.prompts(3)}, per_device_eval_batch_size=4
    )
    kept, original = [], ppo._generate_and_score_completions
    ppo._generate_and_score_completions = lambda inputs: kept.append(original(inputs)) or kept[-1]
    for name, batches in (("a", 2), ("b", 1)):
        kept.clear()
        measured = ppo.evaluate(ppo.eval_dataset[name], metric_key_prefix=f"eval_{name}")
        assert len(kept) == batches
        lengths = [int(n) for batch in kept for n in batch["completion_mask"].sum(1)]
        stops = sum(int((batch["completion_ids"] == 2).sum()) for batch in kept)
        mean = sum(lengths) / len(lengths)
        assert measured[f"eval_{name}_objective/scores"] == pytest.approx(mean)
        assert measured[f"eval_{name}_reward"] == pytest.approx(mean)
        assert measured[f"eval_{name}_val/num_eos_tokens"] == stops
        masks, errors = ([batch[key] for batch in kept] for key in ("completion_mask", "returns"))
        errors = [(e - batch["old_values"]).square() * m for e, m, batch in zip(errors, masks, kept, strict=True)]
        loss = 0.5 * sum(e.sum() for e in errors) / sum(lengths)
        assert measured[f"eval_{name}_loss/value_avg"] == pytest.approx(loss.item(), rel=1e-4)
    (a, b) = ppo.state.log_history[-2:]
    assert "eval_a_objective/scores" in a and "eval_b_objective/scores" in b and "eval_objective/scores" not in a | b


def test_masked_completions_are_left_out_of_every_mean(tmp_path: Path) -> None:
    """The scores of truncated completions enter neither means nor normalisation."""
    for normalization in ("none", "batch", "running"):
        ppo = trainer(
            tmp_path,
            tokens,
            max_steps=1,
            max_completion_length=4,
            per_device_train_batch_size=32,
            train_dataset=toy.prompts(64),
            mask_truncated_completions=True,
            reward_normalization=normalization,
        )
        kept, original = [], ppo._generate_and_score_completions
        ppo._generate_and_score_completions = lambda inputs, kept=kept, original=original: (
            kept.append(original(inputs)) or kept[-1]
        )
        ppo.train()
        mask = kept[0]["completion_mask"]
        left = mask.any(dim=1)
        assert 0 < left.sum() < len(left)
        surprise = -(kept[0]["old_per_token_logps"] * mask).sum(1)[left].mean().item()
        assert logged(ppo, "objective/entropy")[0] == pytest.approx(surprise, rel=1e-4)
        mean = mask.sum(1)[left].float().mean().item() if normalization == "none" else 0.0
        assert logged(ppo, "objective/scores")[0] == pytest.approx(mean, abs=1e-5)
        assert ppo.score_moments.count == (left.sum() if normalization == "running" else 0)


def test_the_reference_does_not_change(tmp_path: Path) -> None:
    """Whatever is done to the policy's head, and in whatever precision its logits are computed."""
    ids = torch.tensor([[3, 5, 6, 4]])
    for cast in (False, True):
        policy = toy.policy().train()
        ppo = trainer(tmp_path, model=policy, cast_lm_head_to_fp32=cast)
        assert not ppo.ref_model.training
        before = ppo.ref_model(input_ids=ids).logits
        torch.testing.assert_close(before, toy.policy()(input_ids=ids).logits)
        ppo.model.lm_head.weight.data.normal_()
        assert torch.equal(ppo.ref_model(input_ids=ids).logits, before)


def test_an_optimizer_of_the_user_is_the_policys(tmp_path: Path) -> None:
    """The critic has one of its own, on the same schedule."""
    policy = toy.policy()
    critic = AutoModelForTokenClassification.from_config(toy.llama_config(num_labels=1))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    both = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5))
    before, policy_before = weights(critic), weights(policy)
    ppo = trainer(tmp_path, model=policy, value_model=critic, optimizers=both, max_steps=1, value_learning_rate=1e-3)
    ppo.train()
    assert not torch.equal(weights(critic), before) and not torch.equal(weights(policy), policy_before)
    assert ppo.optimizer.optimizer is optimizer
    assert {group["lr"] for group in ppo.critic.optimizer.param_groups} == {5e-4}


def test_the_policy_loss_is_the_clipped_one(tmp_path: Path) -> None:
    """Compare TRL's loss with a loop over tokens, of which some are clipped and some are padding."""
    ppo = trainer(tmp_path, cliprange=0.2, vf_coef=0.0, max_completion_length=5, kl_coef=0.0)
    ppo.model.train()
    batch = ppo._generate_and_score_completions([dict(row) for row in toy.prompts(8)])
    generator = torch.Generator().manual_seed(0)
    shape = batch["completion_ids"].shape
    batch["advantages"] = torch.randn(shape, generator=generator)
    moved = torch.randn(shape, generator=generator) * 0.5
    logps = batch["old_per_token_logps"].clone()
    batch["old_per_token_logps"] = logps - moved
    ppo.current_gradient_accumulation_steps = 1
    loss = ppo.compute_loss(ppo.model, batch)
    expected, tokens, clipped = 0.0, 0, 0
    for ratios, advantages, mask in zip(moved.exp(), batch["advantages"], batch["completion_mask"], strict=True):
        for ratio, advantage, real in zip(ratios.tolist(), advantages.tolist(), mask.tolist(), strict=True):
            bounded = min(max(ratio, 0.8), 1.2)
            expected += real * max(-advantage * ratio, -advantage * bounded)
            clipped += real * (-advantage * bounded > -advantage * ratio)
            tokens += real
    assert loss.item() == pytest.approx(expected / tokens, rel=1e-4)
    assert ppo._metrics["train"]["clip_ratio/region_mean"][-1] == pytest.approx(clipped / tokens)
    assert 0 < clipped < tokens < mask.numel() * len(moved)


def test_evaluation_measures_and_does_not_change_training(tmp_path: Path) -> None:
    runs = []
    for strategy in ("no", "steps"):
        ppo = trainer(
            tmp_path / strategy,
            eval_strategy=strategy,
            eval_steps=1,
            per_device_eval_batch_size=10,
            eval_dataset=toy.prompts(12),
            log_completions=True,
            reward_normalization="running",
        )
        ppo.train()
        runs.append(ppo)
    quiet, evaluated = runs
    assert torch.equal(weights(quiet.model), weights(evaluated.model))
    assert torch.equal(weights(quiet.value_model), weights(evaluated.value_model))
    for name in ("eval_loss", "eval_objective/kl", "eval_objective/scores", "eval_loss/value_avg"):
        assert len(logged(evaluated, name)) == 4


def test_metrics_count_real_tokens_only(tmp_path: Path) -> None:
    """Compare with means computed token by token, in a batch whose completions differ in length."""
    ppo = trainer(tmp_path, max_steps=1, max_completion_length=12, kl_coef=0.5)
    for parameter in ppo.ref_model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    batch = {}
    generate = ppo._generate_and_score_completions
    score = ppo._get_per_token_logps_and_entropies
    noise = torch.Generator().manual_seed(0)

    def record(inputs: Any) -> Any:
        batch.update(generate(inputs))
        return batch

    def score_padding_at_random(model: Any, ids: Any, attention_mask: Any, length: int, *args: Any, **kw: Any) -> Any:
        # On a CPU, padding would have log-probabilities of 0, which change no sum. On a GPU, they are arbitrary.
        logps, *others = score(model, ids, attention_mask, length, *args, **kw)
        is_padding = attention_mask[:, -length:] == 0
        return logps + is_padding * torch.randn(logps.shape, generator=noise), *others

    ppo._generate_and_score_completions = record
    ppo._get_per_token_logps_and_entropies = score_padding_at_random
    # A copy of the policy that samples, because training changes the weights.
    sampling_policy = toy.policy()
    sampling_policy.load_state_dict(ppo.model.state_dict())
    ppo.train()

    def log_probs(model: Any, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities of all words, before each token of the completion: (tokens, vocabulary)."""
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits
        return logits[0, len(prompt) - 1 : -1].log_softmax(-1)

    kls, k3s, entropies = [], [], []
    for i in range(len(batch["completion_ids"])):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i] > 0]
        completion = batch["completion_ids"][i][batch["completion_mask"][i] > 0]
        of_policy = log_probs(sampling_policy, prompt, completion)
        of_reference = log_probs(ppo.ref_model, prompt, completion)
        log_ratio = (of_reference - of_policy).gather(1, completion[:, None])
        kls.append(-log_ratio.sum().item())
        k3s.append((log_ratio.exp() - 1 - log_ratio).sum().item())
        entropies.append(-(of_policy.exp() * of_policy).sum(-1))
    assert len({len(entropy) for entropy in entropies}) > 1, "completions of different lengths"
    assert logged(ppo, "objective/kl")[0] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert logged(ppo, "objective/kl_k3")[0] == pytest.approx(sum(k3s) / len(k3s), rel=1e-3)
    assert logged(ppo, "objective/non_score_reward")[0] == pytest.approx(-0.5 * sum(kls) / len(kls), rel=1e-3)
    assert logged(ppo, "entropy")[0] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-4)


def test_lora(tmp_path: Path) -> None:
    """The adapter is trained, the base is the reference, and what is saved loads."""
    toy.policy().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ppo = trainer(tmp_path / "run", model=base, peft_config=LORA, kl_coef=0.1, max_steps=3)
    ppo.train()
    ppo.save_model()
    assert ppo.ref_model is None
    assert logged(ppo, "objective/kl")[0] == 0.0
    assert logged(ppo, "objective/kl")[-1] != 0.0
    assert {name for name, weight in ppo.value_model.named_parameters() if weight.requires_grad} == {
        name for name, _ in ppo.value_model.named_parameters() if "lora_" in name or "score.modules_to_save" in name
    }

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run")
    ids = torch.tensor([[3, 5, 6, 4]])
    with torch.no_grad():
        trained, saved = ppo.model(input_ids=ids).logits, loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            assert torch.equal(loaded(input_ids=ids).logits, toy.policy()(input_ids=ids).logits)
    assert torch.equal(trained, saved)


def test_the_reference_of_an_adapter_is_the_adapter_before_training(tmp_path: Path) -> None:
    model = get_peft_model(toy.policy(), LORA)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    ppo = trainer(tmp_path, model=model, max_steps=2)
    ppo.train()
    assert logged(ppo, "objective/kl")[0] == pytest.approx(0.0, abs=1e-5)
    assert abs(logged(ppo, "objective/kl")[1]) > 1e-5


def test_saved_policy_and_critic_load(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_steps=1)
    ppo.train()
    ppo.save_model()
    policy = AutoModelForCausalLM.from_pretrained(tmp_path)
    critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "value_model")
    assert torch.equal(weights(policy), weights(ppo.model))
    assert torch.equal(weights(critic), weights(ppo.value_model))


def test_text_prompts_and_groups(tmp_path: Path) -> None:
    """Prompts may be plain text, with several completions for each."""
    texts = Dataset.from_dict({"prompt": ["<user> red <assistant>", "<user> why <assistant>"] * 4})

    def length(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    ppo = trainer(tmp_path, length, train_dataset=texts, num_generations=4, max_steps=2)
    ppo.train()
    assert len(logged(ppo, "objective/scores")) == 2
