"""Tokens of conversations, pairs and prompts, a thousand rows at a time; TRL's trainers would encode one at a time.

Who tokenizes the rows of a stage, and when:

    rows           stage           stored                         stream
    text           pretraining     `streams.pack_splits`          the same, during training
    conversation   SFT             `add_tokens`                   TRL during training; `add_tokens` if only answers are
                                                                  labels and the chat template does not mark them
    preference     reward model    `add_tokens`                   TRL, during training
    preference     DPO             TRL, before training           TRL, during training
    unpaired       KTO             TRL, before training           TRL, during training
    prompt         PPO and GRPO    TRL, in each rollout           the same

All rows are counted here before that, to drop and report those that are too long; of a stream, only the first rows.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from pipeline.data.columns import TOKENS, Kind, Split, column_names
from pipeline.data.messages import Messages
from pipeline.data.packing import IGNORED
from pipeline.errors import Problem, UserError
from pipeline.progress import report_lost

ANSWER_COLUMNS = {"chosen", "rejected", "completion"}
"""Columns with answers to a prompt."""


def drop_long_prompts(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    positions: int | None,
    template: Mapping[str, Any] | None = None,
    tool_tokens: int = 0,
) -> Split:
    """Drop prompts that leave no room for an answer of `length` tokens, and report how many.

    Args:
        length: Maximum number of tokens of an answer, which the field `max_completion_length` sets.
        positions: The model's `max_position_embeddings`. If it is None, no prompt is dropped.
        template: Further arguments of the chat template (`chat_template_kwargs`).
        tool_tokens: Number of tokens that tools add to a prompt.

    Raises:
        UserError: If no prompt leaves room or, in a stream, none of the first 100 does.
        ValueError: If the chat template makes no tokens from a prompt.
    """

    def count_tokens(prompts: list[Any]) -> list[int]:
        encoded = _encode(tokenizer, prompts, add_generation_prompt=True, **(template or {}))
        return [len(ids) for ids in encoded["input_ids"]]

    # Only the first prompts are counted here, because those of a stream may have to be downloaded.
    first_sizes = count_tokens([row["prompt"] for row in split.take(100)])
    if min(first_sizes) == 0:
        raise ValueError("it makes no tokens from a prompt")
    if positions is None:
        return split

    # Maximum number of tokens of a prompt.
    room = positions - length - tool_tokens
    fitting = split.filter(
        lambda prompts: [size <= room for size in count_tokens(prompts)], batched=True, input_columns="prompt"
    )
    # The length of a filtered stream is unknown.
    is_empty = len(fitting) == 0 if isinstance(fitting, Dataset) else min(first_sizes) > room
    if is_empty:
        remedy = f"every prompt takes more than the {max(0, room)} tokens that it leaves of the model's context of "
        remedy += f"{positions} (max_position_embeddings); lower it or shorten prompts"
        raise UserError(Problem("max_completion_length", length, remedy))
    advice = "lower max_completion_length, or shorten them"
    if isinstance(split, Dataset):
        lost = len(split) - len(fitting)
        if lost:
            what = f"prompts have more than {room} tokens, which leaves no room for an answer, and are dropped"
            report_lost(lost, len(split), what, advice)
    else:
        lost = sum(size > room for size in first_sizes)
        if lost:
            what = f"checked prompts have more than {room} tokens, which leaves no room for an answer; such are dropped"
            report_lost(lost, len(first_sizes), what, advice)
    return fitting


def drop_long_pairs(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int, prefix: str = "") -> Split:
    """Drop rows with an answer that has more than `max_length` tokens together with its prompt; report their number.

    Nothing is reported for a stream. Raise a `UserError` if no row is left.

    Args:
        split: Rows with a prompt and a pair of answers, or a single answer.
        prefix: What the report puts before the word "pairs" or "answers", such as "evaluation ".
    """
    answers = sorted(ANSWER_COLUMNS.intersection(column_names(split)))
    columns = ["prompt", *answers]

    def count_tokens(prompts: list[Any], *answers: list[Any]) -> list[int]:
        """Return the number of tokens of each prompt with its longest answer."""
        sizes_by_column = []
        for column in answers:
            conversations = [prompt + answer for prompt, answer in zip(prompts, column, strict=True)]
            sizes_by_column.append([len(ids) for ids in _encode(tokenizer, conversations)["input_ids"]])
        return [max(sizes) for sizes in zip(*sizes_by_column, strict=True)]

    if not isinstance(split, Dataset):
        return split.filter(
            lambda *batch: [size <= max_length for size in count_tokens(*batch)], input_columns=columns, batched=True
        )
    lengths: list[int] = []
    for batch in split.select_columns(columns).iter(1000):
        lengths += count_tokens(*(batch[column] for column in columns))
    what = "pairs" if "chosen" in answers else "answers"
    report_long_pairs(lengths, max_length, f"{prefix}{what}")
    if max(lengths) <= max_length:
        return split
    return split.select([row for row, length in enumerate(lengths) if length <= max_length])


def pair_lengths(pairs: Dataset) -> list[int]:
    """Return the number of tokens of the longer side of each pair that `add_tokens` has encoded."""
    lengths: list[int] = []
    for batch in pairs.select_columns(["chosen_ids", "rejected_ids"]).iter(1000):
        for chosen, rejected in zip(batch["chosen_ids"], batch["rejected_ids"], strict=True):
            lengths.append(max(len(chosen), len(rejected)))
    return lengths


def report_long_pairs(lengths: Sequence[int], max_length: int, what: str) -> None:
    """Report how many of the rows with these `lengths` are too long, and so dropped; `what` names them.

    Raise a `UserError` if all of them are.
    """
    if min(lengths) > max_length:
        remedy = f"every pair is longer ({min(lengths)} tokens at least) and would be dropped; raise it"
        raise UserError(Problem("max_length", max_length, remedy))
    too_long = sum(length > max_length for length in lengths)
    if too_long:
        limit = f"max_length {max_length} (up to {max(lengths)} tokens)"
        report_lost(too_long, len(lengths), f"{what} are longer than {limit} and are dropped", "raise it")


def log_truncated(dataset: Split, args: SFTConfig) -> None:
    """Log how many tokenized conversations exceed `max_length`, and so lose their end (their beginning, by `keep_end`).

    Also log in how many the prompt alone fills `max_length`. Nothing is logged for a stream, whose rows are tokenized
    later, or if packing continues a long conversation in the next sequence.
    """
    if not isinstance(dataset, Dataset) or TOKENS not in dataset.column_names or args.max_length is None:
        return
    if args.packing and args.packing_strategy != "bfd":
        return
    lengths: list[int] = []
    for batch in dataset.select_columns(TOKENS).iter(1000):
        lengths += [len(ids) for ids in batch[TOKENS]]
    lost_part = "beginning" if args.truncation_mode == "keep_end" and not args.packing else "end"
    truncated = sum(length > args.max_length for length in lengths)
    if truncated:
        what = f"conversations are longer than max_length {args.max_length} (up to {max(lengths)} tokens) and lose "
        remedy = "raise it, or the model does not learn to stop after long answers"
        report_lost(truncated, len(lengths), f"{what}their {lost_part}", remedy)
    # A prompt alone may fill the sequence. With `keep_end`, it is the prompt that is cut off.
    if "labels" not in dataset.column_names or lost_part == "beginning":
        return
    unlabelled = 0
    for batch in dataset.select_columns("labels").iter(1000):
        for labels in batch["labels"]:
            if all(label == IGNORED for label in labels[: args.max_length]):
                unlabelled += 1
    if unlabelled:
        what = f"conversations have a prompt that fills max_length {args.max_length}, "
        what += "so that nothing is learned from them"
        report_lost(unlabelled, len(lengths), what, "raise it, or shorten the prompts")


def template_for_labels(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template with `{% generation %}` around answers: the tokenizer's, or TRL's. None if neither has.

    Without one, `add_tokens` finds the answers by prefixes of conversations.
    """
    template = tokenizer.get_chat_template()
    if has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError:
        return None


