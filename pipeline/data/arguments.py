"""The arguments that say which data set a stage reads."""

from dataclasses import dataclass, field
from typing import Any, Literal

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
"""Splits of the generated data sets. No prompt occurs in two of them."""
PROMPTS = ("prompt", "question", "instruction", "problem", "query", "q", "input")
"""Usual names of a column of prompts, the most usual first; case and surrounding spaces do not matter."""
ANSWERS = ("completion", "response", "output", "solution", "answer", "a")
"""Usual names of a column of answers."""
CONTEXTS = ("input", "context")
"""Columns of Alpaca and Dolly that belong to the prompt, after the instruction."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Usual names of a column of conversations."""
DIVISION = "by row number"
"""How `pipeline.data.splits.is_held_out` divides a single split. Earlier releases numbered the rows after `keep_rows`,
and pairs after those that say nothing had been dropped; their steps do not record it."""


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return an argument field with its help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataArguments:
    """Which data set a stage reads, and what its columns mean."""

    # In this order, transformers' parser takes it for a list, which may also be given as one name.
    dataset_name: list[str] | None | str = option(  # noqa: RUF009, RUF036
        None,
        "Id on the Hugging Face Hub, also NAME/repo@revision, or a local file or folder: a data set repository, files "
        "of Parquet, JSONL, JSON, CSV, TSV or text (.txt, .md), optionally compressed (.gz), or shards of "
        "recipes.shards. Files of a folder are joined, also of several types; README.md, LICENSE and hidden files are "
        "not read. Several data sets are joined, split by split.",
    )
    dataset_config: str | None = option(None, "Configuration of the data set.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("validation", "Split to evaluate on during training; else `test`, if that exists.")
    dataset_streaming: bool = option(False, "Read the data during training, in constant memory.")
    validation_share: float = option(
        0.05, "Share of the rows held out for evaluation if the data set has a single split: every 20th row for 0.05."
    )
    keep_rows: list[str] | None = option(  # noqa: RUF009
        None, "Keep only rows whose column has one of these values, such as source=gsm8k source=math, ignoring case."
    )
    drop_bad_rows: bool = option(False, "Drop rows that lack a text or a turn instead of refusing the data.")
    document: str | None = option(
        None,
        "What a document of a text file is: file, blank_line (each paragraph) or lines:64 (64 lines each). Default: a "
        "file; one of more than 4,096 characters, or a single one, is cut at blank lines or line ends.",
    )
    max_train_samples: int | None = option(None, "Train on this many rows, the first ones.")
    max_eval_samples: int | None = option(None, "Evaluate on this many rows, the first ones.")
    text_column: str = option("text", "Column of the documents (pretraining).")
    messages_column: str = option(
        "messages", "Column of the conversations: lists of {role, content}, or of ShareGPT's {from, value}."
    )
    prompt_column: str = option(
        "prompt",
        "Column of the prompts: a list of {role, content}, or a question, to which the columns `input` and `context` "
        "are added. Usual names such as question and instruction are found, whatever their case.",
    )
    completion_column: str | None = option(
        None, "Column of the answers to `prompt_column`, for data without conversations. Usual names are found."
    )
    chosen_column: str = option("chosen", "Column of the better answer of a pair.")
    rejected_column: str = option("rejected", "Column of the worse answer of a pair.")
    answer_column: str = option("answer", "Column of the reference answers for rewards.")
    answer_pattern: str | None = option(
        None,
        "Regular expression that finds the final answer in `answer_column` (its first group, if it has one). Default: "
        "what follows GSM8K's `#### ` mark if there is one, otherwise the whole answer.",
    )
    system_prompt: str | None = option(None, "System message for conversations and prompts that do not have one.")
    tokenizer_name_or_path: str | None = option(None, "Tokenizer (default: the one of `model_name_or_path`).")

    def __post_init__(self) -> None:
        if self.dataset_name == []:
            self.dataset_name = None
        elif isinstance(self.dataset_name, list) and len(self.dataset_name) == 1:
            self.dataset_name = self.dataset_name[0]

    @property
    def dataset_names(self) -> list[str]:
        """The data sets, in order; [""] if none is named."""
        if isinstance(self.dataset_name, list):
            return self.dataset_name
        return [self.dataset_name or ""]
