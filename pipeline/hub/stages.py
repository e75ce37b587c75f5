"""How the model of a stage is used, as model cards say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.stages import STAGES, StageKind

GENERAL = "It was measured only as shown here, and not for safety: test it yourself before people use it."


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
    stage = STAGES.get(kind, StageKind())
    if not stage.generates:
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
    if not stage.chats:
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
