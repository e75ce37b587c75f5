"""A test to paste into TRL's `tests/test_grpo_trainer.py`: advantages of one number per token, (B, T).

`GRPOTrainer._compute_loss` accepts them "to support subclasses", and no test of TRL does. PPO rests on them here. This
uses nothing of this project; `pytest tests/upstream/advantages.py` runs it alone.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer


class PerTokenTrainer(GRPOTrainer):
    """Gives each token its own advantage."""

    advantages_of: Any

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        batch["advantages"] = self.advantages_of(batch)
        return batch


def trained(folder: Path, advantages_of: Any, loss_type: str) -> tuple[torch.Tensor, float]:
    words = Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1, "a": 2, "b": 3, "c": 4}, unk_token="[PAD]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=5, pad_token_id=0, eos_token_id=1, **sizes))
    args = GRPOConfig(
        str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=1,
        learning_rate=0.1,
        loss_type=loss_type,
        report_to="none",
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
    )
    trainer = PerTokenTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a b", "c"] * 4}),
        processing_class=tokenizer,
    )
    trainer.advantages_of = advantages_of
    trainer.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    return weights, trainer.state.log_history[0]["loss"]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_advantages_may_have_one_number_per_token(loss_type: str, tmp_path: Path) -> None:
    def per_completion(batch: dict[str, Any]) -> torch.Tensor:
        return batch["advantages"]

    def repeated(batch: dict[str, Any]) -> torch.Tensor:
        return batch["advantages"].unsqueeze(1).expand_as(batch["completion_ids"]).clone()

    def last_token_alone(batch: dict[str, Any]) -> torch.Tensor:
        ends = batch["completion_mask"].sum(1, keepdim=True) - 1
        return torch.zeros(batch["completion_ids"].shape).scatter(1, ends, 1.0)

    expected, _ = trained(tmp_path, per_completion, loss_type)
    same, _ = trained(tmp_path, repeated, loss_type)
    torch.testing.assert_close(same, expected)
    other, loss = trained(tmp_path, last_token_alone, loss_type)
    assert not torch.allclose(other, expected)
    assert loss < 0, "minus the mean of advantages that are 0 or 1, where the ratio is 1"
