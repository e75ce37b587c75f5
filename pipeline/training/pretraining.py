"""Pretraining with transformers' `Trainer`: its arguments, compilation, router losses, and bits per byte."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from pipeline import hardware
from pipeline.models.attention import choose_attention
from pipeline.models.experts import balancing_loss, routers, z_loss
from pipeline.models.llama4 import ScratchArguments
from pipeline.training.callbacks import training_flops_per_token

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that the loss ignores, by the convention of torch's cross entropy."""


@dataclass
class PretrainConfig(TrainingArguments):
    """Arguments of transformers' `Trainer`, and the length of the blocks that documents are packed into."""

    block_size: int = field(
        default=512, metadata={"help": "Tokens per training sequence, filled completely by packed documents."}
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={
            "help": "Processes that tokenize and pack (default: one, whose tokenizer uses all cores). Each packs a "
            "part of the data, whose end it leaves out if it does not fill a block."
        },
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "Compile the model (default: if that makes a run of this length shorter)."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention (default: the fastest that this machine has for packed documents).",
            "choices": ["eager", "sdpa", "flex_attention"],
        },
    )
    include_num_input_tokens_seen: str | bool = field(
        default="all", metadata={"help": "Count tokens, for the speed in the logs."}
    )


def adapt_to_machine(args: PretrainConfig, model: PreTrainedModel, train_dataset: object) -> None:
    """Choose the attention, and `args.torch_compile` unless the user has set it; log the reasons.

    Args:
        args: Changed in place.
        model: Changed in place.
        train_dataset: Its length is that of the run if `args.max_steps` is not given.
    """
    choose_attention(model, args.attn_implementation)
    # A layer is compiled once for all layers, in less time than the model as a whole, which would be compiled again
    # because the blocks of attention differ from batch to batch.
    os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    if args.torch_compile is not None:
        logger.info("torch.compile: %s (requested)", args.torch_compile)
        return
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.max_steps
    if args.max_steps <= 0 and isinstance(train_dataset, Sized):
        sequences = int(len(train_dataset) * args.num_train_epochs / args.world_size)
    flops = training_flops_per_token(model, args.block_size) * args.block_size * sequences
    choice = hardware.compilation(flops)
    args.torch_compile = choice.value
    args.torch_compile_backend = "inductor" if choice.value else None
    logger.info("torch.compile: %s (%s)", choice.value, choice.reason)


def add_router_losses(trainer: Trainer, model_args: ScratchArguments) -> None:
    """Add the load-balancing loss and the z-loss to a trainer's loss, each the mean over the layers with experts.

    The model returns the logits of its routers, and computes neither. An evaluation measures the loss of the text
    alone.

    Args:
        trainer: Changed in place, before `train`; left alone if its model is dense.
        model_args: `router_aux_loss_coef` and `router_z_loss_coef`; if both are 0, nothing changes either.
    """
    gates = routers(trainer.model)
    balance, size = model_args.router_aux_loss_coef or 0.0, model_args.router_z_loss_coef or 0.0
    if not gates or not (balance or size):
        return
    compute_loss = trainer.compute_loss

    def compute_all(model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        if not model.training:
            return compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, outputs = compute_loss(model, {**inputs, "output_router_logits": True}, return_outputs=True, **kwargs)
        layers, rows = zip(gates, outputs.router_logits, strict=True), len(inputs["input_ids"])
        added = sum(balance * balancing_loss(gate, logits, rows) + size * z_loss(logits) for gate, logits in layers)
        loss = loss + added / len(gates) / trainer.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_all


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each sequence, so that an evaluation does not keep the logits.

    Args:
        logits: Logits of shape (batch, length, vocabulary).
        labels: Labels of shape (batch, length), not shifted; `IGNORED` for tokens without a loss.

    Returns:
        Losses of shape (batch,), summed over tokens, in nats.
    """
    losses = [
        torch.nn.functional.cross_entropy(
            row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="sum"
        )  # row by row, because a copy of all logits in float32 would be the largest tensor of the run
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses)


def bits_per_byte(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a metric of held-out text: the bits that the model needs to encode a byte, whatever the tokenizer.

    It is a `compute_metrics` function for a trainer whose `preprocess_logits_for_metrics` is `sequence_losses`.
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
