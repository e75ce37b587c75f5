"""A Llama 4 from scratch: its sizes, what a token costs, balanced experts, and what transformers lacks for it."""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    GenerationConfig,
    Llama4ForCausalLM,
    TrainingArguments,
    default_data_collator,
)
from trl import ModelConfig

from pipeline.errors import UserError
from pipeline.models.experts import (
    RouteCounter,
    active_parameters,
    balancing_loss,
    least_fair_share,
    routers,
    training_flops_per_token,
)
from pipeline.models.kernels.sampler import sample
from pipeline.models.loading import without_adapters
from pipeline.models.scratch import ScratchArguments, build_model, log_model
from pipeline.rl.value_model import value_model_from
from pipeline.training.checks import check_lora
from pipeline.training.optimizer import OptimizerArguments, build_optimizer
from pipeline.training.pretraining import PretrainTrainer
from tests.helpers.forked import RANKS, run_forked
from tests.helpers.small_model import ROOT, equal, recipe_command, run_recipe, tokenizer, weights

SIZES: dict[str, Any] = {
    "model_type": "llama4_text",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}


def model(**sizes: Any) -> Llama4ForCausalLM:
    return build_model(ScratchArguments(**{**SIZES, "initializer_range": 0.1, **sizes}), tokenizer(), 0).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, len(tokenizer()), shape, generator=torch.Generator().manual_seed(seed))