def add_tokens(
    split: Split,
    kind: Kind,
    tokenizer: PreTrainedTokenizerBase,
    answers_only: bool = False,
    num_proc: int | None = None,
) -> Split:
    """Add the columns that TRL's trainers would otherwise make from conversations and pairs; streams are left to them.

    A stream gets them here only if just the answers are labels and TRL cannot find them: see `template_for_labels`.
    tests/data/test_tokenized.py compares the columns with TRL's.

    Args:
        kind: "conversation" adds `input_ids` and `labels`; "preference" adds `chosen_ids` and `rejected_ids`. Rows of
            another kind are returned as they are.
        answers_only: Whether only the assistant's tokens are labels of a conversation. The others get `IGNORED`.
        num_proc: Number of processes, unless the split is a stream. Default: this one.

    Raises:
        UserError: If the assistant's tokens cannot be found.
    """
    template = None
    if answers_only:
        template = template_for_labels(tokenizer)
    has_tools = kind == "conversation" and "tools" in column_names(split)

    def encode_pairs(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        columns = {}
        for side in ("chosen", "rejected"):
            conversations = [prompt + answer for prompt, answer in zip(batch["prompt"], batch[side], strict=True)]
            columns[f"{side}_ids"] = _encode(tokenizer, conversations)["input_ids"]
        return columns

    def encode_conversations(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        options: dict[str, Any] = {}
        if has_tools:
            # The batch is a single row. In a stream, the rows of a data set without tools lack the column.
            schemas = batch.get("tools", [None])[0]
            options["tools"] = json.loads(schemas or "null")
        if not answers_only:
            ids = _encode(tokenizer, batch["messages"], **options)["input_ids"]
            return {"input_ids": ids, "labels": ids}
        if template is None:
            return _label_by_prefixes(batch["messages"], tokenizer, **options)
        return _label_by_marks(batch["messages"], tokenizer, template, **options)

    if isinstance(split, Dataset) and kind == "preference":
        return split.map(encode_pairs, batched=True, batch_size=1000, num_proc=num_proc)
    if kind != "conversation":
        return split
    trl_finds_labels = not answers_only or template is not None
    if not isinstance(split, Dataset) and trl_finds_labels:
        return split
    # Each row has its own tools, and a template takes the tools of a single conversation.
    size = 1 if has_tools else 1000
    if isinstance(split, Dataset):
        return split.map(encode_conversations, batched=True, batch_size=size, num_proc=num_proc)
    return split.map(encode_conversations, batched=True, batch_size=size)


def _encode(tokenizer: PreTrainedTokenizerBase, conversations: list[Any], **options: Any) -> dict[str, list[list[int]]]:
    """Return the columns, such as `input_ids`, that the chat template makes of conversations; see transformers."""
    return tokenizer.apply_chat_template(conversations, tokenize=True, return_dict=True, **options)


def _label_by_marks(
    rows: list[Messages], tokenizer: PreTrainedTokenizerBase, template: str, **options: Any
) -> dict[str, Any]:
    """Return tokens and labels of conversations under a chat template that marks what the assistant says."""
    encoded = _encode(tokenizer, rows, chat_template=template, return_assistant_tokens_mask=True, **options)
    labels = []
    for ids, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True):
        if not any(mask):
            remedy = "the chat template does not mark any token of a conversation as the assistant's"
            raise UserError(Problem("assistant_only_loss", True, f"{remedy}; correct {{% generation %}}"))
        labels.append([token if is_answer else IGNORED for token, is_answer in zip(ids, mask, strict=True)])
    return {"input_ids": encoded["input_ids"], "labels": labels}


def _label_by_prefixes(rows: list[Messages], tokenizer: PreTrainedTokenizerBase, **options: Any) -> dict[str, Any]:
    """Return tokens and labels of conversations under a chat template without marks around what the assistant says."""
    # An answer begins where the turns before it end, followed by the generation prompt, and ends with the eos token:
    #
    #   conversation        <user> 2 + 3? <end> <assistant> 5 <eos> <user> Thanks. <end> <assistant> Bye. <eos>
    #   prompt of answer 1  <user> 2 + 3? <end> <assistant>
    #   answer 1                                            5 <eos>
    #
    # For each answer: the number of its row, and the conversation up to the end of the answer.
    row_numbers: list[int] = []
    conversations: list[Messages] = []
    for number, messages in enumerate(rows):
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                row_numbers.append(number)
                conversations.append(messages[: index + 1])
    prompts = [messages[:-1] for messages in conversations]
    ids = _encode(tokenizer, rows, **options)["input_ids"]
    conversation_ids = _encode(tokenizer, conversations, **options)["input_ids"]
    prompt_ids = _encode(tokenizer, prompts, add_generation_prompt=True, **options)["input_ids"]
    labels = [[IGNORED] * len(row) for row in ids]
    for number, prompt, whole in zip(row_numbers, prompt_ids, conversation_ids, strict=True):
        begin = len(prompt)
        answer = whole[begin:]
        is_prefix = ids[number][: len(whole)] == whole and whole[:begin] == prompt
        if not is_prefix or tokenizer.eos_token_id not in answer:
            remedy = "the answers cannot be found by the chat template, which neither marks them with {% generation %} "
            remedy += f"nor ends each with the eos token ({tokenizer.eos_token}) without a change to the turns before; "
            remedy += "give a template that does (chat_template_path), or the right eos_token"
            raise UserError(Problem("assistant_only_loss", True, remedy))
        # Up to the last eos token: what the template writes after it, such as a line break, does not get a label.
        end = len(whole) - answer[::-1].index(tokenizer.eos_token_id)
        labels[number][begin:end] = whole[begin:end]
    return {"input_ids": ids, "labels": labels}
