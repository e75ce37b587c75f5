"""Load a stage's data and tokenizer, and report everything that is wrong with them together."""

import json
import os
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from jinja2 import TemplateError
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import ModelConfig, RewardConfig, unpair_preference_dataset
from trl.chat_template_utils import supports_tool_calling

from pipeline.data.arguments import DataArguments
from pipeline.data.columns import TOKENS, Kind, Split, column_names
from pipeline.data.packing import Encoder
from pipeline.data.shards import check_tokenizers, is_shards
from pipeline.data.splits import has_calls, load_splits
from pipeline.data.tokenized import (
    ANSWERS,
    add_tokens,
    drop_long_pairs,
    drop_long_prompts,
    pair_lengths,
    report_long_pairs,
    template_for_labels,
)
from pipeline.errors import LIBRARY_ERRORS, Problem, UserError, collect
from pipeline.files import as_list, is_missing_path
from pipeline.launch import once_per_node
from pipeline.models import loading
from pipeline.models.checks import TEMPLATE_ARGUMENTS, check_lengths, check_model, check_tokenizer
from pipeline.models.scratch import ScratchArguments, build_empty
from pipeline.models.tokenizer import special_tokens, validate_tokenizer
from pipeline.progress import report_progress
from pipeline.rewards.loading import user_code
from pipeline.stages import STAGES
from pipeline.tools.loading import load_toolbox
from pipeline.training import checks


def load_inputs(
    kind: Kind,
    data_args: DataArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig | ScratchArguments,
    reward_args: Any = None,
) -> tuple[PreTrainedTokenizerBase, Split, Split | None]:
    """Load a stage's tokenizer and data, and check them together with the model's configuration and the arguments.

    Each part is loaded even if an earlier one could not be, so that the `UserError` lists everything that is wrong.

    Args:
        kind: Content of the data, as for `load_splits`.
        model_args: The model to load, or the sizes of a new one.
        reward_args: The rewards, if any: one of the dataclasses of `pipeline.rl.arguments`.

    Returns:
        The tokenizer, the training split, and the evaluation split or None; see `add_tokens` for their columns.
    """
    problems: list[Problem] = []
    pretrained = model_args if isinstance(model_args, ModelConfig) else None
    name, own = pretrained.model_name_or_path if pretrained else None, data_args.tokenizer_name_or_path
    named = [name, own, *data_args.dataset_names, getattr(reward_args, "value_model_path", None)]
    named += as_list(getattr(reward_args, "reward_model_path", None))
    if not all(os.path.exists(other) or is_missing_path(other) for other in named if other):
        loading.skip_unreachable_hub()

    # A part that cannot be loaded is None from here on, and checks that need it are skipped.
    config = tokenizer = splits = None
    if pretrained is not None:
        with collect(problems):
            if not name:
                raise UserError(Problem("model_name_or_path", "nothing", "give a Hub id or a folder"))
            revision = pretrained.model_revision
            with loading.user_error_for("model_name_or_path", name):
                base = loading.base_of(name, revision)
                if base and PeftConfig.from_pretrained(name, revision=revision).is_prompt_learning:
                    remedy = "is a learned prompt, which cannot be merged into its base model; give another adapter"
                    raise UserError(Problem("model_name_or_path", name, remedy))
            with loading.user_error_for("model_name_or_path", f"{base}, the base model of {name}" if base else name):
                config = loading.load_config(name, revision)
    # The field that names the tokenizer, and its value.
    words_from = ("tokenizer_name_or_path", own) if own or not name else ("model_name_or_path", name)
    if own is not None or config is not None or pretrained is None:
        revision = pretrained.model_revision if pretrained and not own else None
        with collect(problems):
            tokenizer = loading.load_tokenizer(words_from[1], words_from[0], revision)
    shards = [path for path in map(Path, data_args.dataset_names) if kind == "text" and is_shards(path)]
    # Neither the data nor the system prompt may contain special tokens: one in the prompt would get every row refused.
    tokens = special_tokens(tokenizer) if tokenizer is not None and kind != "text" else None
    if tokens is not None and (found := tokens.search(data_args.system_prompt or "")):
        remedy = f"contains {found.group()}, which the tokenizer reads as a special token; remove it"
        problems.append(Problem("system_prompt", data_args.system_prompt, remedy))
        tokens = None
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    with once_per_node(training_args), collect(problems):
        splits = load_splits(data_args, "tokens" if shards else kind, training_args.eval_strategy != "no", tokens, seed)
    if tokenizer is not None:
        problems += _set_template(tokenizer, training_args)
        faults = check_tokenizer(tokenizer, words_from[0], str(words_from[1]), kind != "text")
        for folder in shards if not faults else ():
            faults += check_tokenizers(folder, tokenizer)
        problems += faults
        # Nothing can be encoded with a faulty tokenizer.
        tokenizer = None if faults else tokenizer

    if pretrained is None or config is not None:
        problems += _check_model(kind, config, tokenizer, training_args, model_args, reward_args)
    faults = reward_args.preflight(training_args, tokenizer, splits[0] if splits else None) if reward_args else []
    problems, reward_args = problems + faults, None if faults else reward_args
    if splits is not None and tokenizer is not None:
        with collect(problems):
            splits = _fit_rows(kind, splits, tokenizer, training_args, config, words_from, reward_args)
    if splits is not None and isinstance(splits[0], Dataset):
        problems += checks.check_batches(len(splits[0]), training_args)
    problems += checks.preflight(training_args)
    if problems or tokenizer is None or splits is None:
        raise UserError(*problems)
    # The first row of another stream is only known once its buffer of shuffled rows is full.
    if isinstance(splits[0], Dataset) or kind == "text":
        report_progress(first_row=_show_first_row(kind, splits[0], tokenizer, training_args))
    return tokenizer, *_encode(kind, splits, tokenizer, training_args)


