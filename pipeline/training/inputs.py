"""Load a stage's data and tokenizer, and report everything that is wrong with them together."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, RewardConfig, unpair_preference_dataset
from trl.chat_template_utils import supports_tool_calling

from pipeline.config.named_code import user_code
from pipeline.data.arguments import DataArguments
from pipeline.data.columns import TOKENS, Kind, Split, column_names
from pipeline.data.packing import Encoder
from pipeline.data.shards import check_tokenizers, is_shards
from pipeline.data.splits import has_calls, load_splits
from pipeline.data.tokenized import (
    ANSWER_COLUMNS,
    add_tokens,
    drop_long_pairs,
    drop_long_prompts,
    pair_lengths,
    report_long_pairs,
    template_for_labels,
)
from pipeline.errors import LIBRARY_ERRORS, Problem, UserError, collect, refuse
from pipeline.files import as_list, is_missing_path
from pipeline.launch import once_per_node
from pipeline.models import loading
from pipeline.models.checks import TEMPLATE_ARGUMENTS, check_lengths, check_model, check_tokenizer
from pipeline.models.scratch import ScratchArguments, build_empty
from pipeline.models.tokenizer import special_tokens, validate_tokenizer
from pipeline.progress import report_progress
from pipeline.stages import STAGES
from pipeline.tools.loading import ToolArguments, load_toolbox
from pipeline.training import checks

CHECKED_ROWS = 1000
"""Rows of which the tokens are counted before training. Counting all of a large data set takes minutes."""
CHECKED_ROWS_OF_STREAM = 100
"""The same for a stream, which is read over the network, and for what tools add to prompts."""


def load_inputs(
    kind: Kind,
    data_args: DataArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig | ScratchArguments,
    reward_args: ToolArguments | None = None,
) -> tuple[PreTrainedTokenizerBase, Split, Split | None]:
    """Load a stage's tokenizer and data, and check them together with the model's configuration and the arguments.

    Each part is loaded even if an earlier one could not be, so that one error lists everything that is wrong.

    Args:
        kind: Content of the data, as for `load_splits`.
        data_args: Names of the data sets, and of the tokenizer if it is not the model's.
        training_args: They say whether an evaluation split is needed.
        model_args: The model to load, or the sizes of a new one.
        reward_args: The rewards and tools, if any: one of the dataclasses of `pipeline.rl.arguments`.

    Returns:
        The tokenizer, the training split, and the evaluation split or None. They have the columns of `load_splits` and
        those that `add_tokens` adds.

    Raises:
        UserError: With everything that is wrong.
    """
    inputs = _Inputs(kind, data_args, training_args, model_args, reward_args)
    inputs.load_model()
    inputs.load_data()
    inputs.check()
    inputs.fit()
    return inputs.encode()


class _Inputs:
    """The inputs of a stage while they are loaded: a method for each step of `load_inputs`, in this order.

    Attributes:
        config: Configuration of the model; None if it has not been loaded, also because the model is a new one.
        tokenizer: None if it could not be loaded, or cannot encode the data.
        splits: The training split, and the evaluation split or None; None if they could not be loaded.
        problems: Everything that is wrong, which says why a part is None.
    """

    def __init__(
        self,
        kind: Kind,
        data_args: DataArguments,
        training_args: TrainingArguments,
        model_args: ModelConfig | ScratchArguments,
        reward_args: ToolArguments | None,
    ) -> None:
        self.kind = kind
        self.data_args = data_args
        self.training_args = training_args
        self.model_args = model_args
        self.reward_args = reward_args
        self.config: Any = None
        self.tokenizer: Any = None
        self.splits: tuple[Split, Split | None] | None = None
        self.problems: list[Problem] = []
        # The field that names the tokenizer, and its value.
        self.tokenizer_field = "tokenizer_name_or_path"
        self.tokenizer_name = data_args.tokenizer_name_or_path
        if not self.tokenizer_name and isinstance(model_args, ModelConfig) and model_args.model_name_or_path:
            self.tokenizer_field = "model_name_or_path"
            self.tokenizer_name = model_args.model_name_or_path

    def load_model(self) -> None:
        """Load the configuration of the model, unless it is a new one, and the tokenizer."""
        model = self.model_args if isinstance(self.model_args, ModelConfig) else None
        names = [self.tokenizer_name, *self.data_args.dataset_names]
        names += as_list(getattr(self.reward_args, "reward_model_path", None))
        names.append(getattr(self.reward_args, "value_model_path", None))
        if model is not None:
            names.append(model.model_name_or_path)
        # The Hub is needed for any name that is not a path.
        if not all(os.path.exists(name) or is_missing_path(name) for name in names if name):
            loading.skip_unreachable_hub()

        revision = None
        if model is not None:
            with collect(self.problems):
                self.config = loading.load_base_config(model.model_name_or_path, model.model_revision)
            if self.data_args.tokenizer_name_or_path is None and self.config is None:
                # The tokenizer would come from the model, of which the problem has been reported.
                return
            if not self.data_args.tokenizer_name_or_path:
                revision = model.model_revision
        with collect(self.problems):
            self.tokenizer = loading.load_tokenizer(self.tokenizer_name, self.tokenizer_field, revision)

    def load_data(self) -> None:
        """Load the splits, in which no message may contain a special token of the tokenizer."""
        tokens = None
        if self.tokenizer is not None and self.kind != "text":
            tokens = special_tokens(self.tokenizer)
        if tokens is not None and (match := tokens.search(self.data_args.system_prompt or "")):
            remedy = f"contains {match.group()}, which the tokenizer reads as a special token; remove it"
            self.problems.append(Problem("system_prompt", self.data_args.system_prompt, remedy))
            # Every row would be rejected because of the prompt.
            tokens = None
        seed = _data_seed(self.training_args)
        evaluates = self.training_args.eval_strategy != "no"
        kind: Kind = "tokens" if self._shard_folders() else self.kind
        with once_per_node(self.training_args), collect(self.problems):
            self.splits = load_splits(self.data_args, kind, evaluates, tokens, seed)

    def _shard_folders(self) -> list[Path]:
        """Return the folders of the data sets whose documents are already tokens."""
        if self.kind != "text":
            return []
        return [path for path in map(Path, self.data_args.dataset_names) if is_shards(path)]

    def check(self) -> None:
        """Check the tokenizer, the model and the rewards, and give the tokenizer the template of the arguments."""
        if self.tokenizer is not None:
            self.problems += _set_template(self.tokenizer, self.training_args)
            faults = check_tokenizer(
                self.tokenizer, self.tokenizer_field, str(self.tokenizer_name), chat=self.kind != "text"
            )
            if not faults:
                for folder in self._shard_folders():
                    faults += check_tokenizers(folder, self.tokenizer)
            self.problems += faults
            if faults:
                # Nothing can be encoded with it.
                self.tokenizer = None
        if self.config is not None or isinstance(self.model_args, ScratchArguments):
            self.problems += _check_model(
                self.kind, self.config, self.tokenizer, self.training_args, self.model_args, self.reward_args
            )
        if self.reward_args is not None:
            train = self.splits[0] if self.splits is not None else None
            faults = self.reward_args.preflight(self.training_args, self.tokenizer, train)
            self.problems += faults
            if faults:
                # `fit` would start the tools of these arguments.
                self.reward_args = None

    def fit(self) -> None:
        """Drop rows that are too long, and check what is left. Raise a `UserError` if anything is wrong."""
        if self.splits is not None and self.tokenizer is not None:
            named_by = (self.tokenizer_field, self.tokenizer_name)
            with collect(self.problems):
                self.splits = _fit_rows(
                    self.kind, self.splits, self.tokenizer, self.training_args, self.config, named_by, self.reward_args
                )
        if self.splits is not None and isinstance(self.splits[0], Dataset):
            self.problems += checks.check_batches(len(self.splits[0]), self.training_args)
        self.problems += checks.preflight(self.training_args)
        refuse(*self.problems)

    def encode(self) -> tuple[PreTrainedTokenizerBase, Split, Split | None]:
        """Add the tokens that TRL would add more slowly, and return the result of `load_inputs`."""
        # Without a problem, all parts have been loaded.
        assert self.splits is not None
        train = self.splits[0]
        # The first row of another stream is only known once its buffer of shuffled rows is full.
        if isinstance(train, Dataset) or self.kind == "text":
            report_progress(first_row=_show_first_row(self.kind, train, self.tokenizer, self.training_args))
        train, held_out = _encode(self.kind, self.splits, self.tokenizer, self.training_args)
        return self.tokenizer, train, held_out


def _data_seed(args: Any) -> int:
    """Return the seed of the order of the rows."""
    return args.seed if args.data_seed is None else args.data_seed


def _check_model(
    kind: Kind,
    config: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    training_args: TrainingArguments,
    model_args: Any,
    reward_args: ToolArguments | None,
) -> list[Problem]:
    """Check the model to load by its `config`, or a new model (`config` is None) by the sizes in `model_args`."""
    # The fields that limit the length of this stage's sequences, such as `max_length`.
    fields = {stage.length for stage in STAGES.values() if stage.data == kind and stage.length}
    lengths = {field: getattr(training_args, field, None) for field in fields}
    if config is None:
        problems = check_lengths(model_args.max_position_embeddings, **lengths)
        if tokenizer is not None:
            problems += checks.check_disk(build_empty(model_args, len(tokenizer)).num_parameters(), training_args)
        return problems
    name = str(model_args.model_name_or_path)
    problems = check_model(config, tokenizer, name, reward=isinstance(training_args, RewardConfig), **lengths)
    # If anything but a length is wrong, the model may be of a kind that `check_weights` cannot build.
    if all(problem.field in lengths for problem in problems):
        problems += check_weights(config, training_args, model_args, reward_args)
    if kind == "prompt":
        problems += checks.check_generation_config(loading.base_of(name) or name, model_args.model_revision)
    return problems


def _fit_rows(
    kind: Kind,
    splits: tuple[Split, Split | None],
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    config: Any,
    named_by: tuple[str, str | None],
    tool_args: ToolArguments | None,
) -> tuple[Split, Split | None]:
    """Drop the rows that are too long, and check the first rows; what that means depends on the kind of the data.

    - "prompt": Drop prompts that leave no room for an answer.
    - "preference", "unpaired": Drop pairs and answers that are too long for DPO and KTO. For KTO, each answer of a pair
      becomes a row.
    - "conversation", "text": Only check the first rows.

    Args:
        args: The training arguments.
        config: The configuration of the model; None for a new one.
        named_by: The field that names the tokenizer, and its value, for messages.
        tool_args: The tools that the model may call, if any.

    Raises:
        UserError: If no row has room, or the chat template rejects one of the first rows.
    """
    try:
        if kind == "prompt":
            return _fit_prompts(splits, tokenizer, args, config, tool_args)
        if kind == "text":
            _check_documents(splits[0], tokenizer)
            return splits
        if kind == "conversation":
            _check_conversations(splits[0], tokenizer, args.max_length)
            return splits
        return _fit_pairs(kind, splits, tokenizer, args)
    except (TemplateError, ValueError) as error:
        remedy = f"its chat template rejects a conversation of the data ({error}); correct one of them"
        raise UserError(Problem(*named_by, remedy)) from error


def _first_rows(split: Split) -> list[Any]:
    """Return the rows of which the tokens are counted."""
    if isinstance(split, Dataset):
        return list(split.take(min(CHECKED_ROWS, len(split))))
    return list(split.take(CHECKED_ROWS_OF_STREAM))


def _count_tokens(tokenizer: PreTrainedTokenizerBase, messages: Any, **options: Any) -> int:
    """Return the number of tokens of a conversation in the chat template; `options` are arguments of the template."""
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    return len(encoded["input_ids"])


def _template_options(args: Any) -> dict[str, Any]:
    """Return the `chat_template_kwargs` of the training arguments that the template itself reads."""
    options = getattr(args, "chat_template_kwargs", None) or {}
    return {name: value for name, value in options.items() if name not in TEMPLATE_ARGUMENTS}


def _fit_prompts(
    splits: tuple[Split, Split | None],
    tokenizer: PreTrainedTokenizerBase,
    args: Any,
    config: Any,
    tool_args: ToolArguments | None,
) -> tuple[Split, Split | None]:
    """Drop prompts that leave no room for an answer in the context of the model."""
    positions = None
    if config is not None:
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = args.max_completion_length or 0
    template = _template_options(args)
    tool_tokens = _tokens_of_tools(splits[0], tokenizer, template, tool_args)
    train, held_out = splits
    train = drop_long_prompts(train, tokenizer, length, positions, template, tool_tokens)
    if held_out is not None:
        held_out = drop_long_prompts(held_out, tokenizer, length, positions, template, tool_tokens)
    return train, held_out


def _tokens_of_tools(
    split: Split, tokenizer: PreTrainedTokenizerBase, template: Mapping[str, Any], tool_args: ToolArguments | None
) -> int:
    """Return how many tokens tools and environment add to a prompt at most, measured on the first rows."""
    if tool_args is None:
        return 0
    toolbox = load_toolbox(vars(tool_args), tokenizer)
    if toolbox is None:
        return 0
    plain_prompts: list[Any] = []
    # The prompts with what an environment writes when it starts, such as the state of a game.
    opened_prompts: list[Any] = []
    with user_code(tool_args.environment or "", "environment"):
        for row in split.take(CHECKED_ROWS_OF_STREAM):
            plain_prompts.append(row["prompt"])
            opened_prompts.append(toolbox.open(row)[0])
    plain = {"add_generation_prompt": True, **template}
    with_tools = plain | toolbox.template(tokenizer)
    additional_tokens = []
    for prompt, opened in zip(plain_prompts, opened_prompts, strict=True):
        size = _count_tokens(tokenizer, opened, **with_tools)
        additional_tokens.append(size - _count_tokens(tokenizer, prompt, **plain))
    return max(additional_tokens)


def _check_documents(split: Split, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that documents which are tokens already, if any, come from this tokenizer."""
    rows = _first_rows(split)
    if TOKENS in rows[0]:
        Encoder.of(tokenizer)([row[TOKENS] for row in rows])


