"""What pretraining adds to transformers' `Trainer`: its configuration, and bits per byte."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sized
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from pipeline import hardware
from pipeline.training.callbacks import training_flops_per_token

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that no loss is taken of (the convention of torch's cross entropy)."""


@dataclass
class PretrainConfig(TrainingArguments):
    """Arguments of pretraining: transformers' own, and how documents become blocks."""

    block_size: int = field(
        default=512,
        metadata={"help": "Tokens of a training sequence, which packed documents fill to the last one."},
    )
    torch_compile: bool | None = field(
        default=None,
        metadata={"help": "Compile the model; if not given, where that pays for a run of this length."},
    )
    include_num_input_tokens_seen: str | bool = field(
        default="all", metadata={"help": "Count tokens, for the speed in the logs."}
    )


def compile_if_it_pays(args: PretrainConfig, model: PreTrainedModel, train_dataset: object) -> None:
    """Decide `args.torch_compile`, if the user did not, from the machine and the length of the run; log why.

    Args:
        args: Changed in place.
        model: Tells the cost of a token.
        train_dataset: Blocks; if it has no length, `args.max_steps` tells the length of the run.
    """
    if args.torch_compile is not None:
        logger.info("torch.compile: %s (asked for)", args.torch_compile)
        return
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.max_steps
    if args.max_steps <= 0 and isinstance(train_dataset, Sized):
        sequences = int(len(train_dataset) * args.num_train_epochs / args.world_size)
    flops = training_flops_per_token(model, args.block_size) * args.block_size * sequences
    choice = hardware.compilation(flops)
    args.torch_compile = choice.value
    args.torch_compile_backend = "inductor" if choice.value else None
    logger.info("torch.compile: %s (%s)", choice.value, choice.reason)


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each sequence, so that an evaluation need not keep the logits.

    Args:
        logits: `(batch, length, vocabulary)`.
        labels: `(batch, length)`, not shifted; `IGNORED` where no loss is taken.

    Returns:
        `(batch,)`, summed over tokens, in nats.
    """
    losses = [
        torch.nn.functional.cross_entropy(
            row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="sum"
        )  # row by row: a copy of all logits in float32 would be the largest tensor of the run
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses)


def bits_per_byte(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make the metric of held-out text: what the model needs to encode it, whatever the tokenizer.

    Args:
        tokenizer: Tells the bytes of a token.

    Returns:
        A `compute_metrics` for a trainer whose `preprocess_logits_for_metrics` is `sequence_losses`.
    """

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        predicted = np.asarray(prediction.label_ids)[:, 1:]
        texts = tokenizer.batch_decode(
            [row[row != IGNORED] for row in predicted],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        size = sum(len(text.encode()) for text in texts)
        return {"bits_per_byte": float(np.sum(prediction.predictions)) / math.log(2) / max(size, 1)}

    return compute
