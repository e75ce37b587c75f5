"""Pretraining with transformers' `Trainer`: arguments, compilation, router losses, and bits per byte."""

import logging
import math
import os
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from pipeline import hardware
from pipeline.data.arguments import option
from pipeline.data.packing import IGNORED
from pipeline.data.streams import PackedStream, StreamPlace
from pipeline.models.experts import balancing_loss, routers, training_flops_per_token
from pipeline.models.kernels.attention import choose_attention
from pipeline.training.reliable import Reliable

logger = logging.getLogger(__name__)


@dataclass
class PretrainConfig(TrainingArguments):
    """Arguments of transformers' `Trainer`, and the length of the blocks that documents are packed into."""

    block_size: int = option(512, "Tokens per training sequence, filled completely by packed documents.")
    dataset_num_proc: int | None = option(
        None,
        "Processes that tokenize and pack (default: one, on all cores). Each packs a part of the data, and drops the "
        "rest that does not fill a block.",
    )
    torch_compile: bool | None = option(None, "Compile the model (default: if that shortens the run).")
    attn_implementation: str | None = option(
        None,
        "Attention (default: the fastest that this machine has for packed documents).",
        choices=["eager", "sdpa", "flex_attention"],
    )
    include_num_input_tokens_seen: str | bool = option("all", "Count tokens, for the speed in the logs.")


def adapt_to_machine(args: PretrainConfig, model: PreTrainedModel, train_dataset: object) -> None:
    """Choose the attention of a model, and `args.torch_compile` unless the user has set it; log the reasons.

    Compiling takes a minute or more, and so pays off only in a long run: the sizes of the model and of `train_dataset`
    decide.
    """
    choose_attention(model, args.attn_implementation)
    # Compiling the whole model would take longer, and be done again, because attention blocks differ between batches.
    os.environ.setdefault("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    if args.torch_compile is not None:
        logger.info("torch.compile: %s (requested)", args.torch_compile)
        return
    # The number of sequences that this process will train on.
    sequences = args.train_batch_size * args.gradient_accumulation_steps * args.max_steps
    if args.max_steps <= 0 and isinstance(train_dataset, Sized):
        sequences = int(len(train_dataset) * args.num_train_epochs / args.world_size)
    flops_per_sequence = training_flops_per_token(model, args.block_size) * args.block_size
    choice = hardware.compilation(flops_per_sequence * sequences)
    args.torch_compile = choice.value
    args.torch_compile_backend = "inductor" if choice.value else None
    logger.info("torch.compile: %s (%s)", choice.value, choice.reason)


class PretrainTrainer(Reliable):
    """transformers' `Trainer` for packed documents, stored or streamed, and for models with experts.

    Each process reads its part of a stream in a thread rather than in workers. Checkpoints contain the place in it.

    A model with experts also learns from the load-balancing loss and the z-loss of its routers, each averaged over the
    layers with experts. Evaluations only measure the loss on the text.

    Args:
        *args, **kwargs: Any argument of transformers' `Trainer`.
        router_losses: The weights of the load-balancing loss and of the z-loss. 0 turns one off.
    """

    def __init__(self, *args: Any, router_losses: tuple[float, float] = (0.0, 0.0), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.router_losses = router_losses
        self._routers: list[Any] = []
        if any(router_losses):
            self._routers = routers(self.model)
        if isinstance(self.train_dataset, PackedStream):
            # A stream resumes by itself. transformers would first read and discard all earlier batches.
            self.args.ignore_data_skip = True
            if self.args.dataloader_num_workers and self.is_world_process_zero():
                logger.warning("dataloader_num_workers has no effect on training: a thread reads the stream")
            self.parts.append(StreamPlace(self.train_dataset, self.args))
            self.add_callback(StreamEpoch())

    def get_train_dataloader(self) -> DataLoader:
        """Read a stream directly in this process, and stored blocks as every trainer does."""
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        return DataLoader(
            self.train_dataset,
            self.args.train_batch_size,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
            # The loader must not use training's random generator.
            generator=torch.Generator(),
        )

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the losses of the routers to the loss on the text."""
        if not self._routers or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # One tensor of router logits per layer with experts.
        inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        balance_weight, z_weight = self.router_losses
        rows = len(inputs["input_ids"])
        router_loss: Any = 0
        for router, logits in zip(self._routers, outputs.router_logits, strict=True):
            # The router z-loss (Zoph et al. 2022, "ST-MoE", eq. 5) keeps logits small.
            z_loss = logits.float().logsumexp(-1).square().mean()
            balance_loss = balancing_loss(router, logits, rows)
            router_loss = router_loss + (balance_weight * balance_loss + z_weight * z_loss)
        loss = loss + router_loss / len(self._routers) / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class StreamEpoch(TrainerCallback):
    """Epochs of a stream. transformers would count from the step at which training was resumed."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps


def sequence_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss of each sequence, so that an evaluation does not keep the logits.

    The logits are (batch, length, vocabulary). The labels, (batch, length), are not shifted, and are `IGNORED` for
    tokens without a loss. The losses, (batch,), are summed over tokens, in nats.
    """
    # Row by row, because a float32 copy of all logits would be the largest tensor of the run.
    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), label[1:], ignore_index=IGNORED, reduction="sum")
        for row, label in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses)


def bits_per_byte(tokenizer: PreTrainedTokenizerBase, prediction: EvalPrediction) -> dict[str, float]:
    """Return the bits that the model needs per byte of held-out text.

    Args:
        tokenizer: The model's tokenizer, which makes text of the labels.
        prediction: Its predictions are `sequence_losses`, in nats.
    """
    # The model predicts the next token, so no row's first token.
    predicted = [row[row != IGNORED] for row in np.asarray(prediction.label_ids)[:, 1:]]
    texts = tokenizer.batch_decode(predicted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    size = sum(len(text.encode()) for text in texts)
    return {"bits_per_byte": float(np.sum(prediction.predictions)) / math.log(2) / max(size, 1)}