def _check_conversations(split: Split, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> None:
    """Check that the chat template can write the first rows, and that a prompt leaves room for an answer."""
    rows = _first_rows(split)
    _check_calls(split, rows, tokenizer)
    if max_length is None:
        return
    sizes = []
    for row in rows:
        prompt = list(takewhile(lambda message: message["role"] != "assistant", row["messages"]))
        tools = json.loads(row.get("tools") or "null")
        sizes.append(_count_tokens(tokenizer, prompt, tools=tools, add_generation_prompt=True))
    shortest = min(sizes)
    if shortest >= max_length:
        remedy = f"every prompt is longer ({shortest} tokens at least), so that no answer would be left; raise it"
        raise UserError(Problem("max_length", max_length, remedy))


def _check_calls(split: Split, first_rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether any row calls tools (of a stream, any of `first_rows`).

    Raise a `ValueError` if one does, and the chat template cannot write calls.
    """
    calls = has_calls(split if isinstance(split, Dataset) else first_rows)
    if calls and not supports_tool_calling(tokenizer):
        raise ValueError("it omits tool calls or their results; chat_template_path may name another")
    return calls


def _fit_pairs(
    kind: Kind, splits: tuple[Split, Split | None], tokenizer: PreTrainedTokenizerBase, args: Any
) -> tuple[Split, Split | None]:
    """Drop pairs or single answers that are too long for DPO and KTO, and check the first rows."""
    is_reward_model = isinstance(args, RewardConfig)
    for split in splits:
        if split is None:
            continue
        rows = _first_rows(split)
        if _check_calls(split, rows, tokenizer) and not is_reward_model:
            remedy = "DPO and KTO would also learn what tools wrote; use recipes.reward or recipes.sft"
            raise UserError(Problem("dataset_name", "dialogues with tools", remedy))
        if args.max_length is not None:
            # This also shows whether the template rejects one of these rows.
            sizes = [_pair_length(row, tokenizer) for row in rows]
            if not isinstance(split, Dataset):
                report_long_pairs(sizes, args.max_length, "checked pairs")
    train, held_out = splits
    if kind == "unpaired":
        train = _unpair(train, args)
        if held_out is not None:
            held_out = _unpair(held_out, args)
    # TRL's `RewardTrainer` drops pairs that are too long, which `_encode` reports. The other trainers would learn
    # from truncated answers.
    if args.max_length is not None and not is_reward_model:
        train = drop_long_pairs(train, tokenizer, args.max_length)
        if held_out is not None:
            held_out = drop_long_pairs(held_out, tokenizer, args.max_length, "evaluation ")
    return train, held_out


def _pair_length(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of a prompt with its longest answer."""
    answers = ANSWER_COLUMNS.intersection(row)
    return max(_count_tokens(tokenizer, row["prompt"] + row[answer]) for answer in answers)


def _unpair(split: Split, args: Any) -> Split:
    """Make a row of each answer of a pair, and shuffle the rows, because TRL's KTO reads them in order."""
    if "chosen" in column_names(split):
        split = unpair_preference_dataset(split)
    return split.shuffle(seed=_data_seed(args))


def _show_first_row(kind: Kind, split: Split, tokenizer: Any, args: Any) -> str:
    """Return the first row of a split as the model sees it: a text, or a conversation in its chat template."""
    row = next(iter(split))
    if TOKENS in row:
        return tokenizer.decode(row[TOKENS])
    if kind == "text":
        return (tokenizer.bos_token or "") + row["text"]
    options = _template_options(args)
    if kind == "conversation":
        options["tools"] = json.loads(row.get("tools") or "null")

    def render(messages: Any, **more: Any) -> str:
        # `_fit_rows` reports a template that rejects the data.
        with suppress(TemplateError, ValueError):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, **options, **more))
        return ""

    if kind == "conversation":
        return render(row["messages"])
    if kind == "prompt":
        text = render(row["prompt"], add_generation_prompt=True)
        if row.get("answer"):
            text += f" (answer: {row['answer']})"
        return text
    if "chosen" in row:
        return f"{render(row['prompt'] + row['chosen'])} (rejected: {row['rejected'][-1].get('content')})"
    return f"{render(row['prompt'] + row['completion'])} (label: {row['label']})"