def _check_model(
    kind: Kind, config: Any, tokenizer: Any, training_args: TrainingArguments, model_args: Any, reward_args: Any
) -> list[Problem]:
    """Check a model to load by its `config`, or a new one (None) by its sizes."""
    # The field that limits the length of this stage's sequences, such as `max_length`.
    limits = {stage.length for stage in STAGES.values() if stage.data == kind and stage.length}
    length = {field: getattr(training_args, field, None) for field in limits}
    if config is None:
        problems = check_lengths(model_args.max_position_embeddings, **length)
        if tokenizer is not None:
            problems += checks.check_disk(build_empty(model_args, len(tokenizer)).num_parameters(), training_args)
        return problems
    name = str(model_args.model_name_or_path)
    problems = check_model(config, tokenizer, name, reward=isinstance(training_args, RewardConfig), **length)
    if all(fault.field in length for fault in problems):
        problems += check_weights(config, training_args, model_args, reward_args)
    if kind == "prompt":
        problems += checks.check_generation_config(loading.base_of(name) or name, model_args.model_revision)
    return problems


def _fit_rows(
    kind: Kind, splits: tuple[Split, Split | None], tokenizer: Any, args: Any, config: Any, words_from: Any, tools: Any
) -> tuple[Split, Split | None]:
    """Drop prompts that leave no room for an answer, and pairs that are too long for DPO and KTO; check the first rows.

    Each answer of a pair becomes a row for KTO. The chat template, which comes from the field `words_from`, may reject
    a row. `tools` may name tools.
    """

    def count(messages: Any, tools: Any = None, **options: Any) -> int:
        options |= {"tools": tools, "tokenize": True, "return_dict": True}
        return len(tokenizer.apply_chat_template(messages, **options)["input_ids"])

    try:
        if kind == "prompt":
            positions = getattr(config.get_text_config(), "max_position_embeddings", None) if config else None
            given, limit = args.chat_template_kwargs or {}, args.max_completion_length or 0
            template = {name: value for name, value in given.items() if name not in TEMPLATE_ARGUMENTS}
            added = 0
            if toolbox := load_toolbox(vars(tools) if tools else None, tokenizer):
                # What tools and environments add to prompts is measured on the first rows.
                with user_code(tools.environment, "environment"):
                    opened = [(toolbox.open(row)[0], row["prompt"]) for row in splits[0].take(100)]
                plain: dict[str, Any] = {"add_generation_prompt": True, **template}
                called = plain | toolbox.template(tokenizer)
                added = max(count(shown, **called) - count(asked, **plain) for shown, asked in opened)
            train, held_out = (s and drop_long_prompts(s, tokenizer, limit, positions, template, added) for s in splits)
            return train, held_out
        for split in filter(None, splits if kind in ("preference", "unpaired") else splits[:1]):
            # Counting all tokens of a large data set takes minutes, and a stream is read over the network.
            is_stored = isinstance(split, Dataset)
            rows = list(split.take(min(1000, len(split)) if is_stored else 100))
            calls = has_calls(split if is_stored else rows)
            if calls and not supports_tool_calling(tokenizer):
                raise ValueError("it omits tool calls or their results; chat_template_path may name another")
            if calls and kind != "conversation" and not isinstance(args, RewardConfig):
                remedy = "DPO and KTO would also learn what tools wrote; use recipes.reward or recipes.sft"
                raise UserError(Problem("dataset_name", "dialogues with tools", remedy))
            if kind == "text":
                if TOKENS in rows[0]:
                    Encoder.of(tokenizer)([row[TOKENS] for row in rows])
            elif args.max_length is None:
                continue
            elif kind == "conversation":
                asked = [[*takewhile(lambda message: message["role"] != "assistant", row["messages"])] for row in rows]
                tools = [json.loads(row.get("tools") or "null") for row in rows]
                shortest = min(map(partial(count, add_generation_prompt=True), asked, tools))
                if shortest >= args.max_length:
                    remedy = f"every prompt is longer ({shortest} tokens at least), so that no answer would be left"
                    raise UserError(Problem("max_length", args.max_length, f"{remedy}; raise it"))
            else:
                answers = ANSWERS.intersection(rows[0])
                sizes = [max(count(row["prompt"] + row[answer]) for answer in answers) for row in rows]
                if not is_stored:
                    report_long_pairs(sizes, args.max_length, "checked pairs")
        if kind == "unpaired":
            splits = _unpair(splits, args)
        # TRL's `RewardTrainer` drops pairs that are too long, which `_encode` reports. The other trainers would learn
        # from truncated answers.
        if kind in ("preference", "unpaired") and args.max_length is not None and not isinstance(args, RewardConfig):
            train, held_out = splits
            train = drop_long_pairs(train, tokenizer, args.max_length)
            return train, held_out and drop_long_pairs(held_out, tokenizer, args.max_length, "evaluation ")
        return splits
    except (TemplateError, ValueError) as error:
        remedy = f"its chat template rejects a conversation of the data ({error}); correct one of them"
        raise UserError(Problem(words_from[0], words_from[1], remedy)) from error


