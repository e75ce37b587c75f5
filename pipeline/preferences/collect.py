"""Preference data: pairs of answers sampled from a model, each labelled with the preferred one.

The labels come from simulated annotators (`recipes.worlds.pocket.annotators`) or a judge (see `judges.py`).
The result is a data set in Hub layout and in TRL's preference format, one Parquet file per split:

- `prompt`, `chosen`, `rejected`: lists of messages;
- `annotator`: who labelled the pair, "judge" for a judge;
- `first`: "chosen" or "rejected", whichever was shown first;
- `kind`: the kind of the prompt ("" if it has none);
- `taste_chosen`, `taste_rejected`: the noise-free taste of the annotators, in the test split only and null elsewhere.
  It is for evaluation; no model may train on it;
- `tools`: with tools only, where answers are dialogues: what they may call.

The format cannot represent ties: they are dropped, and counted in README.md. The pairs of a split come from the prompts
of that split. A prompt that also occurs in a held-out split is not used for training.
"""

import json
import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import PartialState
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import get_json_schema

from pipeline import hardware, launch
from pipeline.config.checks import check_ranges
from pipeline.config.output_directory import recorded_template_kwargs
from pipeline.data import writing
from pipeline.data.arguments import SPLITS, DataArguments, option
from pipeline.data.messages import read_answer, refuse_special_tokens
from pipeline.data.sources import open_source
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError, refuse
from pipeline.errors import collect as collect_problems
from pipeline.files import check_replaceable
from pipeline.models.checks import check_model, check_template_arguments
from pipeline.models.generation import Completion, encode_prompts, generate
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.tokenizer import special_tokens
from pipeline.preferences.judges import ANNOTATORS, Judge, load_judge, prefer_column
from pipeline.preferences.labels import Counts, label_answers, take_turns
from pipeline.progress import report_progress
from pipeline.rewards.grading import RULE_COLUMNS, validate_rule
from pipeline.tools.chat_model import ChatModel
from pipeline.tools.loading import ToolArguments, Toolbox, load_toolbox

logger = logging.getLogger("pipeline.preferences.collect")

NO_RULES = "the columns by which the annotators judge (require, reject, test); name a reward model or a function"
TITLE = "# Preferences between two answers"
CARD = f"""\
{TITLE}

Answers sampled from {{origin}}, compared in pairs by {{judge}}.

`first` says which of the two answers was shown first. Ties are dropped. `taste_chosen` and `taste_rejected` are the
annotators' taste without the noise. Only the test split has these columns, because no model may train on them.

{{table}}"""


@dataclass
class AnswerArguments:
    """The model, the prompts, the sampling and the output."""

    model_name_or_path: str = field(metadata={"help": "Model whose answers are compared: a Hub id or a folder."})
    dataset_name: str = field(metadata={"help": "Data set of the prompts: a Hub id, a folder or a file."})
    output_dir: str = field(metadata={"help": "Output folder of the data set; an earlier one is replaced."})
    dataset_config: str | None = option(None, "Configuration of the data set (default: its only one).")
    prompt_column: str = option("prompt", "Column of the prompts: a list of {role, content}, or a question.")
    judge: str | None = option(
        None,
        "Who labels the pairs: a reward model (folder or Hub id) or package.module:function (default: simulated "
        "annotators, for prompts with the columns by which they judge: require, reject or test).",
    )
    samples_per_prompt: int = option(3, "Answers sampled for each prompt.")
    pairs_per_prompt: int = option(2, "Maximum pairs compared for each prompt; identical answers do not form a pair.")
    max_prompts: int | None = option(None, "Training prompts to use (default: all).")
    max_eval_prompts: int | None = option(None, "Prompts to use from each other split (default: all).")
    max_validation_prompts: int | None = option(None, "Prompts to use from `validation` (default: max_eval_prompts).")
    temperature: float = option(1.0, "Sampling temperature.")
    min_p: float = option(0.0, "Never sample tokens less probable than this share of the most probable one.")
    max_new_tokens: int = option(64, "Maximum length of an answer, in tokens.")
    chat_template_kwargs: dict[str, Any] | str | None = option(  # noqa: RUF009
        None, "Further arguments of the chat template (default: those that the model was trained with)."
    )
    batch_size: int = option(384, "Answers sampled at once by each process.")
    seed: int = option(0, "Seed of the sampling and of the annotators.")

    def __post_init__(self) -> None:
        problems = check_ranges(vars(self))
        arguments = self.chat_template_kwargs
        try:
            if isinstance(arguments, str):
                self.chat_template_kwargs = dict(json.loads(arguments))
            elif arguments is None:
                self.chat_template_kwargs = recorded_template_kwargs(self.model_name_or_path)
            problems += check_template_arguments(self.chat_template_kwargs)
        except (ValueError, TypeError):
            problems.append(Problem("chat_template_kwargs", arguments, "is not a JSON object; correct it"))
        refuse(*problems)


