"""The arguments that say which data set a stage reads."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataArguments:
    """Which data set a stage reads, and what its columns mean."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Id on the Hugging Face Hub, or a local file or folder: a data set repository, "
            "parquet, JSONL, "
            "JSON, CSV or text, also compressed (.gz)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="validation", metadata={"help": "Split to evaluate on meanwhile."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the data while training, in constant memory."}
    )
    validation_share: float = field(
        default=0.05,
        metadata={
            "help": "Share of the rows held out for evaluation if the data set has one split only (a "
            "plain file, "
            "say): every 20th row for 0.05."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first rows to train."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only the first rows to evaluate."})
    text_column: str = field(default="text", metadata={"help": "Column of the documents (pretraining)."})
    messages_column: str = field(
        default="messages", metadata={"help": "Column of the conversations: a list of {role, content}."}
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column of the prompts: a list of {role, content}, or a question."},
    )
    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column of the answers to `prompt_column`, if there are no conversations to tune on."},
    )
    answer_column: str = field(
        default="answer",
        metadata={"help": "Column of the right answer to a prompt, which rewards compare with."},
    )
    answer_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression that finds the final answer inside `answer_column` (its first "
            "group, if it "
            "has one). Without it an answer with GSM8K's `#### ` mark is cut there, and any other is "
            "taken whole."
        },
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": "System message put before conversations and prompts that have none."}
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer; that of `model_name_or_path` if not given."}
    )