def _show_first_row(kind: Kind, split: Split, tokenizer: Any, args: Any) -> str:
    """Return the first row of a split as the model sees it: a text, or a conversation in its chat template."""
    row = next(iter(split))
    if TOKENS in row:
        return tokenizer.decode(row[TOKENS])
    if kind == "text":
        return (tokenizer.bos_token or "") + row["text"]
    options = dict(getattr(args, "chat_template_kwargs", None) or {})
    options = {name: value for name, value in options.items() if name not in TEMPLATE_ARGUMENTS}
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
        answer = f" (answer: {row['answer']})" if row.get("answer") else ""
        return render(row["prompt"], add_generation_prompt=True) + answer
    if "chosen" in row:
        return f"{render(row['prompt'] + row['chosen'])} (rejected: {row['rejected'][-1].get('content')})"
    return f"{render(row['prompt'] + row['completion'])} (label: {row['label']})"


def _unpair(splits: tuple[Split, Split | None], args: Any) -> tuple[Split, Split | None]:
    """Make a row of each answer of a pair, and shuffle the rows, because TRL's KTO reads them in order."""
    seed = args.seed if args.data_seed is None else args.data_seed
    singles = (unpair_preference_dataset(s) if s and "chosen" in column_names(s) else s for s in splits)
    train, held_out = (single and single.shuffle(seed=seed) for single in singles)
    return train, held_out