@dataclass
class PreferenceArguments(ToolArguments, AnswerArguments):
    """`AnswerArguments` and tools: with tools, an answer is a whole dialogue."""

    max_tool_calling_iterations: int | None = option(None, "How often results are returned (default: while they fit).")
    preferred_column: str | None = option(
        None,
        "Column of answers, by people or a better model, each of which is preferred to the sampled answers to its "
        "prompt. Nobody judges these pairs.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preferred_column is None:
            return
        remedy = "the answers in preferred_column are preferred without being judged; omit one of the two fields"
        refuse(*(Problem(name, getattr(self, name), remedy) for name in ("judge", "tools") if getattr(self, name)))


def collect(args: PreferenceArguments) -> dict[str, Counts]:
    """Sample and label on all processes; write on the first.

    Returns:
        The counts of each split, the same on every process.

    Raises:
        UserError: If the model, the prompts or the output folder cannot be used, or no pair is left to train on.
    """
    state = PartialState(cpu=hardware.accelerator() is None)
    files = ("README.md", *(f"{split}.parquet" for split in SPLITS))
    refuse(check_replaceable(args.output_dir, files, TITLE, args.dataset_name))
    judge = prefer_column(args.preferred_column) if args.preferred_column else load_judge(args.judge)
    splits, counts = label_samples(args, judge)
    if state.is_main_process:
        origin = f"`{args.model_name_or_path}` at temperature {args.temperature} (min_p {args.min_p})"
        origin += f", to prompts of `{args.dataset_name}`"
        write(
            Path(args.output_dir), splits, counts, origin, "simulated annotators" if judge is ANNOTATORS else judge.name
        )
    state.wait_for_everyone()
    state.destroy_process_group()
    return counts


def write(
    output_dir: Path, splits: Mapping[str, Sequence[Any]], counts: Mapping[str, Counts], origin: str, judge: str
) -> None:
    """Write a preference data set, either whole or not at all. `origin` and `judge` are phrases of its card."""
    # `load_dataset` refuses a split without rows.
    filled = [name for name, rows in splits.items() if rows]
    lines = [[name, *of_split.texts().values()] for name, of_split in counts.items()]
    table = writing.table(["split", *Counts().texts()], lines)
    text = CARD.format(origin=origin, judge=judge, table=table)
    schema = writing.DIALOGUES if any("tools" in splits[name][0] for name in filled) else writing.PREFERENCES
    card = writing.card({"default": filled}, text, tags=["preference"])
    writing.write_data_set(str(output_dir), {"": schema}, [("", name, splits[name]) for name in filled], card)


def label_samples(
    args: AnswerArguments, judge: Judge = ANNOTATORS
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Counts]]:
    """Sample answers on all processes, and label them.

    Returns:
        The labelled pairs and the counts of each split, the same on every process.

    Raises:
        UserError: If the model or the prompts cannot be used, or no pair is left to train on.
    """
    state = PartialState(cpu=hardware.accelerator() is None)
    tokenizer = load_tokenizer(args.model_name_or_path, "model_name_or_path")
    if isinstance(args, PreferenceArguments):
        refuse(*args.preflight(None, tokenizer, None))
    prompts = read_prompts(args, special_tokens(tokenizer), judge)
    model, tokenizer = load_model(args.model_name_or_path, "model_name_or_path")
    refuse(*check_model(model.config, tokenizer, args.model_name_or_path, max_new_tokens=args.max_new_tokens))
    model.to(state.device, hardware.fast_dtype())
    launch.log_threads()
    chat = None
    tools: dict[str, Any] = {}
    opened = prompts
    toolbox = load_toolbox(vars(args), tokenizer)
    if toolbox is not None:
        options = {"template": args.chat_template_kwargs, "turns": vars(args)["max_tool_calling_iterations"]}
        chat = ChatModel(model, tokenizer, args.max_new_tokens, toolbox=toolbox, **options)
        tools = toolbox.template(tokenizer)
        opened = _open_environments(prompts, toolbox)
    # Of dialogues with tools, `chat` encodes the prompts again, and this only checks their lengths.
    ids = encode(model, tokenizer, opened, args, tools)

    splits: dict[str, list[dict[str, Any]]] = {}
    counts: dict[str, Counts] = {}
    total = sum(map(len, ids.values()))
    answered = 0
    for number, (name, rows) in enumerate(opened.items()):
        # The seeds of the splits are so far apart that the seeds of their batches never coincide.
        seed = (3 * args.seed + number) * 1_000_000
        asking: Sequence[Any] = ids[name] if chat is None else prompts[name]
        answers = sample_answers(model, tokenizer, asking, args, seed, (answered, total), chat)
        answered += len(rows)
        splits[name], counts[name] = label_answers(
            rows,
            answers,
            pairs_per_prompt=args.pairs_per_prompt,
            seed=f"{args.seed}/{name}",
            keep_taste=name == "test",
            judge=judge,
            read=str if chat is None else json.loads,
        )
        logger.info("%-11s %s", name, ", ".join(f"{what} {text}" for what, text in counts[name].texts().items()))
    if not splits["train"]:
        remedy = "no two answers differ enough to be compared; raise temperature or max_prompts"
        raise UserError(Problem("temperature", args.temperature, remedy))
    if tools:
        _describe_tools(splits, tools["tools"])
    return splits, counts


