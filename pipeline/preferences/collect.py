"""Preference data: pairs of answers sampled from a model, each labelled with the one that is preferred.

The labels come from the simulated annotators of `pipeline.rewards.annotators`. What is written is a data set in Hub
layout and in TRL's preference format with explicit prompts, one Parquet file a split:

- `prompt`, `chosen`, `rejected`: lists of messages;
- `annotator`: whose label it is, and `first`: "chosen" or "rejected", whichever was shown first;
- `kind`: of the prompt ("" if it has none);
- `taste_chosen`, `taste_rejected`: the noise-free taste. In the test split only, null elsewhere: it is for
  evaluation, and no model may train on it.

TRL's format has no ties: a pair that its annotator calls a tie is dropped, and counted in README.md. Pairs of
a split come from the prompts of that split. A prompt that a held-out split holds too is not sampled for
training.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import hardware
from pipeline.config.checks import check_ranges
from pipeline.data.arguments import DataArguments
from pipeline.data.sources import open_source
from pipeline.data.splits import load_splits
from pipeline.errors import Problem, UserError
from pipeline.files import check_replaceable
from pipeline.models.checks import check_model, check_room
from pipeline.models.generation import encode_prompts, generate
from pipeline.models.loading import load_model
from pipeline.preferences import files
from pipeline.preferences.files import SPLITS, Counts
from pipeline.rewards.annotators import INDIFFERENCE, PANEL, choose, judge_components, mean_taste

logger = logging.getLogger("pipeline.preferences.collect")  # as a launched module its `__name__` is "__main__"

Row = dict[str, Any]


@dataclass
class PreferenceArguments:
    """What to sample, from which model, and where the pairs go.

    Raises:
        UserError: Some number is out of its range.
    """

    model_name_or_path: str = field(
        metadata={"help": "Model whose answers are compared, with a chat template: a Hub id or a folder."}
    )
    dataset_name: str = field(metadata={"help": "Hub id, folder or file that holds the prompts."})
    output_dir: str = field(metadata={"help": "Folder of the data set to write; an earlier one is replaced."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the data set (default: its only one)."}
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column of the prompts: a list of {role, content}, or a question."},
    )
    samples_per_prompt: int = field(default=3, metadata={"help": "Answers sampled to each prompt."})
    pairs_per_prompt: int = field(
        default=2,
        metadata={"help": "Pairs compared for each prompt, at most: identical answers make no pair."},
    )
    max_prompts: int | None = field(default=None, metadata={"help": "Training prompts to use (default: all)."})
    max_eval_prompts: int | None = field(
        default=None, metadata={"help": "Prompts to use of each other split (default: all)."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature."})
    min_p: float = field(
        default=0.0,
        metadata={"help": "Never sample tokens less probable than this share of the most probable one."},
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=384, metadata={"help": "Answers sampled at once by each process."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling and of the annotators."})

    def __post_init__(self) -> None:
        if problems := check_ranges(vars(self)):
            raise UserError(*problems)


def read_prompts(args: PreferenceArguments) -> dict[str, list[Row]]:
    """The rows of each split that there is, in random order, at most as many as asked for.

    Raises:
        UserError: The data set cannot be read, or has no split `train` or no column of prompts.
    """
    source = DataArguments(
        dataset_name=args.dataset_name, dataset_config=args.dataset_config, prompt_column=args.prompt_column
    )
    there = open_source(source)
    held_out: set[str] = set()
    prompts: dict[str, list[Row]] = {}
    for name in reversed(SPLITS):  # the held-out ones first: what they hold is not for training
        if name not in there and name != "train":
            continue
        split, _ = load_splits(replace(source, dataset_train_split=name), "prompt", evaluation=False)
        texts = [str(prompt) for prompt in split["prompt"]]
        kept = [index for index, text in enumerate(texts) if text not in held_out]
        if len(kept) < len(texts):
            logger.warning("%-11s %d prompts that a held-out split holds too", name, len(texts) - len(kept))
        held_out.update(texts)
        random.Random(f"{args.seed}/{name}").shuffle(kept)
        most = args.max_prompts if name == "train" else args.max_eval_prompts
        prompts[name] = split.select(kept[:most]).to_list()
    return {name: prompts[name] for name in SPLITS if name in prompts}


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Mapping[str, Sequence[Row]],
    args: PreferenceArguments,
) -> dict[str, list[list[int]]]:
    """Token ids of the prompts of each split.

    Raises:
        UserError: The chat template refuses one, or one leaves no room for `max_new_tokens`.
    """
    try:
        encoded = {name: encode_prompts(tokenizer, [row["prompt"] for row in rows]) for name, rows in prompts.items()}
    except TemplateError as error:
        remedy = f"its chat template refuses a prompt of the data ({error}); correct one of them"
        raise UserError(Problem("model_name_or_path", args.model_name_or_path, remedy)) from None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt) for split in encoded.values() for prompt in split)
    if problems := check_room("max_new_tokens", args.max_new_tokens, longest, positions):
        raise UserError(*problems)
    return encoded


def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    args: PreferenceArguments,
    seed: int,
) -> list[list[str]]:
    """Sample `args.samples_per_prompt` answers to each prompt.

    Processes take turns at the batches, and each batch has its own seed: with as many threads a process, the number of
    processes changes nothing. (With others, sums are made in another order, and a close call may come out otherwise.)

    Returns:
        The answers to each of `prompts`, on every process.
    """
    state = PartialState()
    size = max(1, args.batch_size // args.samples_per_prompt)
    sampled: list[tuple[int, list[list[str]]]] = []
    for number, start in enumerate(range(0, len(prompts), size)):
        if number % state.num_processes != state.process_index:
            continue
        completions = generate(
            model,
            tokenizer,
            prompts[start : start + size],
            max_new_tokens=args.max_new_tokens,
            samples=args.samples_per_prompt,
            temperature=args.temperature,
            min_p=args.min_p,
            seed=seed + number,
            batch_size=args.batch_size,
        )
        sampled.append((start, [[completion.text for completion in answers] for answers in completions]))
    return [answers for _, batch in sorted(gather_object(sampled)) for answers in batch]


def label_answers(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[Sequence[str]],
    *,
    pairs_per_prompt: int,
    seed: int | str = 0,
    keep_taste: bool = False,
) -> tuple[list[Row], Counts]:
    """Have the simulated annotators compare answers to each prompt.

    Args:
        rows: The prompts' rows: `prompt`, and `kind`, `require`, `reject`, `test` where they have them.
        answers: The answers to each of them; empty ones and repeated ones are dropped.
        pairs_per_prompt: Pairs compared a prompt, at most.
        seed: Of the pairs, annotators, order and noise. Every row draws from a generator of its own, so that
            the answers to one prompt have no influence on the labels of another.
        keep_taste: Whether the noise-free taste is kept; otherwise its columns hold None.

    Returns:
        The labelled pairs, as rows of the data set to write, and what became of the answers.
    """
    labelled: list[Row] = []
    counts = Counts(prompts=len(rows), answers=sum(map(len, answers)))
    agreed = decided = 0
    for index, (row, candidates) in enumerate(zip(rows, answers, strict=True)):
        rng = random.Random(f"{seed}/{index}")
        distinct = list(dict.fromkeys(text for answer in candidates if (text := answer.strip())))
        counts.dropped += len(candidates) - len(distinct)
        components = {answer: judge_components(answer, row) for answer in distinct}
        pairs = list(itertools.combinations(distinct, 2))
        for pair in rng.sample(pairs, min(pairs_per_prompt, len(pairs))):
            shown = rng.sample(pair, 2)
            annotator = rng.choice(PANEL)
            scores = [annotator.weigh(components[answer]) for answer in shown]
            choice = choose(annotator, scores[0], scores[1], rng)
            counts.compared += 1
            if choice is None:
                counts.ties += 1
                continue
            chosen, rejected = shown[choice], shown[1 - choice]
            tastes = mean_taste(components[chosen]), mean_taste(components[rejected])
            if abs(tastes[0] - tastes[1]) >= INDIFFERENCE:
                decided += 1
                agreed += tastes[0] > tastes[1]
            labelled.append(
                {
                    "prompt": row["prompt"],
                    "chosen": [{"role": "assistant", "content": chosen}],
                    "rejected": [{"role": "assistant", "content": rejected}],
                    "annotator": annotator.name,
                    "first": "chosen" if choice == 0 else "rejected",
                    "kind": row.get("kind") or "",
                    "taste_chosen": tastes[0] if keep_taste else None,
                    "taste_rejected": tastes[1] if keep_taste else None,
                }
            )
    counts.pairs = len(labelled)
    counts.agreement = agreed / decided if decided else None
    return labelled, counts


def collect(args: PreferenceArguments) -> dict[str, Counts]:
    """Sample on all processes; label and write on the first.

    Returns:
        What became of the answers of each split; the same on every process.

    Raises:
        UserError: The model, the prompts or the output folder do not do, or no pair came out for training.
    """
    state = PartialState(cpu=hardware.accelerator() is None)
    if problems := check_replaceable(args.output_dir, files.FILES, files.TITLE, args.dataset_name):
        raise UserError(*problems)
    prompts = read_prompts(args)
    model, tokenizer = load_model(args.model_name_or_path, "model_name_or_path")
    if problems := check_model(model.config, tokenizer, args, args.model_name_or_path):
        raise UserError(*problems)
    model.to(state.device)
    encoded = encode(model, tokenizer, prompts, args)
    splits: dict[str, list[Row]] = {}
    counts: dict[str, Counts] = {}
    for number, (name, rows) in enumerate(prompts.items()):
        # Seeds of the splits lie so far apart that those of their batches never meet.
        answers = sample_answers(model, tokenizer, encoded[name], args, seed=(3 * args.seed + number) * 1_000_000)
        splits[name], counts[name] = label_answers(
            rows,
            answers,
            pairs_per_prompt=args.pairs_per_prompt,
            seed=f"{args.seed}/{name}",
            keep_taste=name == "test",
        )
        logger.info("%-11s %s", name, counts[name])
    if not splits["train"]:
        remedy = "no two answers differ enough to be compared; raise temperature or max_prompts"
        raise UserError(Problem("temperature", args.temperature, remedy))
    if state.is_main_process:
        sampled_from = f"`{args.model_name_or_path}` at temperature {args.temperature} (min_p {args.min_p})"
        origin = f"{sampled_from}, to prompts of `{args.dataset_name}`"
        files.write(Path(args.output_dir), splits, counts, origin)
    state.wait_for_everyone()
    state.destroy_process_group()
    return counts