def test_fields_of_the_other_kind_of_model_and_experts_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UserError) as error:
        ScratchArguments(num_local_experts=4, hidden_size=30, num_attention_heads=4)
    assert "num_local_experts: 4: needs model_type: llama4_text" in str(error.value)
    assert "hidden_size: 30" in str(error.value)
    for wrong in ({"num_experts_per_tok": 5}, {"interleave_moe_layer_step": 3}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ScratchArguments(**{**SIZES, **wrong})


def test_a_token_costs_what_the_dense_model_of_the_same_width_costs_and_the_router(
    caplog: pytest.LogCaptureFixture,
) -> None:
    mixed = model(num_local_experts=8)
    dense = build_model(ScratchArguments(**{**SIZES, "model_type": "llama", "intermediate_size": 96}), tokenizer(), 0)
    gates = sum(router.weight.numel() for router in routers(mixed))
    assert active_parameters(mixed) == dense.num_parameters() + gates
    assert mixed.num_parameters() > active_parameters(mixed) and active_parameters(dense) == dense.num_parameters()
    assert training_flops_per_token(mixed, 64) == training_flops_per_token(dense, 64) + 6 * gates
    assert training_flops_per_token(model(attention_chunk_size=16), 64) < training_flops_per_token(model(), 64)
    caplog.set_level("INFO")
    log_model(mixed)
    assert f"{active_parameters(mixed) / 1e6:.2f}M of them active for a token" in caplog.text


def test_experts_and_layers_are_where_the_fields_say() -> None:
    built = model(num_hidden_layers=4, interleave_moe_layer_step=2, no_rope_layer_interval=2, use_qk_norm=False)
    assert [layer.is_moe_layer for layer in built.model.layers] == [False, True, False, True]
    assert built.config.no_rope_layers == [1, 0, 1, 0] and len(routers(built)) == 2
    assert not built.config.output_router_logits and built.config.router_aux_loss_coef == 0
    assert model(num_local_experts=6).config.num_local_experts == 6


@pytest.mark.parametrize("chunk", [None, 8])
def test_cached_padded_and_packed_text_is_computed_like_text_alone(chunk: int | None) -> None:
    built = model(attention_chunk_size=chunk, num_hidden_layers=4)
    # The shorter prompt is padded on the left.
    prompts = [tokens(5, seed=1).tolist(), tokens(13, seed=2).tolist()]
    written = sample(built, prompts, GenerationConfig(max_new_tokens=12))
    for prompt, completion in zip(prompts, written, strict=True):
        logits = built(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0]
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == completion
    ids, positions = torch.tensor([prompts[0] + prompts[1]]), torch.tensor([[*range(5), *range(13)]])
    packed = built(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    alone = torch.cat([built(input_ids=torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts])
    assert torch.allclose(packed, alone, atol=1e-4)


# ---- Routers


def test_counts_are_those_of_the_routers_without_padding() -> None:
    built, ids = model(), tokens(2, 20)
    with RouteCounter(built) as counter:
        output = built(input_ids=ids, output_router_logits=True)
    counts = torch.stack([logits.argmax(-1).bincount(minlength=4) for logits in output.router_logits])
    assert torch.equal(counter.counts, counts.double())
    padded = torch.cat([ids, torch.full((2, 7), tokenizer().pad_token_id)], 1)
    with RouteCounter(built) as again:
        built(input_ids=padded)
    assert torch.equal(again.counts, counter.counts)
    with RouteCounter(built, training=True) as none:
        built(input_ids=ids)
    assert none.shares == []
    assert least_fair_share([[1.9, 0.6, 0.8, 0.7]]) == 1.9
    assert least_fair_share([[1.9, 0.4], [1.0, 0.7]]) == 0.4
    assert least_fair_share([[0.0, 2.0]]) == 0


def test_counting_does_not_wait_for_the_device() -> None:
    built, ids = model().to("meta"), tokens(2, 20).to("meta")
    # Without these, transformers would read the mask to build them.
    masks = {"full_attention": None, "chunked_attention": None}
    with RouteCounter(built) as counter:
        # On "meta", a copy to the CPU raises an error, and so does the number of tokens that are not padding.
        built.model(input_ids=ids, attention_mask=masks, position_ids=torch.arange(20, device="meta")[None])
    assert counter.counts is not None and counter.counts.is_meta


def test_skewed_layers_do_not_cancel_out_and_balanced_ones_cost_1() -> None:
    gate = routers(model(num_local_experts=2))[0]
    skewed = torch.tensor([[9.0, 0.0]] * 8)
    for logits in (skewed, skewed.flip(1)):
        assert balancing_loss(gate, logits, rows=2).item() == pytest.approx(2, abs=0.01)
    even = torch.cat([skewed[:4], skewed[:4].flip(1)])
    assert balancing_loss(gate, even, rows=1).item() == pytest.approx(1, abs=0.01)
    assert balancing_loss(gate, even, rows=2).item() == pytest.approx(2, abs=0.01), "each row is of one expert"


def trainer(trained: Llama4ForCausalLM, folder: Path, balance: float, **options: Any) -> PretrainTrainer:
    rows = tokens(64, 32, seed=3)
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **{"max_steps": 1, **options},
    )
    return PretrainTrainer(
        trained, args, train_dataset=data, data_collator=default_data_collator, router_losses=(balance, balance)
    )


def skewed_model() -> Llama4ForCausalLM:
    """A model whose routers prefer one expert for any token: embeddings and a row of the routers share a direction."""
    built = model()
    with torch.no_grad():
        built.model.embed_tokens.weight[:, 0] = 1.0
        for gate in routers(built):
            gate.weight[0, 0] = 0.5
    return built


@pytest.mark.parametrize("balance", [0.0, 0.05])
def test_the_loss_balances_routers_that_otherwise_collapse(tmp_path: Path, balance: float) -> None:
    built = skewed_model()
    trainer(built, tmp_path, balance, max_steps=40, learning_rate=1e-2).train()
    with RouteCounter(built.eval()) as counter:
        built(input_ids=tokens(16, 32, seed=3))
    # The spread is 0.4 to 0.7 with the loss, and 1.7 if one of four experts gets all tokens.
    spread = max(map(statistics.pstdev, counter.shares))
    assert (spread < 1) == (balance > 0), counter.shares


def test_the_losses_count_once_whatever_is_computed_again_and_not_in_an_evaluation(tmp_path: Path) -> None:
    records = []
    for options in ({}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}):
        built = model()
        # Two equal halves, so that the mean over two micro-batches is that of one.
        trained = trainer(built, tmp_path, 0.5, learning_rate=0.0, **options)
        trained.train_dataset = [trained.train_dataset[0]] * 8
        trained.train()
        record = next(entry for entry in trained.state.log_history if "grad_norm" in entry)
        records.append((record["loss"], record["grad_norm"]))
    assert records[1] == pytest.approx(records[0], rel=1e-4) and records[2] == pytest.approx(records[0], rel=1e-4)
    plain = trainer(model(), tmp_path, 0.0)
    measured = [each.evaluate(plain.train_dataset)["eval_loss"] for each in (trained, plain)]
    assert measured[0] == pytest.approx(measured[1])


@pytest.mark.usefixtures("torchs_muon")
def test_muon_updates_each_expert_like_a_linear_layer_of_its_own() -> None:
    built, ids = model(), tokens(4, 32)
    args = TrainingArguments("unused", use_cpu=True, learning_rate=0.0, weight_decay=0.1)
    optimizer = build_optimizer(built, args, OptimizerArguments(use_muon=True, muon_learning_rate=0.03))
    built(input_ids=ids, labels=ids).loss.backward()
    alone = {}
    for name, value in built.named_parameters():
        if ".experts." in name:
            alone[name] = [torch.nn.Parameter(expert.detach().mT.clone()) for expert in value]
            for expert, gradient in zip(alone[name], value.grad, strict=True):
                expert.grad = gradient.mT.clone()
            torch.optim.Muon(alone[name], lr=0.03, weight_decay=0.1).step()
    optimizer.step()
    for name, experts in alone.items():
        updated = built.get_parameter(name)
        assert max((updated[i].mT - expert).abs().max().item() for i, expert in enumerate(experts)) < 0.001


# ---- Reward model, critic and LoRA


def test_reward_model_and_critic_load_where_only_the_models_of_the_project_are_imported(tmp_path: Path) -> None:
    policy, ids = model(), tokens(2, 9)
    policy.save_pretrained(tmp_path / "policy")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "policy", num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    critic = value_model_from(reward).eval()
    critic.save_pretrained(tmp_path / "critic")
    assert torch.equal(reward.model.layers[0].feed_forward.router.weight, routers(policy)[0].weight)
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "ids = torch.tensor(eval(sys.argv[2]))\n"
        "policy = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/policy')(input_ids=ids).logits.sum().item()\n"
        "assert 'pipeline.models' not in sys.modules\n"
        "import pipeline.models\n"
        "from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification\n"
        "reward = AutoModelForSequenceClassification.from_pretrained(sys.argv[1] + '/reward')(input_ids=ids).logits\n"
        "critic = AutoModelForTokenClassification.from_pretrained(sys.argv[1] + '/critic')(input_ids=ids).logits\n"
        "print([policy, reward.sum().item(), critic.sum().item()])"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(ids.tolist())]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    mine = [loaded.eval()(input_ids=ids).logits.sum().item() for loaded in (policy, reward, critic)]
    assert json.loads(process.stdout.splitlines()[-1]) == pytest.approx(mine, rel=1e-3, abs=1e-3)
    assert torch.allclose(critic(input_ids=ids).logits[:, -1], reward.eval()(input_ids=ids).logits, atol=1e-5)