def _open_environments(
    prompts: Mapping[str, Sequence[Mapping[str, Any]]], toolbox: Toolbox
) -> dict[str, list[dict[str, Any]]]:
    """Return the prompts with what an environment says at first, which is part of the prompt, as in training."""
    opened = {}
    for split, rows in prompts.items():
        opened[split] = [{**row, "prompt": toolbox.open(row)[0]} for row in rows]
    return opened


def _describe_tools(splits: Mapping[str, Sequence[dict[str, Any]]], tools: Sequence[Any]) -> None:
    """Add the column `tools` to the rows: the JSON schema of each tool."""
    schemas = json.dumps([get_json_schema(tool) for tool in tools])
    for row in chain.from_iterable(splits.values()):
        row["tools"] = schemas


def read_prompts(
    args: AnswerArguments, tokens: re.Pattern[str] | None = None, judge: Judge = ANNOTATORS
) -> dict[str, list[dict[str, Any]]]:
    """Read the prompts of each existing split in random order, at most as many as requested.

    If a data set has a single split, the rows that all stages hold out become the split `validation`. A prompt that
    also occurs in a held-out split is not used for training.

    Args:
        args: The data set and the number of prompts.
        tokens: Special tokens, which no prompt may contain as text. None allows any text.
        judge: Who labels the answers.

    Raises:
        UserError: If the prompts cannot be read, or the judge cannot judge answers to them.
    """
    splits = _open_prompts(args, tokens)
    # Held-out splits come first, so that training can exclude their prompts.
    held_out: set[str] = set()
    prompts: dict[str, list[dict[str, Any]]] = {}
    limits = {"train": args.max_prompts, "validation": args.max_validation_prompts or args.max_eval_prompts}
    for name, split in splits.items():
        texts = [str(prompt) for prompt in split["prompt"]]
        indices = [index for index, text in enumerate(texts) if text not in held_out]
        if len(indices) < len(texts):
            logger.warning("%-11s omits %d prompts of a held-out split", name, len(texts) - len(indices))
        held_out.update(texts)
        # Shuffled, because data sets are often sorted, and only the first prompts may be used.
        random.Random(f"{args.seed}/{name}").shuffle(indices)
        prompts[name] = split.select(indices[: limits.get(name, args.max_eval_prompts)]).to_list()
        _check_prompts(args, name, prompts[name], judge)
    return {name: prompts[name] for name in SPLITS if name in prompts}


def _open_prompts(args: AnswerArguments, tokens: re.Pattern[str] | None) -> dict[str, Any]:
    """Return the splits of the prompts; `train` comes last."""
    source = DataArguments(args.dataset_name, dataset_config=args.dataset_config, prompt_column=args.prompt_column)
    available = open_source(args.dataset_name, args.dataset_config)
    if set(available) == {"train"}:
        train, validation = load_splits(source, "prompt", True, tokens)
        return {"validation": validation, "train": train}
    splits: dict[str, Any] = {}
    for name in reversed(SPLITS):
        if name in available or name == "train":
            splits[name], _ = load_splits(replace(source, dataset_train_split=name), "prompt", False, tokens)
    return splits


def _check_prompts(args: AnswerArguments, split: str, rows: Sequence[Mapping[str, Any]], judge: Judge) -> None:
    """Raise a `UserError` if a prompt has a rule that cannot be applied, or the judge cannot judge answers to it."""
    for row in rows:
        fault = validate_rule(row)
        if fault:
            raise UserError(Problem("dataset_name", args.dataset_name, f"in a row of {split}, {fault}; correct it"))
    without_rule = sum(not judge.can_judge(row) for row in rows)
    if judge.preferred_column is not None and without_rule:
        remedy = f"{without_rule} of {len(rows)} prompts of {split} lack an answer in this column"
        raise UserError(Problem("preferred_column", judge.preferred_column, remedy))
    if without_rule:
        remedy = f"{without_rule} of {len(rows)} prompts of {split} lack {NO_RULES}"
        raise UserError(Problem("judge", f"nothing, for {args.dataset_name}", remedy))


