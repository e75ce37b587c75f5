"""What model cards say about each kind of stage, and how its model is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GENERAL = "It was measured only as shown here, and not for safety: test it yourself before people use it."


@dataclass(frozen=True)
class StageText:
    """A kind of stage.

    Attributes:
        title: What it is called.
        summary: What its model is, in one or two sentences.
        how: How it is trained.
        limit: What its model cannot do.
        tags: Tags of its repository.
    """

    title: str
    summary: str
    how: str
    limit: str
    tags: tuple[str, ...] = ()


STAGES = {
    "random": StageText(
        "random weights",
        "A model that has learned nothing yet. It is what pretraining starts from, and what the other stages of the "
        "run are compared with.",
        "It was not: these are the random weights that pretraining starts from.",
        "It writes gibberish.",
    ),
    "pretrain": StageText(
        "pretraining",
        "A base model, which continues text. It has not been tuned to follow instructions.",
        "By predicting the next token of documents, with `transformers.Trainer`.",
        "It continues a text and does not answer; for answers, take a later stage.",
    ),
    "sft": StageText(
        "instruction tuning",
        "A chat model, which answers questions and follows instructions.",
        "By predicting the answers of example conversations, with `trl.SFTTrainer`.",
        "It imitates the answers that it was shown, with their mistakes, and states what it does not know as "
        "confidently as what it does.",
        ("trl", "sft"),
    ),
    "reward": StageText(
        "reward model",
        "A model that scores answers: the higher the score, the more the annotators would like the answer. It does not "
        "write text.",
        "On pairs of answers of which one was preferred, with `trl.RewardTrainer`.",
        "Its scores compare answers to the same prompt; across prompts, and for answers unlike those that it was "
        "trained on, they mean little. A policy that is trained against it for long finds its blind spots.",
        ("trl", "reward-trainer"),
    ),
    "ppo": StageText(
        "preference tuning",
        "A chat model that was tuned to answer as people prefer.",
        "By PPO against a reward model, with a critic, on TRL's `GRPOTrainer`.",
        "It was tuned to please a reward model, which is not the same as being right.",
        ("trl", "ppo", "rlhf"),
    ),
    "grpo": StageText(
        "reasoning",
        "A chat model that was tuned to reason its way to right answers.",
        "By GRPO, with rewards for right final answers, with `trl.GRPOTrainer`.",
        "It was rewarded for its final answer: the steps before it may be wrong where the answer is right.",
        ("trl", "grpo", "reasoning"),
    ),
}


def registration(config: Mapping[str, Any]) -> str:
    """Return the import that loads a classifier of a class that transformers does not have, "" for any other model."""
    import transformers

    known = dir(transformers)
    own = [name for name in config.get("architectures") or () if name not in known]
    return f"import pipeline.models  # of Fourstage, which has {own[0]}\n" if own else ""


def uses(kind: str, name: str, adapter: bool, prompt: str, imports: str = "") -> list[tuple[str, str, str]]:
    """Return (text, language, code) for each way to use a model.

    Args:
        kind: Kind of the stage.
        name: Id of the repository, or a folder.
        adapter: Whether it is an adapter, which is loaded with its base model.
        prompt: A prompt that the model knows how to answer.
        imports: What a reward model needs, of `registration`.
    """
    prompt = json.dumps(prompt, ensure_ascii=False)
    if kind == "reward":
        model_class = "AutoModelForSequenceClassification"
        code = f"""\
{imports}import torch
from transformers import {model_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {model_class}.from_pretrained("{name}", num_labels=1)
messages = [{{"role": "user", "content": {prompt}}}, {{"role": "assistant", "content": "I do not know."}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
with torch.no_grad():
    print(model(**inputs).logits.item())"""
        return [("The score of an answer:", "python", code)]
    if kind in ("random", "pretrain"):
        code = f"""\
from transformers import pipeline

generator = pipeline("text-generation", model="{name}")
print(generator({prompt}, max_new_tokens=64, do_sample=False)[0]["generated_text"])"""
        return [("It continues a text:", "python", code)]
    code = f"""\
from transformers import pipeline

chat = pipeline("text-generation", model="{name}")
messages = [{{"role": "user", "content": {prompt}}}]
print(chat(messages, max_new_tokens=256, do_sample=False, return_full_text=False)[0]["generated_text"])"""
    if adapter:
        return [("With transformers and PEFT, which load the adapter with its base model:", "python", code)]
    serve = f"vllm serve {name}\nvllm chat --url http://localhost:8000/v1"
    return [("With transformers:", "python", code), ("As a server, with vLLM:", "bash", serve)]
