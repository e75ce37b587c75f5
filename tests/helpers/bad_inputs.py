"""Inputs that are refused, for `test_bad_input`: the arguments of each case and what its message must contain."""

import json
from dataclasses import dataclass, field
from typing import Any

from tests.helpers.small_model import conversation


@dataclass
class Case:
    """What is given in addition to valid arguments, and what the message must contain.

    Args:
        recipe: Which recipe.
        argv: Command line; `{inputs}` and `{here}` are replaced.
        said: Words of one line, the field first.
        yaml: Content of a `--config` file.
        files: Files made in `{here}`, by name.
        lines: How many problems there are.
    """

    recipe: str
    argv: str
    said: tuple[str, ...]
    yaml: str | bytes | None = None
    files: dict[str, Any] = field(default_factory=dict)
    lines: int = 1


def rows(*contents: Any) -> str:
    return "".join(json.dumps(content) + "\n" for content in contents)


GOOD = {"messages": conversation("What?", "That.")}

CASES = {
    # the configuration
    "unknown YAML key": Case("sft", "", ("learning_rat:", "did you mean `learning_rate`"), "learning_rat: 1"),
    "an environment that cannot be set": Case("sft", "", ("env: 'A=B'", "cannot be set"), 'env: {"A=B": 1}'),
    "unknown option": Case("sft", "--max_lenght 9", ("max_lenght:", "did you mean `max_length`")),
    "abbreviated option": Case("sft", "--learning 1", ("learning:", "unknown")),
    "stray word": Case("sft", "hello", ("command line: hello",)),
    "text for a number": Case("sft", "", ("max_steps: 'ten'", "a whole number"), "max_steps: ten"),
    "fraction for a whole number": Case("sft", "", ("max_steps: 1.5", "a whole number"), "max_steps: 1.5"),
    "number for a switch": Case("sft", "", ("packing: 3", "true or false"), "packing: 3"),
    "list for a number": Case("sft", "", ("learning_rate: [1, 2]", "a number"), "learning_rate: [1, 2]"),
    "nothing for a number": Case("sft", "", ("learning_rate: None", "a number"), "learning_rate:"),
    "text for a number, as an option": Case("sft", "--max_steps ten", ("max_steps: 'ten'", "a whole number")),
    "one of another set": Case("sft", "--eval_strategy often", ("eval_strategy: 'often'", "steps")),
    "evaluation gathered never": Case(
        "sft", "--eval_accumulation_steps 0", ("eval_accumulation_steps: 0", "at least 1")
    ),
    "evaluation delayed by no number": Case("sft", "--eval_delay nan", ("eval_delay: nan", "at least 0")),
    "a schedule above the rate": Case(
        "sft",
        "",
        ("lr_scheduler_kwargs:", "scales the learning rate"),
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 5}",
    ),
    "padding with the end": Case("sft", "--pad_token <|end|>", ("pad_token: <|end|>", "eos token")),
    "LoRA by a pattern that is none": Case(
        "sft", "--use_peft --lora_target_modules (q_proj", ("lora_target_modules: (q_proj", "regular expression")
    ),
    "LoRA on a norm": Case(
        "sft", "--use_peft --lora_target_modules input_layernorm", ("lora_target_modules: input_layernorm", "q_proj")
    ),
    "LoRA on a whole block": Case(
        "sft", "--use_peft --lora_target_modules self_attn", ("lora_target_modules: self_attn", "q_proj")
    ),
    "JSON that holds nothing": Case(
        "sft", "--dataset_name {here}/a.json", ("dataset_name:", "a list of rows"), files={"a.json": "null"}
    ),
    "answers to an answer": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "there is nothing to answer"),
        files={"a.jsonl": rows({"prompt": GOOD["messages"], "completion": "This."})},
    ),
    "an assistant without a question": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "there is no prompt"),
        files={"a.jsonl": rows({"messages": [{"role": "system", "content": "Be brief."}, GOOD["messages"][1]]})},
    ),
    "choices of the user": Case(
        "reward",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "role 'user'"),
        files={"a.jsonl": rows({"prompt": "What?", "chosen": GOOD["messages"][:1], "rejected": "That."})},
    ),
    "choices of several turns": Case(
        "reward",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "not one answer"),
        files={"a.jsonl": rows({"prompt": "Why?", "chosen": GOOD["messages"], "rejected": "That."})},
    ),
    "unknown optimizer": Case("sft", "--optim sgdd", ("optim: 'sgdd'", "adamw_torch")),
    "unknown schedule": Case("sft", "--lr_scheduler_type zigzag", ("lr_scheduler_type: 'zigzag'", "cosine")),
    "YAML that cannot be read": Case("sft", "", ("--config:", "line 2", "not valid YAML"), "a: 1\n b: [\n"),
    "YAML with a key twice": Case("sft", "", ("--config:", "line 2", "duplicate key"), "seed: 1\nseed: 2"),
    "YAML that is no mapping": Case("sft", "", ("--config:", "`field: value`"), "- seed"),
    "empty YAML": Case("sft", "", ("--config:", "`field: value`"), ""),
    "missing YAML": Case("sft", "--config {here}/missing.yaml", ("--config:", "cannot be read")),
    "a folder as YAML": Case("sft", "--config {here}", ("--config:", "cannot be read")),
    "YAML not named": Case("sft", "--config", ("--config:", "give the path")),
    "negative learning rate": Case("sft", "--learning_rate -1", ("learning_rate: -1.0", "above 0")),
    "learning rate that is no number": Case("sft", "--learning_rate nan", ("learning_rate: nan", "above 0")),
    "no steps": Case("sft", "--max_steps 0", ("max_steps: 0", "at least 1")),
    "no epochs": Case("sft", "--num_train_epochs 0", ("num_train_epochs: 0", "above 0")),
    "empty batch": Case("sft", "--per_device_train_batch_size 0", ("per_device_train_batch_size: 0", "between 1")),
    "no accumulation": Case("sft", "--gradient_accumulation_steps 0", ("gradient_accumulation_steps: 0",)),
    "never saved": Case("sft", "--save_steps 0", ("save_steps: 0", "above 0")),
    "no checkpoint kept": Case("sft", "--save_total_limit 0", ("save_total_limit: 0", "at least 1")),
    "negative seed": Case("sft", "--seed -1", ("seed: -1", "between 0")),
    "rank of nothing": Case("sft", "--use_peft --lora_r 0", ("lora_r: 0", "at least 1")),
    "remote code": Case("sft", "--trust_remote_code true", ("trust_remote_code: True", "never run")),
    "two precisions": Case("sft", "--fp16 --bf16", ("fp16: True", "not supported"), lines=2),
    "a stream without end": Case("sft", "--dataset_streaming --max_steps -1", ("max_steps: -1", "no length")),
    "a checkpoint that isn't there": Case("sft", "--resume_from_checkpoint {here}/c", ("resume_from_checkpoint:",)),
    # the data
    "no data set": Case("sft", "--dataset_name null", ("dataset_name: nothing", "give a Hub id")),
    "missing file": Case("sft", "--dataset_name {here}/no.jsonl", ("dataset_name:", "no such file")),
    "unknown type of file": Case(
        "sft",
        "--dataset_name {here}/a.docx",
        ("dataset_name:", "not supported", "save it as plain text (.txt)"),
        files={"a.docx": "x"},
    ),
    "no such split": Case("sft", "--dataset_train_split rain", ("dataset_train_split: rain", "choose from: train")),
    "no such test split": Case("sft", "--validation_share 0", ("dataset_test_split: validation", "choose from: train")),
    "trained on the test": Case("sft", "--dataset_test_split train", ("dataset_test_split: train", "training split")),
    "no such column": Case("sft", "--messages_column talk", ("messages_column: talk", "choose from: messages")),
    "no such prompts": Case(
        "sft", "--completion_column reply", ("completion_column: reply", "choose from: messages"), lines=2
    ),
    "no such text": Case("pretrain", "--text_column body", ("text_column: body", "choose from: text")),
    "no such configuration": Case(
        "sft",
        "--dataset_name {here}/hub --dataset_config b",
        ("dataset_config: b", "choose from: a"),
        files={
            "hub/README.md": "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n---\n",
            "hub/a.jsonl": rows(GOOD),
        },
    ),
    "empty file": Case("sft", "--dataset_name {here}/a.jsonl", ("dataset_name:", "a.jsonl"), files={"a.jsonl": ""}),
    "empty folder": Case(
        "sft", "--dataset_name {here}/folder", ("dataset_name:", "does not contain data"), files={"folder/": ""}
    ),
    "corrupt line": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "a.jsonl, line 3", "not valid JSON"),
        files={"a.jsonl": rows(GOOD, GOOD) + '{"messages": [\n' + rows(GOOD)},
    ),
    "corrupt parquet": Case(
        "sft",
        "--dataset_name {here}/a.parquet",
        ("dataset_name:", "a.parquet"),
        files={"a.parquet": "PAR1xxxxPAR1"},
    ),
    "not gzipped": Case(
        "sft",
        "--dataset_name {here}/a.jsonl.gz",
        ("dataset_name:", "a.jsonl.gz"),
        files={"a.jsonl.gz": rows(GOOD)},
    ),
    "no messages in a row": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 2", "not a list of messages"),
        files={"a.jsonl": rows(GOOD, GOOD, {"messages": []}, GOOD)},
    ),
    "an unknown role": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 1", "role 'robot'"),
        files={"a.jsonl": rows(GOOD, {"messages": [{"role": "robot", "content": "?"}]})},
    ),
    "no content": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 1", "None, not text"),
        files={"a.jsonl": rows(GOOD, {"messages": [{"role": "user", "content": None}]})},
    ),
    "the user has the last word": Case(
        "sft",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "ends with the role user"),
        files={"a.jsonl": rows({"messages": GOOD["messages"][:1]})},
    ),
    "a text that is none": Case(
        "pretrain",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 1", "None"),
        files={"a.jsonl": rows({"text": "a"}, {"text": None})},
    ),
    "two equal answers": Case(
        "reward",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "every pair has an empty answer, or two equal ones"),
        files={
            "a.jsonl": rows(
                {"prompt": "What?", "chosen": "That.", "rejected": "That."},
                {"prompt": "Why?", "chosen": "Because.", "rejected": " "},
            )
        },
    ),
    "texts without a prompt": Case(
        "reward",
        "--dataset_name {here}/a.jsonl",
        ("prompt_column: prompt", "contain only answers", "move what precedes the answers"),
        files={"a.jsonl": rows({"chosen": "Human: What? Assistant: That.", "rejected": "Human: What? Assistant: No."})},
    ),
    "a margin that is none": Case(
        "reward",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "margin is None"),
        files={"a.jsonl": rows({"prompt": "What?", "chosen": "That.", "rejected": "No.", "margin": None})},
    ),
    "an infinite margin": Case(
        "reward",
        "--dataset_name {here}/a.jsonl",
        ("dataset_name:", "row 0", "margin is inf"),
        files={"a.jsonl": rows({"prompt": "What?", "chosen": "That.", "rejected": "No.", "margin": float("inf")})},
    ),
    "a group of the pattern that finds nothing": Case(
        "grpo",
        "--dataset_name {here}/a.jsonl --answer_pattern (z)?That",
        ("dataset_name:", "row 0", "finds nothing"),
        files={"a.jsonl": rows({"prompt": "What?", "answer": "That."}) * 8},
    ),
    "scores centred by no number": Case(
        "reward", "--center_rewards_coefficient nan", ("center_rewards_coefficient: nan", "at least 0")
    ),
    "a rollout of one completion": Case(
        "ppo",
        "--per_device_train_batch_size 1 --reward_funcs exact_answer hidden_taste --reward_weights 1 0",
        ("per_device_train_batch_size: 1", "raise it to 2"),
    ),
    "the only configuration under another name": Case(
        "sft",
        "--dataset_name {here}/d --dataset_config main",
        ("dataset_config: main", "choose from: default, or set it to null"),
        files={"d/a.jsonl": rows(GOOD)},
    ),
    "answers without a prompt": Case(
        "reward",
        "--dataset_name {inputs}/text.txt",
        ("rejected_column: rejected", "choose from: text"),
        lines=2,
    ),
    "too little text": Case(
        "pretrain",
        "--dataset_name {here}/a.txt --eval_strategy no",
        ("block_size: 64", "do not fill a block"),
        files={"a.txt": "Hello.\n"},
    ),
    "a batch that drops all": Case(
        "sft",
        "--dataset_name {here}/a.jsonl --dataloader_drop_last --eval_strategy no",
        ("per_device_train_batch_size: 4", "has 2"),
        files={"a.jsonl": rows(GOOD, GOOD, GOOD)},
    ),
    "prompts that leave no room": Case("sft", "--max_length 4", ("max_length: 4", "no answer would be left")),
    "pairs that all are too long": Case("reward", "--max_length 4", ("max_length: 4", "would be dropped")),
    # the model and its tokenizer
    "no model": Case("sft", "--model_name_or_path null", ("model_name_or_path: nothing", "give a Hub id")),
    "a folder without a model": Case(
        "sft", "--model_name_or_path {inputs}/no-model", ("model_name_or_path:", "no model can be loaded")
    ),
    "a folder without a tokenizer": Case(
        "pretrain", "--tokenizer_name_or_path {inputs}/no-model", ("tokenizer_name_or_path:", "no tokenizer")
    ),
    "a reward model to tune": Case(
        "sft",
        "--model_name_or_path {inputs}/no-weights-of-a-language-model",
        ("model_name_or_path:", "a reward model"),
    ),
    "no chat template": Case("sft", "--model_name_or_path {inputs}/no-template", ("model_name_or_path:", "template")),
    "answers that cannot be found": Case(
        "sft", "--model_name_or_path {inputs}/no-marks", ("assistant_only_loss: True", "{% generation %}")
    ),
    "more words than the model": Case(
        "sft", "--model_name_or_path {inputs}/more-words", ("model_name_or_path:", "knows", "tokens")
    ),
    "blocks beyond the positions": Case(
        "pretrain", "--block_size 512 --max_position_embeddings 256", ("block_size: 512", "context is 256 tokens")
    ),
    "sequences beyond the positions": Case("sft", "--max_length 512", ("max_length: 512", "context is 256 tokens")),
    "LoRA on nothing": Case(
        "sft", "--use_peft --lora_target_modules qkv", ("lora_target_modules: qkv", "choose from", "q_proj")
    ),
    "heads that don't divide": Case(
        "pretrain", "--hidden_size 33 --num_attention_heads 2", ("hidden_size: 33", "multiple")
    ),
    "a penalty without end": Case("ppo", "--missing_eos_penalty inf", ("missing_eos_penalty: inf", "at least 0")),
    "a reward named twice": Case(
        "grpo", "--reward_funcs exact_answer exact_answer", ("reward_funcs: exact_answer", "twice")
    ),
    "a reference kept for no step": Case("grpo", "--ref_model_sync_steps 0", ("ref_model_sync_steps: 0", "at least 1")),
    # the output directory
    "somebody's file": Case(
        "sft",
        "--output_dir {here}/mine",
        ("output_dir:", "contains README.md"),
        files={"mine/README.md": "years of work"},
    ),
    "a run inside the data": Case(
        "sft",
        "--dataset_name {here}/data --output_dir {here}/data/run",
        ("output_dir:", "inside dataset_name"),
        files={"data/train.jsonl": rows(*[GOOD] * 40)},
    ),
    "an earlier run's record that is none": Case(
        "sft", "--output_dir {here}/run", ("output_dir:", "cannot be read"), files={"run/arguments.json": "[1]"}
    ),
    "a checkpoint whose record is cut off": Case(
        "sft",
        "--resume_from_checkpoint {here}/c",
        ("resume_from_checkpoint:", "is damaged"),
        files={"c/trainer_state.json": "{"},
    ),
    "a file as output": Case("sft", "--output_dir {inputs}/text.txt", ("output_dir:", "is not a directory")),
    "below a file": Case("sft", "--output_dir {inputs}/text.txt/run", ("output_dir:", "is not a directory")),
}