EXPERTS = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]


def test_lora_adapts_experts_where_it_is_told_to() -> None:
    built = model()
    names = ModelConfig(use_peft=True, lora_target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    with_experts = dataclasses.replace(names, lora_target_parameters=EXPERTS)
    assert check_lora(with_experts, model()) == []
    (problem,) = check_lora(ModelConfig(use_peft=True, lora_target_modules=["all-linear"]), model())
    assert "routers" in str(problem)
    adapted = get_peft_model(built, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    ids = tokens(1, 12)
    merged = without_adapters(adapted)
    assert torch.allclose(merged(input_ids=ids).logits, adapted(input_ids=ids).logits, atol=1e-3)
    assert not torch.allclose(merged(input_ids=ids).logits, model()(input_ids=ids).logits, atol=1e-1)


# ---- Launched


MIXED = (
    "--model_type", "llama4_text", "--use_muon", "--muon_learning_rate", "1e-3", "--intermediate_size", "32",
    "--num_local_experts", "2", "--bf16", "false", "--torch_compile", "false",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The inputs, and an undisturbed run."""
    inputs = tmp_path_factory.mktemp("inputs")
    result = run_recipe("pretrain", inputs, *MIXED, "--output_dir", str(inputs / "whole"))
    assert result.returncode == 0, result.stderr
    assert "active for a token" in result.stderr
    yield inputs, inputs / "whole"


def test_the_load_is_logged_and_a_resumed_run_ends_with_the_same_weights(whole: tuple[Path, Path]) -> None:
    inputs, output = whole
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    logged = [record for record in history if "loss" in record]
    assert logged and all(
        sum(record[f"router/layer_{layer}/expert_{expert}"] for expert in range(2)) == pytest.approx(2, abs=0.01)
        and 0 <= record[f"router/layer_{layer}/entropy"] <= 0.7
        for record in logged
        for layer in range(2)
    )
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForCausalLM"] and not config["output_router_logits"]
    parts = inputs / "parts"
    shutil.copytree(output, parts)
    for name in ("model.safetensors", "config.json", "trainer_state.json"):
        (parts / name).unlink()
    shutil.rmtree(parts / "checkpoint-8")
    again = run_recipe("pretrain", inputs, *MIXED, "--output_dir", str(parts))
    assert again.returncode == 0 and "resuming" in again.stderr, again.stderr
    assert equal(weights(parts), weights(output))


def test_two_processes_learn_what_one_learns(whole: tuple[Path, Path]) -> None:
    inputs, output = whole
    more = (*MIXED, "--output_dir", str(inputs / "two"), "--per_device_train_batch_size", "2")
    result = run_forked([sys.executable, *RANKS, "2", *recipe_command("pretrain", inputs, *more)])
    assert result.returncode == 0, result.stderr
    first, second = weights(output), weights(inputs / "two")
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-3
