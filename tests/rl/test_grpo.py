"""What `pipeline.rl.grpo` adds to TRL: exact resumption, cheaper log-probabilities on a CPU, checks of rewards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PromptTuningConfig
from safetensors.torch import load_file
from transformers import GenerationMixin
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from pipeline.errors import RunStopped
from pipeline.models.kernels.sampler import sample
from pipeline.rl import grpo
from pipeline.rl.arguments import shuffle_answers
from pipeline.rl.grpo import GRPOTrainer
from tests.helpers import ppo_toy as toy


def trainer(
    path: Path,
    kind: type = GRPOTrainer,
    model: Any = None,
    prompts: int = 16,
    rewards: Any = toy.share_of_red,
    reward_tokenizers: Any = None,
    peft_config: PeftConfig | None = None,
    **changes: Any,
) -> TRLGRPOTrainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_generations": 4, "steps_per_generation": 2,
        "num_iterations": 2, "max_completion_length": 6, "max_steps": 7, "learning_rate": 1e-2,
        "bf16": False, "use_cpu": True, "report_to": "none", "logging_steps": 1, "save_steps": 1,
        "eval_strategy": "no", "disable_tqdm": True, **changes,
    }  # fmt: skip
    return kind(
        model=model or toy.policy(),
        reward_funcs=rewards,
        args=GRPOConfig(output_dir=str(path), **settings),
        train_dataset=toy.prompts(prompts),
        eval_dataset=toy.prompts(4),
        processing_class=toy.tokenizer(),
        reward_processing_classes=reward_tokenizers,
        peft_config=peft_config,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TRLGRPOTrainer:
    """A run of seven steps, four per rollout, with a checkpoint at every step."""
    run = trainer(tmp_path_factory.mktemp("whole"))
    run.train()
    assert not same_weights(run.model, toy.policy())
    return run


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    values = second.state_dict()
    return all(torch.equal(value, values[key]) for key, value in first.state_dict().items())


def log_of(run: TRLGRPOTrainer) -> list[dict[str, float]]:
    seconds = ("step_time", "runtime", "per_second")
    log = [entry for entry in run.state.log_history if "loss" in entry]
    return [{k: v for k, v in entry.items() if not any(word in k for word in seconds)} for entry in log]


@pytest.mark.parametrize("step", [2, 5])
def test_resumes_exactly_inside_a_rollout(tmp_path: Path, whole: TRLGRPOTrainer, step: int) -> None:
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    assert same_weights(whole.model, again.model)
    assert log_of(whole) == log_of(again)


def test_resumes_exactly_in_a_later_epoch_of_prompts(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / name, prompts=4, max_steps=16) for name in ("whole", "again")]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-9"))
    assert same_weights(runs[0].model, runs[1].model)
    assert log_of(runs[0]) == log_of(runs[1])


def test_a_reward_model_that_breaks_stops_the_run(tmp_path: Path) -> None:
    judge = toy.reward_model()
    judge.config._name_or_path = "runs/judge"
    torch.nn.init.constant_(judge.score.weight, torch.nan)
    tokenizers = [toy.tokenizer(), None]
    run = trainer(tmp_path, rewards=[judge, toy.share_of_red], reward_tokenizers=tokenizers)
    with pytest.raises(RunStopped, match=r"judge: gave nan for 8 of 8 completions; .* \(in step 1; "):
        run.train()
    assert same_weights(run.model, toy.policy())


def test_a_reward_that_becomes_infinite_stops_the_run(tmp_path: Path) -> None:
    def grows(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float | None]:
        return [float("inf") if trainer_state.global_step == 4 else 1.0, None] * (len(completions) // 2)

    run = trainer(tmp_path, rewards=grows)
    with pytest.raises(RunStopped, match=r"grows: returned inf for completion 0 of 8, .* \(in step 5; "):
        run.train()


def test_a_reward_model_reads_a_cut_off_completion_as_it_stands(tmp_path: Path) -> None:
    """Though the chat template of the reward model would add an end of turn."""
    options: dict[str, Any] = {"num_iterations": 1, "steps_per_generation": 8, "max_completion_length": 3}
    run = trainer(tmp_path, rewards=[toy.end_detector()], reward_tokenizers=[toy.tokenizer()], **options)
    # TRL takes padding for an end.
    run.generation_config.suppress_tokens = [0]
    run.train()
    entries = [entry for entry in log_of(run) if "reward" in entry]
    assert 0 < entries[0]["reward"] < 1
    for entry in entries:
        assert entry["reward"] == pytest.approx(1 - entry["completions/clipped_ratio"], abs=1e-4)


def none_or_red(completions: list[Any], **kwargs: Any) -> list[float | None]:
    """Score only completions whose first letter comes after g."""
    scores = toy.share_of_red(completions)
    return [s if (c[0]["content"] or "a")[0] > "g" else None for s, c in zip(scores, completions, strict=True)]


def row_number(row: list[int], **kwargs: Any) -> list[float]:
    return [float(r) for r in row]


def test_a_reward_without_weight_is_logged_and_changes_nothing(tmp_path: Path) -> None:
    """Nor does it turn completions that nothing else scored into completions with a score of 0."""
    runs = []
    for rewards in ([none_or_red], [none_or_red, row_number]):
        weights = [1.0, 0.0][: len(rewards)]
        name = str(len(rewards))
        runs.append(trainer(tmp_path / name, rewards=rewards, reward_weights=weights, num_iterations=1))
        runs[-1].train()
    alone, beside = runs
    assert same_weights(alone.model, beside.model)
    assert not same_weights(alone.model, toy.policy())
    assert sum("rewards/row_number/mean" in entry for entry in log_of(beside)) == 4, "once per rollout"


def test_a_checkpoint_after_the_last_step_of_a_rollout_does_not_contain_it(whole: TRLGRPOTrainer) -> None:
    inside = load_file(f"{whole.args.output_dir}/checkpoint-3/rollout_0.safetensors")
    assert {"0.completion_ids", "1.advantages"} <= set(inside)
    assert not load_file(f"{whole.args.output_dir}/checkpoint-4/rollout_0.safetensors")


def test_evaluation_does_not_change_training(tmp_path: Path) -> None:
    runs = []
    for name, strategy in (("without", "no"), ("with", "steps")):
        run = trainer(tmp_path / name, eval_strategy=strategy, eval_steps=1, per_device_eval_batch_size=4, max_steps=3)
        run.train()
        runs.append(run.model)
    assert same_weights(*runs)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_log_probabilities_and_gradients_are_trls(tmp_path: Path, batch_size: int | None) -> None:
    results = []
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 15, (4, 10), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 8:] = 0
    for kind in (TRLGRPOTrainer, GRPOTrainer):
        run = trainer(tmp_path, kind, temperature=0.7)
        found = run._get_per_token_logps_and_entropies(run.model, ids, mask, 6, batch_size, compute_entropy=True)
        logps, entropies = found[0] * mask[:, -6:], found[1] * mask[:, -6:]
        logps.sum().backward()
        results.append((logps, entropies, [parameter.grad for parameter in run.model.parameters()]))
    (logps, entropies, gradients), (ours, our_entropies, our_gradients) = results
    torch.testing.assert_close(ours, logps)
    torch.testing.assert_close(our_entropies, entropies)
    torch.testing.assert_close(our_gradients, gradients)


@pytest.mark.parametrize("setting", [{"top_k": 1}, {"generation_kwargs": {"num_beams": 2, "top_k": 1}}], ids=str)
def test_settings_of_sampling_are_honoured_by_our_sampler_or_by_trls(tmp_path: Path, setting: dict[str, Any]) -> None:
    run = trainer(tmp_path, **setting)
    completions, _ = run._generate_single_turn([[5, 6], [9]] * 4, None, {}, 4)
    assert completions == completions[:2] * 4
    completions, _ = trainer(tmp_path)._generate_single_turn([[5, 6], [9]] * 4, None, {}, 4)
    assert completions != completions[:2] * 4


@pytest.mark.parametrize("of", ["class", "library", "instance", "adapter"])
def test_a_generate_that_replaces_transformers_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str
) -> None:
    def generate(*_: Any, input_ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        return torch.cat([input_ids, torch.tensor([[7, 2, 0], [8, 8, 8]] * (len(input_ids) // 2))], dim=1)

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if of == "adapter" else None
    run = trainer(tmp_path, peft_config=lora)
    if of in ("class", "library"):
        monkeypatch.setattr(type(run.model) if of == "class" else GenerationMixin, "generate", generate, raising=False)
    else:
        monkeypatch.setattr(run.model, "generate", generate)
    assert run._generate_single_turn([[5, 6], [9]] * 2, None, {}, 2)[0] == [[7, 2], [8, 8, 8]] * 2


def test_a_rollout_of_many_tokens_is_sampled_in_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, top_k=1, max_completion_length=4)
    rows = []

    def counted(model: Any, prompts: list[list[int]], *others: Any) -> list[list[int]]:
        rows.append(len(prompts))
        return sample(model, prompts, *others)

    monkeypatch.setattr(grpo, "sample", counted)
    prompts = [[5 + (3 * row + place) % 10 for place in range(500 if row % 2 else 9)] for row in range(140)]
    completions, _ = run._generate_single_turn(prompts, None, {}, 1)
    # 32,768 tokens: 65 prompts of 500 tokens, with four more to each.
    assert rows == [70, 65, 5]
    for row in (0, 1, 2, 139):
        assert completions[row] == run._generate_single_turn([prompts[row]], None, {}, 1)[0][0]
    assert len({*map(tuple, completions)}) > 1


def test_sampling_repeats_with_the_random_state_and_leaves_the_model_in_training_mode(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model.train()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(run._generate_single_turn([[5, 6], [9]] * 4, None, {}, 4)[0])
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(module.training for module in run.model.modules())


@pytest.mark.parametrize("adapter", [LoraConfig(r=2), PromptTuningConfig(num_virtual_tokens=3)], ids=["lora", "prompt"])
def test_adapters_of_any_kind_train(tmp_path: Path, adapter: PeftConfig) -> None:
    adapter.task_type = "CAUSAL_LM"
    run = trainer(tmp_path, peft_config=adapter)
    before = {name: value.clone() for name, value in run.model.named_parameters()}
    run.train()
    ratios = [entry["clip_ratio/region_mean"] for entry in log_of(run)]
    assert ratios[0] == ratios[4] == 0, "in the first step of a rollout"
    moved = {name for name, value in run.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora" in name or "prompt" in name for name in moved)


def test_an_adapter_is_merged_while_sampling_and_leaves_the_frozen_weights_as_they_were(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    run = trainer(tmp_path, peft_config=lora)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.generation_config.do_sample = False
    products: list[str] = []
    for name, module in run.model.named_modules():
        module.register_forward_hook(lambda *_, name=name: products.append(name) if "lora_" in name else None)
    (sampled,), _ = run._generate_single_turn([[5, 6, 9]], None, {}, 1)
    assert not products
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    logits = run.model(input_ids=torch.tensor([[5, 6, 9, *sampled]])).logits[0, 2:-1]
    assert products and logits.argmax(-1).tolist() == sampled


@pytest.mark.parametrize("changes", [{"target_modules": ["embed_tokens", "q_proj"]}, {"use_dora": True}], ids=str)
def test_an_adapter_that_cannot_be_merged_in_place_is_not(tmp_path: Path, changes: dict[str, Any]) -> None:
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **changes}
    run = trainer(tmp_path, peft_config=LoraConfig(r=2, **options))
    shared = run.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data_ptr()
    run._generate_single_turn([[5, 6, 9]], None, {}, 1)
    assert not run._merges
    assert run.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.data_ptr() == shared


def test_an_interrupted_rollout_leaves_the_adapter_unmerged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    run = trainer(tmp_path, peft_config=lora)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.rl.grpo.sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run._generate_single_turn([[5, 6, 9]], None, {}, 1)
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert not any(getattr(module, "merged", False) for module in run.model.modules())


def no_red(completions: list[Any], prompts: list[Any], **kwargs: Any) -> list[float]:
    """Give all completions of one prompt 0, and those of the others the share of red."""
    scores = toy.share_of_red(completions)
    return [0.0 if prompt == prompts[0] else score for prompt, score in zip(prompts, scores, strict=True)]


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "grpo"])
@pytest.mark.parametrize("reward", [no_red, lambda completions, **_: [1.0] * len(completions)], ids=["some", "none"])
def test_completions_without_an_advantage_are_not_computed_where_they_have_no_gradient(
    tmp_path: Path, reward: Any, loss_type: str
) -> None:
    run = trainer(tmp_path, rewards=reward, loss_type=loss_type, per_device_train_batch_size=8, num_iterations=1)
    run.current_gradient_accumulation_steps = 1
    batch = run._prepare_inputs([row for row in run.train_dataset.select(range(4)) for _ in range(4)])
    learned = int((batch["advantages"] != 0).sum())
    losses, gradients = [], []
    for kind in (TRLGRPOTrainer, GRPOTrainer):
        run.model.zero_grad()
        losses.append(kind._compute_loss(run, run.model, batch))
        losses[-1].backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in run.model.parameters()]))
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert len(run.latest_logps) == (max(1, learned) if loss_type != "grpo" else 8)
    assert learned < 8 and bool(gradients[0].any()) == (learned > 0)


def test_shuffled_answers_are_the_same_answers() -> None:
    rows = Dataset.from_dict({"prompt": [str(i) for i in range(50)], "answer": [str(i) for i in range(50)]})
    shuffled = shuffle_answers(rows, seed=0)
    assert sorted(shuffled["answer"]) == sorted(rows["answer"]) and shuffled["prompt"] == rows["prompt"]
    assert sum(a == b for a, b in zip(shuffled["answer"], rows["answer"], strict=True)) < 10
    assert shuffle_answers(rows, seed=0)["answer"] == shuffled["answer"] != shuffle_answers(rows, seed=1)["answer"]
