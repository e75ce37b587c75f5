"""The start and the end that every recipe shares."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from pipeline.throughput import ThroughputCallback

if TYPE_CHECKING:
    from pipeline.arguments import DataArguments

logger = logging.getLogger(__name__)


def run_callbacks(args: TrainingArguments) -> list[TrainerCallback]:
    """Callbacks of every recipe's trainer: speed and time left in the logs.

    Args:
        args: The recipe's training arguments.
    """
    length = getattr(args, "block_size", None) or getattr(args, "max_length", None) or 0
    if length and hasattr(args, "assistant_only_loss"):
        args.include_num_input_tokens_seen = "all"
    return [ThroughputCallback(length)]


def train_and_save(trainer: Trainer, data_args: DataArguments | None = None) -> None:
    """Train from where the output directory stands, save the model with its tokenizer and card, and push if asked.

    Args:
        trainer: Any trainer of transformers or TRL.
        data_args: Names the data set on the model card.
    """
    args = trainer.args
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir) if args.output_dir else None)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


def start_logging() -> None:
    """Send the recipes' log lines to stderr, from the first process only."""
    import os

    main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        stream=sys.stderr, format="%(message)s", level=logging.INFO if main else logging.WARNING
    )
