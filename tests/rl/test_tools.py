"""Dialogues with tools in GRPO and PPO: what is trained on, and what a resumed run goes on with."""

import shutil
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.chat_template_utils import parse_response

from pipeline.errors import UserError
from pipeline.rl.grpo import GRPOTrainer
from pipeline.rl.ppo import PPOTrainer
from pipeline.rl.ppo_config import PPOConfig
from pipeline.tools import dialogue
from pipeline.training.inputs import _fit_rows
from tests.helpers import tool_toy as toy
from tests.helpers.sampling_recipes import run as run_module

KINDS = [GRPOTrainer, PPOTrainer]
CALLED: list[dict[str, Any]] = [{"tools": [toy.double]}, {"environment_factory": toy.Counter}]


def trainer(
    path: Path, kind: type, called: dict[str, Any] = CALLED[0], rewards: Any = toy.says_yes, **changes: Any
) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8, "steps_per_generation": 2, "num_iterations": 2, "max_completion_length": 24,
        "max_steps": 5, "learning_rate": 1e-2, "bf16": False, "use_cpu": True, "report_to": "none",
        "logging_steps": 1, "save_steps": 1, "eval_strategy": "no", "disable_tqdm": True,
        "activation_checkpointing": False, **changes,
    }  # fmt: skip
    if kind is GRPOTrainer:
        settings |= {"num_generations": 4}
        del settings["activation_checkpointing"]
    return kind(
        model=toy.policy(),
        reward_funcs=[rewards],
        args=(GRPOConfig if kind is GRPOTrainer else PPOConfig)(output_dir=str(path), **settings),
        train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(),
        **called,
    )


def rollout(run: Any) -> dict[str, Any]:
    """Return the batch of a rollout, the same each time."""
    run.model.train()
    rows = run.train_dataset.select(range(8))
    torch.manual_seed(1)
    batch: dict[str, Any] = run._generate_and_score_completions([dict(row) for row in rows for _ in range(4)])
    return batch