def data(recipe: str, content: str | bytes, *said: str, more: str = "", file: str = "a.jsonl") -> Case:
    """Return the case of a data file."""
    return Case(recipe, f"--dataset_name {{here}}/{file} {more}", ("dataset_name:", *said), files={file: content})


def model(name: str, *said: str, recipe: str = "sft", more: str = "") -> Case:
    """Return the case of a model's folder."""
    return Case(recipe, f"--model_name_or_path {{inputs}}/{name} {more}", ("model_name_or_path:", *said))


def talk(*turns: str) -> dict[str, Any]:
    """Return a row of messages, each `role:content`."""
    pairs = [turn.split(":", 1) for turn in turns]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


CASES |= {
    # YAML
    "a list as key": Case("sft", "", ("--config:", "line 1", "a key must be a name"), "? [a, b]\n: 1\n"),
    "a mapping as value": Case("sft", "", ("training:", "unknown field"), "training:\n  seed: 1\n"),
    "tabs": Case("sft", "", ("--config:", "line 2", "not valid YAML"), "a:\n\tseed: 1\n"),
    "not UTF-8": Case("sft", "", ("--config:", "not UTF-8 text"), b"seed: 1\nrun_name: \xff\n"),
    "two documents": Case("sft", "", ("--config:", "line 2", "document"), "seed: 1\n---\nseed: 2\n"),
    "a Python object": Case("sft", "", ("--config:", "not valid YAML"), "seed: !!python/name:os.system\n"),
    "an undefined alias": Case("sft", "", ("--config:", "alias"), "seed: *x\n"),
    "environment that is nested": Case("sft", "", ("env: 'A'", "cannot be set"), "env: {A: [1]}\n"),
    "environment without a name": Case("sft", "", ("env: ''", "cannot be set"), "env: {'': 1}\n"),
    "a name of a model that is too long": Case(
        "sft", "--model_name_or_path " + "x" * 300, ("model_name_or_path: xxx", "no model can be loaded")
    ),
    "environment that is a list": Case("sft", "", ("env: [1]", "mapping"), "env: [1]\n"),
    "two files": Case("sft", "--config {here}/a --config {here}/b", ("--config:", "only one file")),
    "text for a switch": Case("sft", "", ("bf16: 'maybe'", "true or false"), "bf16: maybe\n"),
    "one of another set, in YAML": Case(
        "sft", "", ("packing_strategy: 'foo'", "must be one of", "bfd"), "packing_strategy: foo\n"
    ),
    "one of another set, as an option": Case("sft", "--dtype float7", ("dtype: 'float7'", "bfloat16")),
    # numbers
    "weight decay that is no number": Case("sft", "--weight_decay nan", ("weight_decay: nan",)),
    "evaluated every 0 steps": Case("sft", "--eval_steps 0", ("eval_steps: 0", "above 0")),
    "noise below 0": Case("sft", "--neftune_noise_alpha -1", ("neftune_noise_alpha: -1",)),
    "no process for the data": Case("sft", "--dataset_num_proc 0", ("dataset_num_proc: 0", "between 1")),
    "a share above a half": Case("sft", "--validation_share 2", ("validation_share: 2.0", "between 0 and 0.5")),
    "a negative length": Case("sft", "--max_length -5", ("max_length: -5", "at least 2")),
    "Muon's learning rate": Case("pretrain", "--muon_learning_rate 0", ("muon_learning_rate: 0.0", "above 0")),
    "the embeddings' learning rate": Case("sft", "--embedding_learning_rate 0", ("embedding_learning_rate: 0.0",)),
    "LoRA by Muon": Case("sft", "--use_peft --use_muon", ("use_muon: True", "LoRA does not train embeddings")),
    "a rate for embeddings that LoRA leaves alone": Case(
        "reward", "--use_peft --embedding_learning_rate 1", ("embedding_learning_rate: 1.0", "LoRA does not train")
    ),
    "a base that is no number": Case("pretrain", "--rope_theta nan", ("rope_theta: nan",)),
    # what only the libraries know
    "an optimizer without its package": Case("sft", "--optim galore_adamw", ("optim: galore_adamw", "install")),
    "8 bits without their package": Case(
        "ppo", "--optim adamw_8bit", ("optim: adamw_8bit", "pip install -U bitsandbytes")
    ),
    "optimizer's options": Case("sft", "--optim_args foo", ("optim_args: foo",)),
    "a schedule without its options": Case(
        "sft", "--lr_scheduler_type cosine_with_min_lr", ("lr_scheduler_type: cosine_with_min_lr", "min_lr")
    ),
    "a schedule's options that are none": Case("sft", "--lr_scheduler_kwargs foo", ("lr_scheduler_kwargs: foo",)),
    "a schedule's unknown option": Case("sft", '--lr_scheduler_kwargs {{"foo":1}}', ("lr_scheduler_kwargs:", "'foo'")),
    "broken JSON": Case("sft", "--accelerator_config {{foo", ("accelerator_config: {foo", "JSON")),
    "unknown attention": Case("sft", "--attn_implementation foo", ("attn_implementation: foo", "sdpa")),
    "attention that isn't installed": Case(
        "sft", "--attn_implementation flash_attention_2", ("attn_implementation: flash_attention_2", "installed")
    ),
    "pushed without a token": Case("sft", "--push_to_hub", ("push_to_hub: ", "needs a token")),
    "FSDP on a CPU": Case("sft", "--fsdp full_shard", ("fsdp:", "never active on CPUs")),
    "DeepSpeed that isn't there": Case("sft", "--deepspeed nope.json", ("deepspeed: nope.json",)),
    "no CPU where nothing else is": Case("sft", "--use_cpu false", ("use_cpu: False", "only a CPU")),
    "4 bits without an adapter": Case("sft", "--load_in_4bit", ("load_in_4bit: True", "no effect unless use_peft")),
    "a critic with 4 bits in full": Case(
        "ppo", "--load_in_4bit --use_peft --value_use_peft false", ("value_use_peft: False", "4 bits", "adapter")
    ),
    "8 bits": Case("sft", "--load_in_8bit --use_peft", ("load_in_8bit: True", "load_in_4bit")),
    "half precision to evaluate": Case("sft", "--fp16_full_eval", ("fp16_full_eval: True", "not supported")),
    "an unknown way to compile": Case("sft", "--torch_compile_mode foo", ("torch_compile_mode: foo", "max-autotune")),
    "an eos token that isn't known": Case("sft", "--eos_token <foo>", ("eos_token: <foo>", "not found")),
    "a template that isn't there": Case(
        "sft", "--chat_template_path {here}/no.jinja", ("chat_template_path:", "cannot be read")
    ),
    "the best without a metric": Case("sft", "--save_strategy best", ("save_strategy: best", "metric_for_best")),
    "the best without evaluation": Case(
        "sft", "--load_best_model_at_end --eval_strategy no", ("load_best_model_at_end: True", "match")
    ),
    "a LoRA task": Case("sft", "--use_peft --lora_task_type FOO", ("lora_task_type: FOO", "CAUSAL_LM")),
    "LoRA saving nothing": Case(
        "sft", "--use_peft --lora_modules_to_save foo", ("lora_modules_to_save: foo", "not have such modules")
    ),
    # the data
    "bytes that are no text": data("sft", b"\0" * 1000, "a.jsonl"),
    "latin-1": data("sft", '{"messages": "\xe9"}\n'.encode("latin-1") * 5, "line 1", "not valid JSON"),
    "latin-1 text": data("pretrain", "caf\xe9 ".encode("latin-1") * 2000, "cannot be read", file="a.txt"),
    "blank lines": data("sft", "\n\n", "a.jsonl", "nothing but white space"),
    "numbers as rows": data("sft", "1\n2\n", "a.jsonl", "line 1", "must be an object"),
    "cut gzip": data("sft", b"\x1f\x8b\x08\x00\x00", "a.jsonl.gz", "cannot be read", file="a.jsonl.gz"),
    "white space": data("pretrain", " \n\t\n" * 2000, "a.txt", "nothing but white space", file="a.txt"),
    "white space in a stream": data(
        "pretrain", "\n" * 2000, "a.txt", "nothing but white space", file="a.txt", more="--dataset_streaming"
    ),
    "white space without width": data(
        "pretrain", "\u200b\ufeff\n".encode() * 2000, "a.txt", "nothing but white space", file="a.txt"
    ),
    "rows of white space": data("pretrain", rows(*[{"text": " \n "}] * 100), "a.jsonl", "nothing but white space"),
    "rows of white space in a stream": data(
        "pretrain", rows(*[{"text": " \n "}] * 100), "a.jsonl", "nothing but white space", more="--dataset_streaming"
    ),
    "a table with a header only": data("pretrain", "text\n", "a.csv", "does not have rows", file="a.csv"),
    "mixed columns": data("sft", rows(GOOD, {"text": "a"}), "row 1", "None, not a list of messages"),
    "an empty question": data("sft", rows(talk("user: ", "assistant:b")), "row 0", "empty message of the user"),
    "an empty answer": data("sft", rows(talk("user:a", "assistant:")), "row 0", "empty message of the assistant"),
    "two answers in a row": data(
        "sft", rows(talk("user:a", "assistant:b", "assistant:c")), "row 0", "two messages of the assistant"
    ),
    "no question": data("sft", rows(talk("assistant:b")), "row 0", "begins with the assistant"),
    "one row only": data("sft", rows(GOOD), "has 1 row", "eval_strategy"),
    "answers to different prompts": data(
        "reward",
        rows(
            *[
                {
                    "chosen": talk("user:a", "assistant:b")["messages"],
                    "rejected": talk("user:A", "assistant:c")["messages"],
                }
            ]
            * 2
        ),
        "row 0",
        "same prompt",
    ),
    "a prompt without an answer": data("grpo", rows({"prompt": "a", "answer": None}) * 8, "row 0", "answer is None"),
    "a data set card that is no YAML": Case(
        "sft",
        "--dataset_name {here}/d",
        ("dataset_name:", "cannot be read"),
        files={"d/README.md": "---\nconfigs: [\n---\n", "d/a.jsonl": rows(GOOD)},
    ),
    "a data set that is code": Case(
        "sft", "--dataset_name {here}/d", ("dataset_name:", "data (d.py)"), files={"d/d.py": "raise SystemExit(9)"}
    ),
    # models
    "weights cut off": model("cut", "model.safetensors is damaged"),
    "weights cut off, of a policy": model("cut", "model.safetensors is damaged", recipe="grpo"),
    "no weights": model("no-weights", "does not contain weights"),
    "weights as a pickle": model("pickle", "pickle", "safetensors"),
    "weights of another width": model("wider", "do not fit its config.json"),
    "weights of fewer layers": model("deeper", "lacks the weights"),
    "no configuration": model("no-config", "no model can be loaded"),
    "a configuration cut off": model("config-cut", "no model can be loaded", "line 1 column 2"),
    "an unknown kind of model": model("unknown-kind", "foonet"),
    "a tokenizer cut off": model("tokenizer-cut", "no tokenizer"),
    "a template that writes nothing": model("silent", "makes no tokens"),
    "an encoder": model("encoder", "cannot generate text"),
    "an adapter without its base model": model("adapter", "x, the base model of", "is not a local path"),
    "a learned prompt": model("learned-prompt", "cannot be merged"),
    "two labels to reward with": model("two-labels", "2 labels", recipe="reward"),
    "a template that refuses": model("refusing", "rejects a conversation", "too polite"),
    # preferences
    "a weight for another number of losses": Case("dpo", "--loss_weights 1 2", ("loss_weights:", "same length")),
    "a beta of 0": Case("dpo", "--beta 0", ("beta: 0.0", "above 0")),
    "labels that say nothing": Case(
        "dpo", "--loss_type robust --label_smoothing 0.5", ("label_smoothing: 0.5", "below 0.5")
    ),
    "a reference that moves": Case("dpo", "--sync_ref_model", ("sync_ref_model: True", "resumed")),
    "a loss of DPO": Case("kto", "--loss_type sigmoid", ("loss_type: 'sigmoid'", "apo_zero_unpaired")),
    "a reward model as a policy": model("two-labels", "is a reward model", recipe="dpo"),
    "pairs that are too long": Case("dpo", "--max_length 4", ("max_length: 4", "every pair is longer")),
    "a stream that is read beforehand": Case(
        "dpo", "--precompute_ref_log_probs --dataset_streaming --max_steps 2", ("precompute_ref_log_probs: True",)
    ),
    # rewards and rollouts
    "one generation": Case("grpo", "--num_generations 1", ("num_generations: 1", "at least 2")),
    "a batch that doesn't divide": Case("grpo", "--per_device_train_batch_size 6", ("num_generations: 4", "divisible")),
    "no steps for a rollout": Case("grpo", "--steps_per_generation 0", ("steps_per_generation: 0",)),
    "weights that are no numbers": Case("grpo", "--reward_weights nan", ("reward_weights: [nan]", "numbers")),
    "a weight too many": Case("grpo", "--reward_weights 1 2", ("reward_weights:", "one weight for each")),
    "an unknown loss": Case("grpo", "--loss_type foo", ("loss_type: foo", "dapo")),
    "GSPO": Case("grpo", "--loss_type gspo", ("loss_type: gspo", "importance_sampling_level: sequence")),
    "an unknown scale": Case("grpo", "--scale_rewards foo", ("scale_rewards: foo", "group")),
    "options of generation that are none": Case("grpo", "--generation_kwargs foo", ("generation_kwargs: foo", "JSON")),
    "an unknown cache": Case("grpo", "--cache_implementation foo", ("cache_implementation: foo", "static")),
    "vLLM that isn't installed": Case("grpo", "--use_vllm", ("use_vllm: True", "install")),
    "a reward that is no function": Case(
        "grpo", "--reward_funcs os:sep", ("reward_funcs: os:sep", "does not have a function")
    ),
    "a reward's module that isn't there": Case("grpo", "--reward_funcs nomod:f", ("reward_funcs: nomod:f", "nomod")),
    "a reward that cannot be called": Case("grpo", "--reward_funcs builtins:dict", ("reward_funcs: builtins:dict",)),
    "a reward that takes no columns": Case(
        "grpo", "--reward_funcs os:getcwd", ("reward_funcs: os:getcwd", "**columns")
    ),
    "no reward": Case("ppo", "--reward_funcs null", ("reward_model_path: nothing", "name a reward model")),
    "a reward model that is none": Case(
        "ppo", "--reward_model_path {inputs}/model", ("reward_model_path:", "give a reward model")
    ),
    "a penalty that is no number": Case("ppo", "--kl_coef nan", ("kl_coef: nan", "at least 0")),
    "clipped at no number": Case("ppo", "--cliprange nan", ("cliprange: nan", "above 0")),
    "a discount above 1": Case("ppo", "--gamma 1.1", ("gamma: 1.1", "between 0 and 1")),
    "GRPO's penalty in PPO": Case("ppo", "--beta 0.1", ("beta: 0.1", "set kl_coef")),
    "GRPO's loss in PPO, in several ways": Case(
        "ppo",
        "--loss_type grpo --epsilon_high 0.3 --importance_sampling_level sequence",
        ("epsilon_high: 0.3", "set cliprange"),
        lines=3,
    ),
    "a reward that is only measured": Case(
        "grpo", "--reward_funcs hidden_taste", ("reward_weights: nothing", "weight 0")
    ),
    "a reward without its column": Case("grpo", "--reward_funcs code_tests", ("reward_funcs: code_tests", "no column")),
    "a critic that isn't there": Case("ppo", "--value_model_path {inputs}/no-model", ("value_model_path:", "no model")),
    "a critic cut off": Case("ppo", "--value_model_path {inputs}/cut", ("value_model_path:", "is damaged")),
    "a critic with other words": Case(
        "ppo", "--value_model_path {inputs}/more-words", ("value_model_path:", "a different tokenizer")
    ),
    "a rollout of one": Case("ppo", "--per_device_train_batch_size 1", ("per_device_train_batch_size: 1",)),
    # the output directory
    "the model's directory": Case("sft", "--output_dir {inputs}/model", ("output_dir:", "model_name_or_path")),
    "another model's directory": Case(
        "sft", "--output_dir {inputs}/no-marks", ("output_dir:", "not written by a recipe")
    ),
    "a name too long": Case("sft", "--output_dir {here}/" + "x" * 300, ("output_dir:", "not a valid path")),
    "a checkpoint that is none": Case(
        "sft", "--resume_from_checkpoint {inputs}/model", ("resume_from_checkpoint:", "is not a checkpoint")
    ),
}

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{earlier}'] * 8)}]\n"
    for earlier, name in zip("abcdefgh", "bcdefghi", strict=True)
)

