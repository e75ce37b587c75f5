"""What the recipes do not check, because TRL or transformers says it in one clear sentence before anything is learned.

If a release stops to say it, its test fails, and the check belongs to `pipeline/training/` again.
"""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import DPOTrainer, KTOTrainer, RewardConfig, RewardTrainer

from pipeline.training.preference_config import DPOConfig, KTOConfig
from tests.helpers import ppo_toy as toy
from tests.helpers.small_model import conversation, save_model, save_tokenizer

QUIET: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
TRAINERS = {DPOConfig: DPOTrainer, KTOConfig: KTOTrainer, RewardConfig: RewardTrainer}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    save_tokenizer(folder)
    return folder


def rows(kind: type) -> Dataset:
    """Return eight pairs or, for KTO, single answers."""
    pairs = []
    for number in range(8):
        question, answer = conversation(f"What is {number}?", f"It is {number}.")
        pair: dict[str, Any] = {"prompt": [question], "chosen": [answer]}
        pair["rejected"] = [{"role": "assistant", "content": "No."}]
        if kind is KTOConfig:
            pair["completion"] = pair.pop("chosen")
            pair["label"] = number % 2 == 0
            del pair["rejected"]
        pairs.append(pair)
    return Dataset.from_list(pairs)


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (DPOConfig, {"loss_type": ["grpo"]}, r"Unknown loss type: grpo\. Should be one of \['sigmoid'"),
        (DPOConfig, {"loss_type": ["sigmoid", "foo"]}, r"Unknown loss type: foo\. Should be one of"),
        (DPOConfig, {"f_divergence_type": "foo"}, "Unknown f_divergence_type: foo"),
        (
            DPOConfig,
            {"f_divergence_type": "forward_kl", "loss_type": ["apo_zero"]},
            "forward_kl.*is only supported for the following loss types",
        ),
        (DPOConfig, {"loss_type": ["exo_pair"]}, "Label smoothing must be greater than 0.0 when using 'exo_pair' loss"),
        (DPOConfig, {"loss_type": ["aot"], "use_weighting": True}, "weighting is not implemented for 'aot'"),
        (DPOConfig, {"train_sampling_strategy": "group_by_length"}, "Can only automatically infer lengths"),
        (RewardConfig, {"train_sampling_strategy": "group_by_length"}, "Can only automatically infer lengths"),
        (KTOConfig, {"per_device_train_batch_size": 1}, "batch size must be > 1"),
        (KTOConfig, {"train_sampling_strategy": "random"}, "requires `train_sampling_strategy='sequential'`"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_a_trainer_of_trl_says_what_it_cannot_do(
    kind: Any, changes: dict[str, Any], sentence: str, model: Path, tmp_path: Path
) -> None:
    args = kind(str(tmp_path), **QUIET | {"per_device_train_batch_size": 2} | changes)
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        TRAINERS[kind](
            model=str(model),
            args=args,
            train_dataset=rows(kind),
            processing_class=AutoTokenizer.from_pretrained(model),
        ).train()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"report_to": "foo"}, "foo is not supported, only .*tensorboard"),
        ({"report_to": "wandb"}, r"requires wandb to be installed\. Run `pip install wandb`"),
        ({"use_liger_kernel": True}, "use_liger_kernel.*liger-kernel.*is not available"),
    ],
    ids=str,
)
def test_transformers_says_what_is_not_installed(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError, ImportError), match=sentence):
        args = TrainingArguments(str(tmp_path), **QUIET | changes)
        Trainer(
            toy.policy(), args, train_dataset=Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]})
        ).train()
