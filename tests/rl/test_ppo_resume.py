"""A resumed run ends like an uninterrupted one: policy, critic and optimizer, bit for bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForTokenClassification

from pipeline.errors import UserError
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.rollout_state import read_state
from tests.helpers import ppo_toy as toy

# A rollout of 8 lasts 4 optimizer steps (2 per PPO epoch, 2 epochs); the 16 prompts last two rollouts.
STEPS = 18


def trainer(output_dir: Path, **changes: Any) -> PPOTrainer:
    peft_config = changes.pop("peft_config", None)
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "generation_batch_size": 8,
        "num_iterations": 2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "lr_scheduler_type": "linear",
        "reward_normalization": "running",
    }
    return PPOTrainer(
        toy.policy(),
        [toy.reward_model(), toy.share_of_red],
        toy.config(output_dir, **(options | changes)),
        toy.prompts(16),
        eval_dataset=toy.prompts(3) if "eval_strategy" in changes else None,
        processing_class=toy.tokenizer(),
        reward_processing_classes=[toy.tokenizer(), None],
        peft_config=peft_config,
    )


def everything(trainer: PPOTrainer) -> list[torch.Tensor]:
    """Return the weights of both networks and the states of their optimizers."""
    parameters = [*trainer.model.parameters(), *trainer.value_model.parameters()]
    states = [
        state
        for optimizer in (trainer.optimizer, trainer.critic.optimizer)
        for state in optimizer.state_dict()["state"].values()
    ]
    memory = [torch.as_tensor(x) for state in states for x in state.values()]
    assert len(memory) > sum(parameter.requires_grad for parameter in parameters), "each of them has a state"
    return [x.detach() for x in parameters] + memory


def assert_resumes_exactly(tmp_path: Path, steps: list[int], **changes: Any) -> None:
    whole = trainer(tmp_path / "whole", **changes)
    whole.train()
    expected = everything(whole)
    history = [entry for entry in whole.state.log_history if "loss" in entry]
    timeless = [name for name in history[0] if name not in ("step_time",)]
    for step in steps:
        checkpoint = tmp_path / f"resumed-{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", checkpoint)
        resumed = trainer(tmp_path / f"resumed-{step}", **changes)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        for a, b in zip(expected, everything(resumed), strict=True):
            assert torch.equal(a, b), f"resumed from step {step}"
        assert resumed.score_moments == whole.score_moments
        again = [entry for entry in resumed.state.log_history if "loss" in entry]
        for a, b in zip(history, again, strict=True):
            assert {k: a[k] for k in timeless if k in a} == {k: b[k] for k in timeless if k in b}


def test_resumes_anywhere(tmp_path: Path) -> None:
    """At the first step, in and between rollouts, in and between epochs of prompts and of PPO."""
    assert_resumes_exactly(tmp_path, [1, 2, 4, 6, 8, 11, 16])


def test_resumes_while_the_critic_warms_up_and_afterwards(tmp_path: Path) -> None:
    """The warm-up ends in the middle of a rollout."""
    assert_resumes_exactly(tmp_path, [2, 5, 6], max_steps=9, value_warmup_steps=5, value_lam=1.0)


def test_resumes_after_evaluations(tmp_path: Path) -> None:
    assert_resumes_exactly(
        tmp_path, [3], max_steps=6, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3
    )


def test_resumes_an_adapter(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert_resumes_exactly(tmp_path, [3, 4], max_steps=6, peft_config=lora)


BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "objective/scores",
    "greater_is_better": False,
}


def test_resumes_and_restores_a_compiled_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrappers of `torch.compile` hide neither the critic nor that a reward model is not one."""
    # Pretraining, which compiles layer by layer, sets it for its process.
    monkeypatch.delenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", raising=False)
    compiled: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 3, **BEST}
    with torch.compiler.set_stance("force_eager"):
        assert_resumes_exactly(tmp_path, [2], **compiled)
        finished = trainer(tmp_path / "whole", **compiled)
        assert finished.restore_finished(tmp_path / "whole" / "checkpoint-3")
    expected = toy.reward_model().state_dict()
    judge = finished.reward_funcs[0].model._orig_mod
    assert all(torch.equal(weight, expected[name]) for name, weight in judge.state_dict().items())
    best = Path(finished.state.best_model_checkpoint)
    critic = AutoModelForTokenClassification.from_pretrained(best / "value_model")
    for a, b in zip(critic.parameters(), finished.value_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_best_model_has_its_critic(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_steps=4, **BEST)
    ppo.train()
    best = Path(ppo.state.best_model_checkpoint)
    critic = type(ppo.value_model).from_pretrained(best / "value_model")
    for a, b in zip(critic.parameters(), ppo.value_model.parameters(), strict=True):
        assert torch.equal(a, b)


# The bonus of the first step is not yet the one that the controller has chosen by the last.
ADAPTIVE: dict[str, Any] = {"use_adaptive_entropy": True, "entropy_target": 5.0, "entropy_coef_delta": 0.1}


@pytest.mark.parametrize(
    ("step", "others"),
    [(4, {}), (6, {}), (4, {"save_only_model": True}), (4, ADAPTIVE), (4, {"bf16": True})],
    ids=["after a rollout", "inside a rollout", "checkpoints of the model alone", "adaptive entropy bonus", "bf16"],
)
def test_killed_in_the_last_evaluation_it_reports_and_keeps_what_an_undisturbed_run_does(
    step: int, others: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That evaluation normalises scores by the moments of all rollouts; without these, another model was the best."""
    settings = {"max_steps": step, **BEST, **others}
    whole = trainer(tmp_path / "whole", **settings)
    whole.train()
    evaluations = [entry for entry in whole.state.log_history if "eval_loss" in entry]

    killed = trainer(tmp_path / "killed", **settings)
    evaluate = killed._evaluate

    def stop_at_last(*args: Any, **kwargs: Any) -> Any:
        if killed.state.global_step == step:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(killed, "_evaluate", stop_at_last)
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    again = trainer(tmp_path / "killed", **settings)
    assert again.restore_finished(tmp_path / "killed" / f"checkpoint-{step}")

    def timeless(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second", "step_time"))}
            for entry in entries
        ]

    repeated = [entry for entry in again.state.log_history if "eval_loss" in entry]
    assert timeless(repeated) == timeless(evaluations)
    assert again.state.best_global_step == whole.state.best_global_step
    assert again.state.best_metric == whole.state.best_metric
    assert again.state.log_history[-1]["train_runtime"] > 0, "the model card says how long it was trained"
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_critic_is_refused(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_steps=1)
    ppo.train()
    shutil.rmtree(tmp_path / "checkpoint-1" / "value_model")
    with pytest.raises(ValueError, match="value_model"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_checkpoint_without_the_optimizer_of_the_critic_is_refused_in_one_line(tmp_path: Path) -> None:
    """It would go on, but not exactly. A finished run needs no optimizer, and is restored."""
    ppo = trainer(tmp_path, max_steps=2)
    ppo.train()
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}" / "critic_optimizer.pt").unlink()
    with pytest.raises(UserError) as refused:
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    (line,) = map(str, refused.value.problems)
    assert line.startswith("resume_from_checkpoint: ") and "lacks critic_optimizer.pt" in line
    finished = trainer(tmp_path, max_steps=2)
    assert finished.restore_finished(tmp_path / "checkpoint-2")
    for a, b in zip(ppo.value_model.parameters(), finished.value_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_that_goes_on_to_more_steps_follows_their_schedule(tmp_path: Path) -> None:
    """Both networks do, from the first step on."""
    trainer(tmp_path, max_steps=4).train()
    resumed = trainer(tmp_path, max_steps=8)
    rates: list[float] = []
    resumed.create_optimizer()
    resumed.create_scheduler(8)
    resumed.critic.optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    optimizer = resumed.critic.optimizer
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates == pytest.approx([1e-3 * (8 - step) / 8 for step in range(2, 8)])


def test_a_rollout_that_does_not_fit_is_sampled_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint from the middle of a rollout, of a run with other batches. The scores so far are kept."""
    trainer(tmp_path, max_steps=3).train()
    checkpoint = tmp_path / "checkpoint-3"
    moments = read_state(checkpoint / "rollout_0.safetensors")["moments"]
    # Twice the rows and half the accumulation, as with twice the processes.
    resumed = trainer(tmp_path, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "sampled again" in caplog.text
    assert resumed._step == 4 and len(resumed._buffered_inputs) == 2
    assert resumed.score_moments.count == moments["count"] + 8
