"""A step that is started by hand before those that it needs names the command to run first."""

from functools import partial
from pathlib import Path

import pytest

from pipeline.config.recipe_folder import SHIPPED
from pipeline.config.untrusted import check_untrusted
from pipeline.training.entry import run
from recipes import grpo, sft
from tests.helpers.refusals import refused


def test_one_line_names_the_command_to_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "does not exist yet; first run `fourstage run recipes/pocket --until"
    # The file comes with the package, not from the current directory.
    config = ("--config", "recipes/pocket/2_sft.yaml")
    assert (
        refused(capsys, *config, main=partial(run, sft.main))
        == f"model_name_or_path: runs/pocket/1_pretrain: {command} 1_pretrain`\n"
    )
    Path("runs/pocket/1_pretrain").mkdir(parents=True)
    assert (
        refused(capsys, *config, main=partial(run, sft.main)) == f"dataset_name: runs/pocket/data: {command} 0_data`\n"
    )
    config = ("--config", "recipes/pocket/4_grpo.yaml")
    assert (
        refused(capsys, *config, main=partial(run, grpo.main))
        == f"model_name_or_path: runs/pocket/3_ppo: {command} 3_ppo`\n"
    )
    assert sorted(path.name for path in Path("runs/pocket").iterdir()) == ["1_pretrain"]


def test_a_path_that_no_step_writes_is_a_mistake_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/pocket/data").mkdir(parents=True)
    options = ["--config", "recipes/pocket/2_sft.yaml", "--model_name_or_path", "./elsewhere"]
    error = refused(capsys, *options, main=partial(run, sft.main))
    assert "first run" not in error and "elsewhere" in error


@pytest.mark.parametrize(
    "recipe", ["base", "existing-model", "pocket-dpo", "pocket-llama4", "pocket-people", "pocket-reasoning"]
)
def test_a_recipe_of_the_hub_may_say_what_shipped_ones_do(recipe: str) -> None:
    assert check_untrusted(SHIPPED / recipe) == []


REFUSED = """
output_dir: ../elsewhere/2_sft
output_dir: /srv/elsewhere/2_sft
output_dir: .git/2_sft
output_dir: runs/r/../../2_sft
output_dir: ~/2_sft
output_dir: 2_sft
model_name_or_path: ./private
model_name_or_path: runs/other/2_sft
model_name_or_path: gpt2
tokenizer_name_or_path: /srv/tokenizer
dataset_name: /etc/passwd
dataset_name: notes.txt
dataset_name: text
dataset_name: [alice/data, ~/notes.txt]
dataset_name: private/data
dataset_name: private/data@main
dataset_name: "hf://datasets/alice/data"
dataset_config: ../../private
reward_funcs: [exact_answer, "subprocess:run"]
reward_funcs: module.of.its:own
lm_eval_tasks: [piqa, ./task.yaml]
lm_eval_tasks: task.yaml
judge: "os:system"
judge: private
problems: {dataset_name: /etc/passwd}
problems: {dataset_name: alice/data, grade: "os:system"}
pairs: secrets.jsonl
chat_template_path: notes.txt
resume_from_checkpoint: private
deepspeed: ds.json
fsdp_config: fsdp.json
fsdp_config: {transformer_layer_cls_to_wrap: x}
accelerator_config: a.json
generation_kwargs: {custom_generate: alice/code}
generation_kwargs: {trust_remote_code: true}
tasks: {spell_backward: {data_file: ../../../etc/passwd}}
attn_implementation: alice/kernel
report_to: wandb
report_to: [tensorboard, all]
vllm_mode: server
vllm_server_base_url: http://elsewhere
vllm_server_host: elsewhere
trackio_space_id: alice/space
log_completions_hub_repo: alice/rows
push_to_hub: true
hub_model_id: alice/theirs
hub_private_repo: false
hub_token: hf_abcdefgh
trust_remote_code: true
allow_unconfined_code: true
env: {HF_ENDPOINT: "http://elsewhere"}
keep_rows: [runs/r/a, --push_to_hub]
unheard_of: some/file
dataset_name: 2024
dataset_name: [1]
model_name_or_path: 2024
text: {dataset_name: 2024}
output_dir: 2024
chat_template_path: 2024
fsdp_config: 2024
""".strip().splitlines()


def test_whatever_else_a_recipe_of_the_hub_says_is_refused_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("private/data").mkdir(parents=True)
    Path("recipe").mkdir()
    for number, line in enumerate(REFUSED):
        Path(f"recipe/{number}_sft.yaml").write_text(f"{line}\n")
    problems = check_untrusted(Path("recipe"))
    found = {int(problem.field.split("_")[0]): str(problem) for problem in problems}
    expected = [line for number, line in enumerate(REFUSED) if number not in found]
    # A switch that is off does nothing.
    assert expected == ["hub_private_repo: false"]
    assert all(line.endswith("download the folder, read it, and run your copy") for line in found.values())


def test_fields_without_a_path_of_this_machine_are_free(tmp_path: Path) -> None:
    text = """
        output_dir: runs/r/4_grpo/
        model_name_or_path: runs/r/2_sft
        dataset_name: [alice/data@refs/pr/1, ./runs/r/data]
        system_prompt: "Use /tmp: it is ~ empty. ../x"
        answer_pattern: '/.*:(\\d+)'
        lora_target_modules: '.*\\.q_proj'
        lr_scheduler_kwargs: {decay_type: linear, num_decay_steps: 3}
        generation_kwargs: {top_h: 0.5}
        chat_template_kwargs: {enable_thinking: false, style: short}
        tasks: {chain_sum: {operators: [+, "-", /]}}
        reward_funcs: [exact_answer]
        report_to: tensorboard
        push_to_hub: false
        hub_token: null
    """
    (tmp_path / "4_grpo.yaml").write_text(text)
    (tmp_path / "accelerate_config.yaml").write_text("num_machines: 2")
    assert check_untrusted(tmp_path) == []
