"""`python -m pipeline plan`: what a run takes, against arithmetic by hand and against what trainers count."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.__main__ import main
from pipeline.runner.workload import START, TEXT_RATE
from tests.helpers.refusals import refused
from tests.helpers.small_model import ROOT, save_model, tokenizer


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """Return what `plan --json` prints; a plan always succeeds."""
    assert main(["plan", *argv, "--json"]) == 0
    planned: dict[str, Any] = json.loads(capsys.readouterr().out)
    return planned


POCKET = ("recipes/pocket", "--gpu", "h100", "--price", "2")


def test_a_plan_says_what_each_stage_takes(capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(capsys, *POCKET)
    assert list(planned["stages"]) == ["1_pretrain", "2_sft", "3_preferences", "3_reward", "3_ppo", "4_grpo"]
    pretrain = planned["stages"]["1_pretrain"]
    # Attention has biases, the MLP has none.
    layer = 4 * 128 * 128 + 4 * 128 + 3 * 128 * 384 + 2 * 128
    assert pretrain["parameters"] == 2560 * 128 + 4 * layer + 128
    assert pretrain["tokens"] == 1200 * 8 * 256
    assert pretrain["flops"] == pretrain["tokens"] * (6 * pretrain["parameters"] + 12 * 4 * 256 * 128 / 2)
    for stage in planned["stages"].values():
        parts = dict(stage["memory_bytes"])
        assert parts.pop("total") == pytest.approx(sum(parts.values()), abs=len(parts))
        assert stage["disk_bytes"] >= 0 and stage["cost"] == pytest.approx(2 * stage["hours"])
    assert planned["fits"] is True
    pairs = planned["stages"]["3_reward"]["tokens"] / planned["stages"]["3_preferences"]["tokens"]
    assert pairs == pytest.approx(2 * 9000 / (4 * 3400), rel=0.01), "pairs are as long as the answers that are compared"


def test_data_tokenizer_random_weights_and_evaluations_are_in_the_sum(capsys: pytest.CaptureFixture[str]) -> None:
    others = plan(capsys, *POCKET, "--max_train_samples", "1000")["others"]
    assert others["other steps"]["hours"] == pytest.approx((3 * START + (9e6 + 2 * 4e6) / TEXT_RATE) / 3600)
    # Four models that answer, and random weights, in 7 batches of 64 positions through 4 layers; and a reward model.
    started, sampled = 6 * START, 5 * 7 * 64 * 4 * 1e-3
    assert others["evaluations"]["hours"] == pytest.approx((started + sampled) / 3600, rel=0.01)
    assert others["evaluations"]["cost"] == pytest.approx(2 * others["evaluations"]["hours"])


def test_the_figures_of_135_million_parameters_are_those_of_a_pocket_calculator(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = plan(capsys, "recipes/small", "--gpu", "h100", "--price", "2")["stages"]["1_pretrain"]
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **shape)
    with torch.device("meta"):
        parameters = LlamaForCausalLM(config).num_parameters()
    assert stage["parameters"] == parameters == 134_515_008, "as many as SmolLM2-135M"
    assert stage["tokens"] == 5150 * 16 * 16 * 2048
    attention = 12 * 30 * 2048 * 576 / 2
    assert stage["flops"] == stage["tokens"] * (6 * parameters + attention)
    assert stage["hours"] == pytest.approx((START + stage["flops"] / (0.4 * 989e12)) / 3600)
    assert stage["cost"] == pytest.approx(2 * stage["hours"])
    memory = stage["memory_bytes"]
    assert memory["weights"] == (4 + 2) * parameters and memory["gradients"] == 4 * parameters
    assert memory["optimizer"] == 8 * parameters
    # Norms in float32, then their outputs, queries and output of attention, keys and values, feed-forward network.
    layer = 4 * 4 * 576 + 2 * (2 * 576 + 2 * 576 + 2 * 192 + 4 * 1536)
    assert memory["activations"] == 16 * 2048 * 30 * layer
    assert memory["logits"] == 16 * 2048 * 49152 * (2 * 2 + 3 * 4)
    # Two checkpoints are kept while a third is written, and the model.
    assert stage["disk_bytes"] == (3 * 12 + 4) * parameters


def test_options_override_the_files_of_all_stages_that_know_them(capsys: pytest.CaptureFixture[str]) -> None:
    before = plan(capsys, *POCKET)["stages"]
    after = plan(capsys, *POCKET, "--hidden_size", "256", "--max_steps=100")["stages"]
    assert after["4_grpo"]["parameters"] > 3 * before["4_grpo"]["parameters"], "it starts from what 1_pretrain makes"
    assert after["1_pretrain"]["tokens"] == 100 * 8 * 256
    assert after["2_sft"]["tokens"] < before["2_sft"]["tokens"]


def test_float32_takes_more_memory_than_mixed_precision(capsys: pytest.CaptureFixture[str]) -> None:
    mixed, full = (plan(capsys, *POCKET, *more)["stages"]["1_pretrain"] for more in ((), ("--bf16", "false")))
    assert 1.3 < full["memory_bytes"]["activations"] / mixed["memory_bytes"]["activations"] < 2
    assert full["memory_bytes"]["optimizer"] == mixed["memory_bytes"]["optimizer"]


def test_gpus_share_the_work_and_under_fsdp_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    one, eight = (plan(capsys, *POCKET, "--num_processes", n)["stages"]["1_pretrain"] for n in ("1", "8"))
    assert eight["tokens"] == 8 * one["tokens"] and eight["hours"] == pytest.approx(one["hours"])
    sharded = plan(capsys, *POCKET, "--config_file", "recipes/accelerate/fsdp2.yaml")["stages"]["1_pretrain"]
    assert sharded["memory_bytes"]["optimizer"] == pytest.approx(one["memory_bytes"]["optimizer"] / 8, abs=1)
    assert sharded["memory_bytes"]["activations"] == one["memory_bytes"]["activations"]


def test_a_launch_file_that_shards_is_refused_for_ppo_before_anything_runs(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    launch = ("--config_file", "recipes/accelerate/zero3.yaml", "--num_processes", "8")
    message = refused(capsys, "run", "recipes/base", "--output_dir", "runs/new", "--dry-run", *launch)
    assert "zero3.yaml: shards the model, which PPO refuses" in message
    assert main(["run", "recipes/base", "--output_dir", "runs/new", "--dry-run", "--until", "reward", *launch]) == 0
    assert not [warning.message for warning in recwarn if warning.category is FutureWarning], "of the libraries"
    capsys.readouterr()
    planned, without = (plan(capsys, *POCKET, *options)["stages"]["3_ppo"] for options in (launch, launch[2:]))
    assert planned["memory_bytes"] == without["memory_bytes"]
    assert "another launch file" in planned["advice"] and not without["advice"]


def test_what_does_not_fit_is_named_with_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    wide = ("--hidden_size", "4096", "--num_hidden_layers", "32", "--num_attention_heads", "32")
    large = plan(capsys, *POCKET, *wide, "--num_processes", "8")
    assert large["fits"] is False
    assert "recipes/accelerate/fsdp2.yaml" in large["stages"]["1_pretrain"]["advice"]
    assert "use_peft" in large["stages"]["3_ppo"]["advice"], "a critic cannot be sharded"
    more = ("--block_size", "512", "--per_device_train_batch_size")
    batch = plan(capsys, *POCKET, *more, "4096")["stages"]["1_pretrain"]
    assert not batch["fits"]
    rows = int(batch["advice"].partition("--per_device_train_batch_size ")[2].split()[0])
    assert plan(capsys, *POCKET, *more, str(rows))["stages"]["1_pretrain"]["fits"], "the advice holds"
    assert not plan(capsys, *POCKET, *more, str(2 * rows))["stages"]["1_pretrain"]["fits"], "and names the largest"


@pytest.mark.parametrize("recipe", ["pocket-dpo", "pocket-people", "pocket-reasoning", "small", "base"])
def test_other_recipes_are_planned_without_the_hub(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    planned = plan(capsys, f"recipes/{recipe}", "--gpu", "h100", "--num_processes", "8")
    assert planned["fits"] and {"1_pretrain", "2_sft", "4_grpo"} <= set(planned["stages"])
    sizes = {"small": 134.5e6, "base": 1107e6}
    # SmolLM2-135M has as many, and Llama-3.2-1B with a smaller vocabulary.
    if recipe in sizes:
        assert planned["stages"]["1_pretrain"]["parameters"] == pytest.approx(sizes[recipe], rel=0.001)


def test_dpo_reads_both_answers_of_a_pair_with_two_models(capsys: pytest.CaptureFixture[str]) -> None:
    stages = plan(capsys, "recipes/pocket-dpo", "--gpu", "h100")["stages"]
    reward = plan(capsys, *POCKET, "--gpu", "h100")["stages"]["3_reward"]
    dpo = stages["3_dpo"]
    assert dpo["tokens"] == reward["tokens"], "as many pairs"
    assert dpo["memory_bytes"]["frozen"] == dpo["memory_bytes"]["weights"] * 4 // 6, "the reference, in float32"
    assert dpo["flops"] > 4 / 3 * reward["flops"], "a forward pass more, and logits"


def test_a_critic_is_an_adapter_like_the_policy_unless_it_is_asked_for_in_full(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lora = (*POCKET, "--use_peft", "true", "--embedding_learning_rate", "null")
    both, whole = (plan(capsys, *lora, *more)["stages"]["3_ppo"] for more in ((), ("--value_use_peft", "false")))
    adapter = both["memory_bytes"]["gradients"] // 4 // 2
    assert 0 < adapter < both["parameters"] / 10
    assert whole["memory_bytes"]["gradients"] == 4 * (adapter + whole["parameters"])


@pytest.mark.parametrize("recipe", ["small", "base"])
def test_the_figures_in_a_readme_are_those_of_the_plan(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / f"recipes/{recipe}/README.md").read_text()
    command, _, rest = text.partition("`fourstage plan ")[2].partition("`")
    assert main(["plan", *command.split()]) == 0
    table = rest.partition("```text\n")[2].partition("```")[0]
    assert capsys.readouterr().out.partition("GB of one process")[0].rstrip() == table.rstrip()


def test_a_model_that_only_the_hub_has_is_refused_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "2_sft: model_name_or_path" in refused(capsys, "plan", "recipes/existing-model", "--gpu", "h100")


def test_texts_that_are_not_cut_are_planned_as_the_model_can_read_them(capsys: pytest.CaptureFixture[str]) -> None:
    uncut = plan(capsys, *POCKET, "--packing", "false", "--max_length", "null")["stages"]["2_sft"]
    assert uncut["tokens"] == 260 * 8 * 512 / 4


def test_half_the_utilisation_takes_twice_the_time(capsys: pytest.CaptureFixture[str]) -> None:
    half, whole = (plan(capsys, *POCKET, "--mfu", mfu)["stages"] for mfu in ("0.2", "0.4"))
    start = START / 3600
    assert half["1_pretrain"]["hours"] - start == pytest.approx(2 * (whole["1_pretrain"]["hours"] - start))
    assert half["4_grpo"]["sampling_hours"] == whole["4_grpo"]["sampling_hours"], "its kernels are launched one by one"


@pytest.mark.parametrize(
    ("argv", "tflops", "gigabytes"),
    [
        (("--gpu", "NVIDIA GeForce RTX 4090"), 165, 24),
        (("--gpu", "A100", "--gpu_memory", "40"), 312, 40),
        (("--gpu", "mi300x", "--gpu_memory", "192", "--tflops", "1307"), 1307, 192),
        (("--gpu_memory", "16", "--tflops", "10"), 10, 16),
    ],
)
def test_any_gpu_can_be_named(
    argv: tuple[str, ...], tflops: float, gigabytes: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "recipes/small", *argv, "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    stage = stages["1_pretrain"]
    assert stage["hours"] == pytest.approx((START + stage["flops"] / (0.4 * tflops * 1e12)) / 3600)
    assert [stage["fits"] for stage in stages.values()] == [
        stage["memory_bytes"]["total"] <= gigabytes * 1e9 for stage in stages.values()
    ]


def test_without_a_gpu_the_peak_of_this_machine_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.hardware.matmul_peak", lambda dtype: 1e12)
    monkeypatch.setattr("pipeline.hardware.accelerator", lambda: None)
    assert main(["plan", "recipes/pocket", "--num_processes", "2"]) == 0
    printed = capsys.readouterr()
    assert "2 x this machine: 0.5 TFLOP/s" in printed.out, "the processes share its cores"
    assert "40% of the peak" in printed.out and "sampling takes 1 ms" in printed.out
    assert re.search(r"^1_pretrain .* (\d+ min )?\d+(\.\d)? s +-$", printed.out, re.MULTILINE), (
        "a time as people read it"
    )
    assert printed.err.splitlines()[:2] == ["reading recipes/pocket ...", "planning 1_pretrain ..."]


def test_data_on_this_disk_are_counted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text((json.dumps({"text": "word" * 100}) + "\n") * 100)
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "0_tokenizer.yaml").write_text(f"dataset_name: {documents}\noutput_dir: runs/own/tokenizer\n")
    (recipe / "1_pretrain.yaml").write_text(
        f"dataset_name: {documents}\ntokenizer_name_or_path: runs/own/tokenizer\noutput_dir: runs/own/1_pretrain\n"
        "block_size: 50\nhidden_size: 32\nnum_attention_heads: 2\nnum_hidden_layers: 1\nnum_train_epochs: 2\n"
        "per_device_train_batch_size: 8\n"
    )
    stage = plan(capsys, str(recipe), "--gpu", "t4")["stages"]["1_pretrain"]
    # There are 100 documents of 100 tokens (of 4 characters each), of which 5 are held out.
    blocks = 95 * 100 / 50
    assert stage["tokens"] == math.ceil(blocks / 8) * 2 * 8 * 50


def test_the_chat_template_of_a_model_on_this_disk_is_part_of_every_prompt(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, recipe, tokens, lengths = tmp_path / "model", tmp_path / "recipe", [], []
    recipe.mkdir()
    (tmp_path / "problems.jsonl").write_text('{"prompt": "What?", "answer": "1"}\n' * 40)
    (recipe / "4_grpo.yaml").write_text(
        f"dataset_name: {tmp_path}/problems.jsonl\nmodel_name_or_path: {model}\noutput_dir: runs/own/4_grpo\n"
        "max_completion_length: 12\nmax_steps: 3\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 1\n"
        "reward_funcs: exact_answer\n"
    )
    save_model(model)
    for system in ("", "A token is a piece of text. "):
        own = tokenizer()
        own.chat_template = system + own.chat_template
        own.save_pretrained(model)
        tokens.append(plan(capsys, str(recipe), "--gpu", "t4")["stages"]["4_grpo"]["tokens"])
        empty = [{"role": "user", "content": ""}]
        lengths.append(len(own.apply_chat_template(empty, add_generation_prompt=True, return_dict=False)))
    assert lengths[0] < lengths[1] and tokens[1] - tokens[0] == 3 * 8 * (lengths[1] - lengths[0])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--gpu", "h1000"), "--gpu"),
        (("--gpu", "mi300x", "--tflops", "1307"), "--gpu_memory"),
        (("--gpu", "h100", "--gpu_memory", "-1"), "--gpu_memory"),
        (("--gpu", "h100", "--mfu", "40"), "--mfu"),
        (("--gpu", "h100", "--hiden_size", "256"), "hidden_size"),
        (("--gpu", "h100", "--hidden_size", "wide"), "hidden_size"),
        (("--gpu", "h100", "stray"), "stray"),
        (("--gpu", "h100", "--num_attention_heads", "3"), "1_pretrain: hidden_size"),
    ],
)
def test_a_mistake_is_named(argv: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "plan", "recipes/pocket", *argv).splitlines()
    lines = [line for line in lines if not line.endswith(" ...")]
    assert len(lines) <= 2 and named in lines[0]


def test_other_commands_still_refuse_what_they_do_not_know() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", "recipes/pocket", "--hidden_size", "256"])
    assert ended.value.code == 2


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan where no run has written anything: data on the disk would be measured."""
    monkeypatch.chdir(tmp_path)