CASES |= {
    # YAML
    "workers kept of none": Case(
        "sft", "--dataloader_persistent_workers", ("dataloader_persistent_workers: True", "dataloader_num_workers")
    ),
    "an unknown option of accelerate": Case(
        "sft", '--accelerator_config {{"foo":1}}', ("accelerator_config:", "'foo'")
    ),
    "an unknown option of checkpointing": Case(
        "sft",
        '--gradient_checkpointing_kwargs {{"foo":1}}',
        ("gradient_checkpointing_kwargs:", "unexpected keyword argument 'foo'", "correct it"),
    ),
    "an option of checkpointing of the wrong type": Case(
        "pretrain",
        '--gradient_checkpointing_kwargs {{"determinism_check":"foo"}}',
        ("gradient_checkpointing_kwargs:", "determinism_check should be one of", "correct it"),
    ),
    "an unknown option of accelerate's accumulation": Case(
        "sft",
        '--accelerator_config {{"gradient_accumulation_kwargs":{{"foo":1}}}}',
        ("accelerator_config:", "'foo'"),
    ),
    "other labels": Case("pretrain", "--label_names x", ("label_names: ['x']", "omit it")),
    "the root": Case("sft", "--output_dir /", ("output_dir: /", "root of the file system")),
    "an alias bomb": Case("sft", "", ("--config:", "line 2", "an alias inside a value"), BOMB),
    "an alias of itself": Case("sft", "", ("--config:", "line 1", "an alias inside"), "seed: &a [*a]\n"),
    "nested too deep": Case("sft", "", ("--config:", "recursion"), f"seed: {'[' * 5000}{']' * 5000}\n"),
    "a date that cannot be": Case("sft", "", ("--config:", "month"), "max_steps: 2026-99-99\n"),
    "a date for a number": Case("sft", "", ("max_steps:", "a whole number"), "max_steps: 2026-01-01\n"),
    "a number of 5000 digits": Case("sft", "", ("--config:", "digits"), f"max_steps: {'9' * 5000}\n"),
    "a number of 400 digits": Case("sft", "", ("max_steps: 999", "..."), f"max_steps: {'9' * 400}\n"),
    "a NUL character": Case("sft", "", ("run_name:", "NUL"), 'run_name: "a\\0b"\n'),
    "a device as YAML": Case("sft", "--config /dev/zero", ("--config: /dev/zero", "not a regular file")),
    "true for a number": Case("sft", "", ("max_steps: True", "a whole number"), "max_steps: true\n"),
    "a list for a name": Case("sft", "", ("run_name: ['a', 'b']", "text"), "run_name: [a, b]\n"),
    # values
    "a LoRA rank above every matrix": Case("sft", "--use_peft --lora_r 100000000", ("lora_r: 100000000", "above 32")),
    "a warm-up that does not end": Case("sft", "--warmup_steps 1000", ("warmup_steps: 1000", "max_steps (8)")),
    "an empty name": Case("sft", "--run_name=", ("run_name: ''", "is empty")),
    "padding to a negative multiple": Case("sft", "--pad_to_multiple_of -1", ("pad_to_multiple_of: -1", "between 1")),
    "a learning rate of 1000": Case("sft", "--learning_rate 1000", ("learning_rate: 1000.0", "at most 100")),
    "evaluated at the start, without evaluation": Case(
        "sft", "--eval_strategy no --eval_on_start", ("eval_on_start: True", "needs an eval_strategy")
    ),
    "checkpoints compared by nothing": Case(
        "pretrain", "--save_strategy best", ("save_strategy: best", "needs metric_for_best_model")
    ),
    "packed to no length": Case("sft", "--max_length null", ("max_length: None", "with packing")),
    "rows without padding that are not cut": Case(
        "sft", "--packing false --padding_free", ("padding_free: True", "max_length")
    ),
    "an unknown padding": Case("reward", "--pad_token <foo>", ("pad_token: <foo>", "not found in the vocabulary")),
    "a loss of experts that are not there": Case(
        "sft", "--router_aux_loss_coef 0.1", ("router_aux_loss_coef: 0.1", "does not have experts")
    ),
    "LoRA with dropout where PEFT has none": Case(
        "grpo", "--use_peft --lora_target_parameters mlp.up_proj.weight", ("lora_dropout: 0.05", "ParamWrapper")
    ),
    "LoRA on what is trained in full": Case(
        "sft",
        "--use_peft --lora_target_modules q_proj --lora_modules_to_save self_attn",
        ("lora_target_modules: ['q_proj']", "No modules were targeted"),
    ),
    "LoRA on the output layer": Case(
        "ppo", "--use_peft --lora_target_modules lm_head", ("lora_target_modules: ['lm_head']", "lora_modules_to_save")
    ),
    "a reference that moves, in GRPO": Case("grpo", "--sync_ref_model --beta 0.1", ("sync_ref_model: True", "resumed")),
    "smoothing that no loss takes": Case("reward", "--label_smoothing_factor 0.1", ("label_smoothing_factor: 0.1",)),
    "metrics by batch": Case("pretrain", "--batch_eval_metrics", ("batch_eval_metrics: True", "whole evaluation")),
    "an unknown compiler": Case(
        "sft", "--torch_compile --torch_compile_backend foo", ("torch_compile_backend: foo", "inductor")
    ),
    "offloading to the CPU, on a CPU": Case(
        "sft", "--activation_offloading", ("activation_offloading: True", "only a")
    ),
    "options of a model that the recipe sets": Case(
        "sft", '--model_init_kwargs {{"revision":"x"}}', ("model_init_kwargs:", "replaced by model_revision")
    ),
    "an unknown option of generation": Case(
        "grpo", '--generation_kwargs {{"foo":1}}', ("generation_kwargs:", "omit foo")
    ),
    "a temperature of generation that training would not see": Case(
        "grpo", '--generation_kwargs {{"temperature":"hot"}}', ("generation_kwargs:", "omit temperature")
    ),
    "an option of generation of the wrong type": Case(
        "grpo", '--generation_kwargs {{"cache_implementation":"foo"}}', ("generation_kwargs:", "foo")
    ),
    "a filter of what is sampled": Case("grpo", "--top_p 0.9", ("top_p: 0.9", "temperature only")),
    "several filters of what is sampled": Case(
        "ppo", "--top_k 5 --min_p 0.1 --repetition_penalty 1.1", ("top_k: 5", "temperature only"), lines=3
    ),
    "messages for a chat template": Case(
        "grpo", '--chat_template_kwargs {{"messages":[]}}', ("chat_template_kwargs:", "messages cannot be given")
    ),
    "continuous batching": Case(
        "grpo", "--use_transformers_continuous_batching", ("use_transformers_continuous_batching: True", "bf16")
    ),
    "continuous batching, by its old name": Case(
        "ppo", "--use_transformers_paged", ("use_transformers_paged: True", "bf16")
    ),
    "another optimizer beside Muon": Case(
        "pretrain", "--use_muon --optim sgd", ("optim: sgd", "no effect with use_muon")
    ),
    "options of an optimizer beside Muon": Case(
        "pretrain", "--use_muon --optim_args a=1", ("optim_args: a=1", "no effect with use_muon")
    ),
    "another optimizer beside a rate for embeddings": Case(
        "sft", "--embedding_learning_rate 0.1 --optim adafactor", ("optim: adafactor", "embedding_learning_rate")
    ),
    "a rate of Muon without Muon": Case(
        "pretrain", "--muon_learning_rate 0.1", ("muon_learning_rate: 0.1", "unless use_muon is true")
    ),
    "a LoRA rank without LoRA": Case("sft", "", ("lora_r: 8", "unless use_peft is true"), "lora_r: 8\n"),
    "a parameter of another loss": Case(
        "grpo", "--sapo_temperature_pos 2", ("sapo_temperature_pos: 2.0", "unless loss_type is sapo")
    ),
    "a loss on completions, of which conversations have none": Case(
        "sft", "--completion_only_loss", ("completion_only_loss: True", "use assistant_only_loss")
    ),
    "a column for TRL": Case("sft", "--dataset_text_field a", ("dataset_text_field: a", "messages_column")),
    "a step that every recipe takes": Case("sft", "--do_train", ("do_train: True", "every recipe trains")),
    "an evaluation that is not scheduled": Case(
        "sft", "--eval_strategy no --do_eval", ("do_eval: True", "needs an eval_strategy")
    ),
    "rewards scaled by group in PPO": Case(
        "ppo", "--scale_rewards batch", ("scale_rewards: batch", "whiten_advantages")
    ),
    "a special token in the system prompt": Case(
        "sft", "--system_prompt a<|user|>", ("system_prompt: a<|user|>", "contains <|user|>", "special token")
    ),
    "a special token in an answer": data(
        "sft", rows(GOOD, talk("user:a", "assistant:Hi<|end|><|assistant|>Sure.")), "row 1", "contains <|end|>"
    ),
    "a special token in a question": data("sft", rows(talk("user:<|bos|>", "assistant:a"), GOOD), "row 0", "<|bos|>"),
    "a special token in a prompt": data("grpo", rows({"prompt": "a<|pad|>", "answer": "1"}) * 8, "row 0", "<|pad|>"),
    "a special token in a prompt of PPO": data("ppo", rows({"prompt": "<|system|>"}) * 8, "row 0", "<|system|>"),
    "a special token in a rejected answer": data(
        "reward",
        rows({"prompt": "a", "chosen": "b", "rejected": "c<|user|>"}) * 4,
        "row 0",
        "rejected contains <|user|>",
    ),
    "columns removed that rewards read": Case(
        "grpo", "--remove_unused_columns", ("remove_unused_columns: True", "rewards read")
    ),
    "an unknown aggregation": Case(
        "grpo", "--multi_objective_aggregation foo", ("multi_objective_aggregation: foo", "normalize_then_sum")
    ),
    "only the wrong one of two fields": Case("grpo", "--num_generations x", ("num_generations: 'x'", "a whole number")),
    # the data
    "a pattern that another file matches": Case(
        "sft",
        "--dataset_name {here}/a[1].jsonl",
        ("messages_column:", "choose from: right"),
        files={"a[1].jsonl": rows({"right": 1}), "a1.jsonl": rows(GOOD)},
    ),
    "a device as data": Case("sft", "--dataset_name /dev/zero", ("dataset_name:", "does not contain data")),
    "ragged rows": data("pretrain", "text,b\n1,2\n3,4,5\n", "a.csv", "cannot be read", file="a.csv"),
    "JSON nested too deep": data("sft", "[" * 10**5 + "]" * 10**5, "line 1", "not valid JSON"),
    # models
    "a path without a folder": Case(
        "sft", "--model_name_or_path runs/none/2_sft", ("model_name_or_path:", "there is no such folder")
    ),
    "no attention heads": model("no-heads", "no model can be loaded"),
    "no layers": model("no-layers", "0 layers"),
    "architectures that are text": model("architecture-text", "not a list of names"),
    "an unknown architecture": model("architecture-unknown", "unknown architecture, FooForCausalLM"),
    "quantised weights": model("quantised", "training quantised models is not supported"),
    "weights that are NaN": model("nan", "not finite numbers"),
    "generation options that cannot be saved": model("generation", "temperature"),
    "a template that divides by zero": model("dividing", "its chat template does not work", "division by zero"),
    # the output directory
    "below a link to nothing": Case("sft", "--output_dir {inputs}/dangling/run", ("output_dir:", "dangling symlink")),
}