def _encode(
    kind: Kind, splits: tuple[Split, Split | None], tokenizer: PreTrainedTokenizerBase, args: Any
) -> tuple[Split, Split | None]:
    """Add the tokens of the rows, as `add_tokens` describes them."""
    if kind == "unpaired" or (kind == "preference" and not isinstance(args, RewardConfig)):
        return splits
    answers_only = bool(getattr(args, "assistant_only_loss", False))
    num_proc = getattr(args, "dataset_num_proc", None)
    with once_per_node(args):
        train, held_out = (split and add_tokens(split, kind, tokenizer, answers_only, num_proc) for split in splits)
    for split, what in ((train, "pairs"), (held_out, "evaluation pairs")):
        if kind == "preference" and isinstance(split, Dataset) and args.max_length is not None:
            report_long_pairs(pair_lengths(split), args.max_length, what)
    # The rows already have labels, and TRL would refuse a template that does not mark the answers.
    if answers_only and template_for_labels(tokenizer) is None:
        args.assistant_only_loss = False
    return train, held_out


def _set_template(tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> list[Problem]:
    """Give the tokenizer the chat template and the eos token of the training arguments, as TRL will."""
    path, pad, eos = (getattr(args, name, None) for name in ("chat_template_path", "pad_token", "eos_token"))
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
    if fault := validate_tokenizer(tokenizer):
        return [Problem("chat_template_path", path, f"{fault}; correct it")]
    return []


def check_weights(
    config: Any, args: TrainingArguments, model_args: ModelConfig, reward_args: Any, early: bool = False
) -> list[Problem]:
    """Check weights, attention, LoRA targets and disk space with a model on the meta device.

    If it is `early`, the model does not exist yet, so there are no weights to check, and the disk may change.
    """
    name, reward = str(model_args.model_name_or_path), isinstance(args, RewardConfig)
    if reward and not loading.is_reward_model(config):
        config.num_labels = 1
    model_class = transformers.AutoModelForSequenceClassification if reward else transformers.AutoModelForCausalLM
    attention = model_args.attn_implementation
    try:
        with torch.device("meta"):
            model = model_class.from_config(config, attn_implementation=attention, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        reason = " ".join(str(error).split())
        if attention is not None and type(config) in model_class._model_mapping:
            return [Problem("attn_implementation", attention, f"{reason}; omit it, or use sdpa or eager")]
        return [Problem("model_name_or_path", name, f"its {config.model_type} model cannot be built ({reason[:200]})")]
    fault = None if early else loading.validate_weights(name, config, model_class)
    problems = [Problem("model_name_or_path", name, fault)] if fault else []
    weight = getattr(args, "router_aux_loss_coef", None)
    if weight and not hasattr(config.get_text_config(), "output_router_logits"):
        problems.append(Problem("router_aux_loss_coef", weight, "the model does not have experts; omit it"))
    if early:
        return problems + checks.check_lora(model_args, model)
    size = model.num_parameters()
    # Adapters are smaller, depending on their rank and targets.
    trained = round(0.05 * size) if model_args.use_peft else size
    if reward_args is not None and reward_args.trains_critic:
        # The critic is trained in full unless it is an adapter, too.
        trained += trained if reward_args.value_use_peft else size
    return problems + checks.check_lora(model_args, model) + checks.check_disk(trained, args)
