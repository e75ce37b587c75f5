"""A finished run of miniature models, as `python -m pipeline run` leaves it."""

import json
import pickle
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from pipeline.__main__ import main
from tests.helpers.fake_run import write_run
from tests.helpers.small_model import conversation, save_model, save_tokenizer, write_data

TOKEN = "hf_aSecretOfTheUser"
MODELS = ("0_random", "1_pretrain", "2_sft", "3_reward", "3_ppo", "4_grpo")
STARTS_FROM = {"2_sft": "1_pretrain", "3_reward": "2_sft", "3_ppo": "2_sft", "4_grpo": "3_ppo"}


def write_small_run(run: Path) -> Path:
    """Write a run whose last stage is an adapter, with hostile answers, and with much that must not be pushed."""
    write_run(run, examples=20, hostile=True)
    rows = [{"messages": conversation(f"What is {i}?", f"It is {i}.")} for i in range(8)]
    write_data(run / "data", rows, config="sft")
    card = (run / "data" / "README.md").read_text()
    (run / "data" / "README.md").write_text(card.replace("---\n", "---\nlanguage: en\nlicense: apache-2.0\n", 1))
    write_data(run / "3_preferences", [{"prompt": row["messages"][:1], "chosen": [], "rejected": []} for row in rows])
    with (run / "3_preferences" / "README.md").open("a") as file:
        file.write(f"\nAnswers sampled from `{run}/2_sft`.\n")
    save_tokenizer(run / "tokenizer")
    for seed, stage in enumerate(MODELS):
        _write_model(run, stage, seed)
    evaluation = json.loads((run / "evaluations" / "2_sft.json").read_text())
    evaluation["metrics"]["piqa:acc"] = {"value": 0.5, "ci95": [0.4, 0.6], "n": 100}
    (run / "evaluations" / "2_sft.json").write_text(json.dumps(evaluation))
    record = json.loads((run / "run.json").read_text())
    record["steps"] |= {stage: _step(run, stage) for stage in (*MODELS, "3_preferences")}
    record["steps"] |= {f"evaluate_{stage}": {"values": _measured_on(run)} for stage in MODELS}
    (run / "run.json").write_text(json.dumps(record))
    assert main(["report", str(run)]) == 0
    return run


def _write_model(run: Path, stage: str, seed: int) -> None:
    folder = run / stage
    (folder / "model.safetensors").unlink()
    save_model(folder, seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    if stage == "3_reward":
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
    if stage == "3_ppo":
        AutoModelForTokenClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder / "value_model")
    if stage == "4_grpo":
        for name in ("model.safetensors", "config.json", "generation_config.json"):
            (folder / name).unlink()
        base = AutoModelForCausalLM.from_pretrained(run / "3_ppo")
        adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.peft_config["default"].base_model_name_or_path = str((run / "3_ppo").absolute())
        adapted.save_pretrained(folder)
    checkpoint = folder / "checkpoint-2"
    model.save_pretrained(checkpoint)
    state = {"global_step": 2, "best_model_checkpoint": str(checkpoint.absolute()), "log_history": []}
    for place in (folder, checkpoint):
        (place / "trainer_state.json").write_text(json.dumps(state))
        for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
            (place / name).write_bytes(pickle.dumps({"path": str(run)}))
    (folder / ".lock").write_text("123")
    (folder / ".model.safetensors.tmp").write_bytes(b"half")
    (folder / "events.out.tfevents.1.host").write_bytes(b"host")
    arguments = {"output_dir": str(folder), "model_name_or_path": _start(run, stage), "logging_dir": str(Path.home())}
    (folder / "arguments.json").write_text(json.dumps(arguments))


def _start(run: Path, stage: str) -> str | None:
    return str(run / STARTS_FROM[stage]) if stage in STARTS_FROM else None


def _step(run: Path, stage: str) -> dict[str, Any]:
    data = "3_preferences" if stage == "3_reward" else "data"
    values = {"dataset_name": str(run / data), "dataset_config": "sft", "env": {"HF_TOKEN": TOKEN}, "hub_token": TOKEN}
    values |= {"model_name_or_path": start} if (start := _start(run, stage)) else {}
    values |= {"reward_model_path": str(run / "3_reward")} if stage == "3_ppo" else {}
    values |= {"tokenizer_name_or_path": str(run / "tokenizer")} if stage == "1_pretrain" else {}
    return {
        "values": {**values, "output_dir": str(run / stage)},
        "command": f"accelerate launch -m recipes.x --config {Path.home()}/x.yaml --hub_token {TOKEN} --seed 0",
        "seconds": 12.3,
        "hardware": {"processor": "Imaginary Xeon", "cores": 2, "system": "Linux x86_64"},
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "commit": "0123456789abcdef",
    }


def _measured_on(run: Path) -> dict[str, Any]:
    data = {"dataset_name": str(run / "data"), "dataset_config": "sft"}
    keys = ("text", "instructions", "problems", "prompts")
    return {"home": str(run), **dict.fromkeys(keys, data), "pairs": {"dataset_name": str(run / "3_preferences")}}