def _encode(
    kind: Kind, splits: tuple[Split, Split | None], tokenizer: PreTrainedTokenizerBase, args: Any
) -> tuple[Split, Split | None]:
    """Add the tokens that `add_tokens` adds; the table in `pipeline.data.tokenized` says who tokenizes the others."""
    if kind == "unpaired" or (kind == "preference" and not isinstance(args, RewardConfig)):
        return splits
    answers_only = bool(getattr(args, "assistant_only_loss", False))
    num_proc = getattr(args, "dataset_num_proc", None)
    train, held_out = splits
    with once_per_node(args):
        train = add_tokens(train, kind, tokenizer, answers_only, num_proc)
        if held_out is not None:
            held_out = add_tokens(held_out, kind, tokenizer, answers_only, num_proc)
    if kind == "preference" and args.max_length is not None:
        for split, what in ((train, "pairs"), (held_out, "evaluation pairs")):
            if isinstance(split, Dataset):
                report_long_pairs(pair_lengths(split), args.max_length, what)
    # The rows already have labels, and TRL would reject a template that does not mark the answers.
    if answers_only and template_for_labels(tokenizer) is None:
        args.assistant_only_loss = False
    return train, held_out


def _set_template(tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> list[Problem]:
    """Give the tokenizer the chat template and the eos token of the training arguments, as TRL will."""
    path = getattr(args, "chat_template_path", None)
    pad = getattr(args, "pad_token", None)
    eos = getattr(args, "eos_token", None)
    for field, token in (("eos_token", eos), ("pad_token", pad)):
        if token and token not in tokenizer.get_vocab():
            return [Problem(field, token, "is not found in the vocabulary of the tokenizer; choose another one")]
    tokenizer.eos_token = eos or tokenizer.eos_token
    if pad and pad == tokenizer.eos_token:
        return [Problem("pad_token", pad, "is the tokenizer's eos token; choose another one")]
    if path is None:
        return []
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return [Problem("chat_template_path", path, f"cannot be read ({error}); give a Jinja template")]
    fault = validate_tokenizer(tokenizer)
    if fault:
        return [Problem("chat_template_path", path, f"{fault}; correct it")]
    return []


def check_weights(
    config: Any, args: TrainingArguments, model_args: ModelConfig, reward_args: Any, early: bool = False
) -> list[Problem]:
    """Check weights, attention, LoRA targets and disk space with a model on the meta device.

    Args:
        config: The configuration of the model, which is changed if a reward model is made of it.
        reward_args: As for `load_inputs`, or None.
        early: Whether an earlier step still has to make the model. Then there are no weights to check, and free disk
            space is checked later, because it may change.
    """
    name = str(model_args.model_name_or_path)
    is_reward_model = isinstance(args, RewardConfig)
    model_class = transformers.AutoModelForCausalLM
    if is_reward_model:
        model_class = transformers.AutoModelForSequenceClassification
        if not loading.is_reward_model(config):
            config.num_labels = 1
    attention = model_args.attn_implementation
    try:
        with torch.device("meta"):
            model = model_class.from_config(config, attn_implementation=attention, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())
        if attention is not None and type(config) in model_class._model_mapping:
            return [Problem("attn_implementation", attention, f"{reason}; omit it, or use sdpa or eager")]
        return [Problem("model_name_or_path", name, f"its {config.model_type} model cannot be built ({reason[:200]})")]
    problems = []
    fault = None if early else loading.validate_weights(name, config, model_class)
    if fault:
        problems.append(Problem("model_name_or_path", name, fault))
    weight = getattr(args, "router_aux_loss_coef", None)
    if weight and not hasattr(config.get_text_config(), "output_router_logits"):
        problems.append(Problem("router_aux_loss_coef", weight, "the model does not have experts; omit it"))
    problems += checks.check_lora(model_args, model)
    if early:
        return problems
    size = model.num_parameters()
    # A rough share for adapters, whose size depends on their rank and targets.
    trained = round(0.05 * size) if model_args.use_peft else size
    if reward_args is not None and reward_args.trains_critic:
        # The critic is trained in full unless it is an adapter, too. Without `use_peft`, `trained` is the full size.
        critic_size = trained if reward_args.value_use_peft else size
        trained += critic_size
    return problems + checks.check_disk(trained, args)
