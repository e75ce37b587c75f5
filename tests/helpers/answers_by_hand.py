"""What DPO and KTO compare, from plain forward passes: the log-probability of an answer."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.helpers.small_model import save_tokenizer, tokenizer


def adapted(folder: Path) -> None:
    """Save an adapter of the small model whose weights are not zero."""
    torch.manual_seed(1)
    targets = ["q_proj", "down_proj"]
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, lora_alpha=64, target_modules=targets)
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), lora).save_pretrained(folder / "adapter")
    save_tokenizer(folder / "adapter")


def log_prob(model: Any, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> torch.Tensor:
    """Return the log-probability of an answer, its end included, without a batch and without padding."""
    words = tokenizer()
    start = len(words.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
    ids = torch.tensor([words.apply_chat_template(prompt + answer, return_dict=False)])
    log_probs = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    return log_probs[0, start - 1 :].sum()


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