def check_judge(values: Mapping[str, Any]) -> list[Problem]:
    """Check, before anything is trained, that the judge in a YAML file can be loaded, or suits local data.

    `values` are the fields of the file.
    """
    name = values.get("dataset_name")
    judge = values.get("judge")
    problems: list[Problem] = []
    if values.get("preferred_column"):
        # Nobody judges. Whether the column exists is known once the data set does.
        return problems
    # A function can be loaded immediately; a reward model may be trained by the run itself.
    if isinstance(judge, str) and ":" in judge:
        with collect_problems(problems):
            load_judge(judge)
    elif not judge and isinstance(name, str) and os.path.exists(name):
        # The step itself reports data that cannot be read.
        with suppress(UserError):
            columns: set[str] = set()
            for split in open_source(name, values.get("dataset_config")).values():
                columns.update(split.column_names)
            if not columns.intersection(RULE_COLUMNS):
                problems.append(Problem("judge", f"nothing, for {name}", f"its prompts lack {NO_RULES}"))
    return problems


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Mapping[str, Any]]],
    args: AnswerArguments,
    tools: Mapping[str, Any] | None = None,
) -> dict[str, list[list[int]]]:
    """Return the token ids of the prompts of each split; `tools` are further arguments of the chat template.

    Raises:
        UserError: If the chat template refuses a prompt, or a prompt leaves no room for `max_new_tokens`.
    """
    template = {**vars(args)["chat_template_kwargs"], **(tools or {})}
    encoded: dict[str, list[list[int]]] = {}
    try:
        for name, rows in prompts.items():
            encoded[name] = encode_prompts(tokenizer, [row["prompt"] for row in rows], template)
    except TemplateError as error:
        remedy = f"its chat template refuses a prompt of the data ({error}); correct one of them"
        raise UserError(Problem("model_name_or_path", args.model_name_or_path, remedy)) from None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, chain.from_iterable(encoded.values())))
    if positions is not None and longest + args.max_new_tokens > positions:
        fault = f"takes {longest} of the model's {positions} tokens of context (max_position_embeddings)"
        remedy = f"the longest prompt {fault}, which leaves {max(0, positions - longest)}; lower it or shorten prompts"
        raise UserError(Problem("max_new_tokens", args.max_new_tokens, remedy))
    return encoded


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    args: AnswerArguments,
    seed: int,
    progress: tuple[int, int],
    chat: ChatModel | None = None,
) -> list[list[str]]:
    """Sample `args.samples_per_prompt` answers to each prompt, and return them on every process.

    Processes take turns at the batches, and each batch has its own seed, so that the number of processes has no effect
    as long as each has the same number of threads, which affects the order of sums. An answer that contains a special
    token becomes empty: no stage would accept it as data.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompts: Token ids or, for a `chat`, rows.
        args: Settings of the sampling.
        seed: Seed of the first batch.
        progress: Numbers of prompts answered before and in all splits, to report.
        chat: The model with the tools that it may call. None means without tools.

    Returns:
        The answers to each prompt: texts or, of a `chat`, dialogues as JSON.
    """
    # batch_size counts answers, and a prompt has samples_per_prompt of them.
    size = max(1, args.batch_size // args.samples_per_prompt)
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    pattern = special_tokens(tokenizer)
    sampling: dict[str, Any] = {
        "temperature": args.temperature,
        "min_p": args.min_p,
        "samples": args.samples_per_prompt,
    }
    lengths: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size}

    def text_of(completion: Completion) -> str:
        """Return the answer, or "" if it cannot be used."""
        if chat is not None:
            return _as_json(tokenizer, completion.messages, pattern)
        if pattern.search(completion.text):
            return ""
        return completion.text

    def answer(number: int, batch: Sequence[Any]) -> list[list[str]]:
        report_progress(done=progress[0] + number * size, total=progress[1], unit="prompts")
        if chat is not None:
            # Each turn has a seed of its own.
            completions = chat.answer(batch, seed=1000 * (seed + number), **sampling)
        else:
            completions = generate(model, tokenizer, batch, seed=seed + number, **sampling, **lengths)
        return [list(map(text_of, of_prompt)) for of_prompt in completions]

    return take_turns(batches, answer)


def _as_json(tokenizer: Any, messages: Sequence[Any], tokens: re.Pattern[str]) -> str:
    """Return the JSON of a dialogue, or "" if a row that contains it would not render as the text that PPO scores."""
    prompt = {"role": "user", "content": "-"}
    try:
        read = read_answer(list(messages), "answer")
        refuse_special_tokens({"chosen": read}, tokens)
        # Infinite numbers, which JSON does not have, are refused as well.
        text = json.dumps(read, allow_nan=False)
        sampled = tokenizer.apply_chat_template([prompt, *messages], tokenize=False)
        written = tokenizer.apply_chat_template([prompt, *read], tokenize=False)
    except (ValueError, TemplateError):
        return ""
    if sampled != written:
        return ""
    return text