@pytest.mark.parametrize("called", CALLED, ids=["tools", "environment"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_tool_wrote_is_not_trained_on(tmp_path: Path, kind: type, called: dict[str, Any]) -> None:
    run = trainer(tmp_path, kind, called)
    batch = rollout(run)
    results = 0
    for ids, exists, sampled in zip(batch["completion_ids"], batch["completion_mask"], batch["tool_mask"], strict=True):
        length = int(exists.sum())
        assert length <= run.max_completion_length
        words = run._tokenizer.convert_ids_to_tokens(ids[:length])
        # A result goes from its role to the role of the next turn; both belong to the chat template.
        expected, of_tool = [], False
        for word in words:
            of_tool = of_tool or word == "<|tool|>"
            expected.append(int(not of_tool))
            results += word == "<|tool|>"
            of_tool = of_tool and word != "<|assistant|>"
        assert sampled[:length].tolist() == expected
    assert results > 10


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_values_at_the_tokens_of_a_tool_change_nothing(
    tmp_path: Path, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Advantages, returns, the loss and its gradients stay the same if noise changes both at those tokens."""
    is_sampled = rollout(trainer(tmp_path, kind))["tool_mask"].bool()

    def outcome(noise: torch.Tensor) -> list[torch.Tensor]:
        run = trainer(tmp_path, kind)
        logps_of = run._get_per_token_logps_and_entropies

        def shifted(*args: Any, **kwargs: Any) -> Any:
            logps, *others = logps_of(*args, **kwargs)
            # A sum would cancel out of the ratio to the policy that sampled. A product changes its gradient.
            return logps * (1 + noise), *others

        monkeypatch.setattr(run, "_get_per_token_logps_and_entropies", shifted)
        if kind is PPOTrainer:
            values_of = run._values
            monkeypatch.setattr(run, "_values", lambda *args, **kwargs: values_of(*args, **kwargs) + noise)
        batch = rollout(run)
        if kind is PPOTrainer:
            # What they are at the tokens of a tool has no effect.
            learned_from = [batch["advantages"] * is_sampled, batch["returns"] * is_sampled]
        else:
            # GRPO has one advantage for each completion.
            learned_from = [batch["advantages"]]
        run.current_gradient_accumulation_steps = 1
        run._step = 1
        loss = run.compute_loss(run.model, batch)
        loss.backward()
        gradients = [weight.grad for weight in run.model.parameters() if weight.grad is not None]
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients)
        return [*learned_from, loss.detach(), *gradients]

    expected = outcome(torch.zeros(is_sampled.shape))
    noise = 5 * torch.randn(is_sampled.shape, generator=torch.Generator().manual_seed(3)) * ~is_sampled
    for with_noise, without in zip(outcome(noise), expected, strict=True):
        torch.testing.assert_close(with_noise, without, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("called", CALLED, ids=["tools", "environment"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_exactly_inside_a_rollout_of_dialogues(
    tmp_path: Path, kind: type, called: dict[str, Any]
) -> None:
    whole = trainer(tmp_path / "whole", kind, called)
    whole.train()
    assert any(entry.get("tools/call_frequency", 0) > 0.3 for entry in whole.state.log_history)
    for step in (1, 3, 4):
        folder = tmp_path / f"resumed-{step}" / f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder)
        resumed = trainer(tmp_path / f"resumed-{step}", kind, called)
        resumed.train(resume_from_checkpoint=str(folder))
        for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, other)


def test_the_loop_is_trls_but_for_calls_that_were_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, random = trainer(tmp_path, GRPOTrainer), Random(0)
    encode = partial(run._tokenizer.encode, add_special_tokens=False)
    two = "<|call|>double<|argument|>n=2<|call|>double<|argument|>n=1<|end|>"
    said = ["<|call|>double<|argument|>n=2<|end|>", two, "<|call|>nothing<|end|>", "yes<|end|>", "<|end|>"]
    turns, prompt = list(map(encode, said)), encode("<|bos|><|user|>1<|end|><|assistant|>")
    monkeypatch.setattr(run, "_async_tool_dicts", [{}] * 4, raising=False)
    monkeypatch.setattr(run, "_sync_tool_dicts", [{"double": toy.double}] * 4, raising=False)
    for trial in range(60):
        run.max_completion_length, run.max_tool_calling_iterations = random.choice([10, 20, 60]), random.choice([1, 9])
        found = []
        for kind in (GRPOTrainer, TRLGRPOTrainer):
            draw = Random(trial)

            def single(texts: list[Any], *_: Any, draw: Random = draw, **__: Any) -> Any:
                sampled = [draw.choice(turns)[: run.max_completion_length] for _ in texts]
                return sampled, [[-float(place) for place in range(len(ids))] for ids in sampled]

            monkeypatch.setattr(run, "_generate_single_turn", single)
            ids, logps = single([prompt] * 4)
            parsed = [[parse_response(run._tokenizer, one, prefix=prompt, tools=run.tools)] for one in ids]
            prompts = [[{"role": "user", "content": "1"}] for _ in ids]
            found.append(kind._tool_call_loop(run, prompts, [prompt] * 4, ids, parsed, logps, None, {}))
        own, trls = found
        assert own[:4] == trls[:4]
        assert own[4] == trls[4] or not all(one[-1] == run._tokenizer.eos_token_id for one in own[2])


async def later(n: int) -> int:
    """Triple a number.

    Args:
        n: The number.
    """
    return 3 * int(n)


@pytest.mark.parametrize("tools", [[], [later]], ids=["our loop", "TRL's"])
def test_a_tool_that_hangs_does_not_stop_training(tmp_path: Path, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(n: int) -> int:
        """Double a number.

        Args:
            n: The number.
        """
        while int(n) == 2:
            pass
        return 2 * int(n)

    monkeypatch.setattr(dialogue, "CALL_SECONDS", 0.05)
    run = trainer(tmp_path, GRPOTrainer, {"tools": [double, *tools]}, max_steps=1, save_strategy="no")
    run.train()
    (failed,) = [
        entry["tools/failure_frequency"] for entry in run.state.log_history if "tools/failure_frequency" in entry
    ]
    assert failed > 0.3


@pytest.mark.parametrize("how", ["sharded", "asked"])
def test_processes_that_sample_together_take_equally_many_turns(tmp_path: Path, how: str) -> None:
    done = run_module("tests.helpers.turns_together", str(tmp_path), how, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("kind", KINDS)
def test_an_environment_gives_the_only_rewards(tmp_path: Path, kind: type) -> None:
    config: Any = GRPOConfig if kind is GRPOTrainer else PPOConfig
    groups = {"num_generations": 4} if kind is GRPOTrainer else {}
    run: Any = kind(
        model=toy.policy(),
        args=config(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_completion_length=24, **groups
        ),
        train_dataset=toy.prompts(),
        processing_class=toy.tokenizer(),
        environment_factory=toy.Counter,
    )
    assert run.reward_func_names == ["Counter"]
    rollout(run)
    given = set(run.all_rewards[:, 0].tolist())
    assert run.reward_funcs[0](environments=run.environments) == run.all_rewards[:, 0].tolist()
    assert len(given) > 1 and given <= {float(asked) for asked in range(8)}


def test_later_turns_stay_within_learned_positions(tmp_path: Path) -> None:
    run = trainer(tmp_path, GRPOTrainer)
    sizes = {"n_positions": 28, "n_embd": 32, "n_layer": 1, "n_head": 1, "eos_token_id": 2, "pad_token_id": 0}
    run.model = GPT2LMHeadModel(GPT2Config(vocab_size=len(toy.VOCABULARY), **sizes))
    run.accelerator.unwrap_model = lambda model, **_: model
    prompt = run._tokenizer.encode("<|bos|><|user|>1<|end|>", add_special_tokens=False)
    text = prompt + run._tokenizer.encode("<|call|>double<|argument|>n=2<|end|>", add_special_tokens=False)
    sampled, _ = run._sample_turn([text] * 8, 28 - len(text))
    assert max(map(len, sampled)) == 28 - len(text)
    assert run.generation_config.max_new_tokens == 24


def test_no_result_makes_a_text_longer_than_vllm_has_memory_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[int] = []
    monkeypatch.setattr("pipeline.rl.grpo.converse", lambda *_, context, **__: contexts.append(context))
    run = trainer(tmp_path, GRPOTrainer)
    run._sync_tool_dicts = []
    run._tool_call_loop([], [], [], [], None, None, None)
    config = SimpleNamespace(max_model_len=32)
    run.use_vllm, run.vllm_mode = True, "colocate"
    run.vllm_generation = SimpleNamespace(llm=SimpleNamespace(llm_engine=SimpleNamespace(model_config=config)))
    run._tool_call_loop([], [], [], [], None, None, None)
    assert contexts == [64, 32]


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_learns_to_call_where_calls_are_rewarded(tmp_path: Path, kind: type) -> None:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 16, "steps_per_generation": 1, "num_iterations": 1, "max_steps": 30,
        "learning_rate": 5e-3, "lr_scheduler_type": "constant", "save_steps": 30,
    }  # fmt: skip
    run = trainer(tmp_path, kind, rewards=toy.results, **settings)
    run.train()
    log = [entry["rewards/results/mean"] for entry in run.state.log_history if "rewards/results/mean" in entry]
    assert sum(log[-5:]) / 5 > sum(log[:5]) / 5 + 0.3


class Board(toy.Counter):
    """An environment that shows a whole board."""

    def reset(self, most: int = 2, **_: Any) -> str:
        return super().reset(most) * 30


class Broken(toy.Counter):
    """An environment that cannot begin."""

    def reset(self, most: int = 2, **_: Any) -> str:
        raise ValueError("no server")


def test_what_an_environment_shows_takes_room_from_the_context() -> None:
    tokenizer, config = toy.tokenizer(), GPT2Config(n_positions=48)
    args = SimpleNamespace(chat_template_kwargs=None, max_completion_length=24)
    source, where = (toy.prompts(), None), ("model_name_or_path", "m")
    kept, _ = _fit_rows("prompt", source, tokenizer, args, config, where, None)
    assert len(kept) == len(source[0])
    with pytest.raises(UserError, match="max_completion_length: 24: every prompt takes more than the"):
        own = SimpleNamespace(tools=None, environment=f"{__name__}:Board")
        _fit_rows("prompt", source, tokenizer, args, config, where, own)
    with pytest.raises(UserError, match=r"environment: .*Broken: raised ValueError: no server \(.*test_tools.py:\d+\)"):
        own.environment = f"{__name__}:Broken"
        _fit_rows("prompt", source, tokenizer, args, config, where, own)
