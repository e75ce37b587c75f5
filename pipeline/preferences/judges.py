"""Judges, who say which of two answers to a prompt is better: the annotators, a reward model, or a function.

A function is a reward function, `package.module:function`: the answer with the higher reward wins. If it has a
parameter `opponents`, it judges the pairs itself: 1 for an answer that wins, 0 for one that loses, and 0.5 for a tie.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from zlib import crc32

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline import hardware
from pipeline.data.messages import Row, as_messages
from pipeline.errors import Problem, UserError
from pipeline.models.kernels.token_trees import share_beginnings
from pipeline.models.loading import is_reward_model, load_config, load_model, user_error_for
from pipeline.models.tokenizer import escape_tokens, special_tokens
from pipeline.rewards.grading import is_gradable
from pipeline.rewards.loading import call_reward, load_reward

BATCH_TOKENS = 8192
"""Tokens in a batch of conversations to score, padding included."""
Match = Callable[[Sequence[Any], Sequence[Any], Sequence[Row]], Sequence[float | None]]
"""Answers (texts or messages), their opponents, rows -> 1 for a win, 0 for a loss, 0.5 for a tie, None if unknown."""


@dataclass(frozen=True)
class Judge:
    """A judge.

    Attributes:
        name: How reports name it.
        match: Judges answers.
        needs_rules: Whether it only judges prompts whose rows have grading rules.
        constants: Number of prompts, with many matches each, on which the text of the baseline `constant` is chosen.
        preferred_column: Column of answers that are preferred to all others; None if answers are judged.
    """

    name: str
    match: Match
    needs_rules: bool = False
    constants: int = 16
    preferred_column: str | None = None

    def can_judge(self, row: Row) -> bool:
        """Return whether it can judge answers to the prompt of this row."""
        if self.preferred_column is not None:
            preferred = row.get(self.preferred_column)
            return isinstance(preferred, str) and bool(preferred.strip())
        return not self.needs_rules or is_gradable(row)


def load_annotators() -> ModuleType:
    """Import the simulated annotators. They belong to pocket's world, not to the library, and are built in."""
    return importlib.import_module("recipes.worlds.pocket.annotators")


def match_by_taste(answers: Sequence[str], opponents: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Judge as the simulated annotators do, without noise: a `Match`."""
    return load_annotators().judge_match(answers, opponents, rows)


ANNOTATORS = Judge("annotators who do not know which is which", match_by_taste, needs_rules=True, constants=1000)


def load_judge(name: str | None) -> Judge:
    """Load a judge.

    Args:
        name: A reward model (folder or Hub id) or `package.module:function`. None means the annotators.

    Raises:
        UserError: If it cannot be loaded, or is not a reward model.
    """
    if name is None:
        return ANNOTATORS
    if ":" in name:
        return Judge(f"the function {name}", _match_by_function(load_reward(name, "judge")))
    with user_error_for("judge", name):
        config = load_config(name)
    if not is_reward_model(config):
        raise UserError(Problem("judge", name, "is not a reward model; give one, or package.module:function"))
    model, tokenizer = load_model(name, "judge", reward=True, dtype=torch.float32)
    model.to(hardware.accelerator() or "cpu")
    return Judge(f"the reward model {name}", _match_by_score(model, tokenizer))


def prefer_column(column: str) -> Judge:
    """Return a judge who prefers the answer that a column of the prompts has, if it is one of two."""

    def match(answers: Sequence[Any], opponents: Sequence[Any], rows: Sequence[Row]) -> list[float]:
        ours = [float(answer == row[column].strip()) for answer, row in zip(answers, rows, strict=True)]
        theirs = [float(opponent == row[column].strip()) for opponent, row in zip(opponents, rows, strict=True)]
        return compare(ours, theirs)

    return Judge(f"whoever wrote the column `{column}`, whose answer is preferred", match, preferred_column=column)


def _match_by_function(function: Callable[..., Any]) -> Match:
    """Return what judges by a reward function, which may judge pairs itself."""
    judges_pairs = "opponents" in inspect.signature(function).parameters

    def match(answers: Sequence[Any], opponents: Sequence[Any], rows: Sequence[Row]) -> list[float]:
        if judges_pairs:
            messages = list(map(as_messages, opponents))
            return _as_numbers(call_reward(function, answers, rows, opponents=messages))
        ours = _as_numbers(call_reward(function, answers, rows))
        theirs = _as_numbers(call_reward(function, opponents, rows))
        return compare(ours, theirs)

    return match


def _as_numbers(rewards: Sequence[float | None]) -> list[float]:
    """Return rewards as numbers; None, from a function without an opinion, counts as 0."""
    return [float(reward or 0.0) for reward in rewards]


def _match_by_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Match:
    """Return what judges by the scores of a reward model."""

    def match(answers: Sequence[Any], opponents: Sequence[Any], rows: Sequence[Row]) -> list[float]:
        conversations = []
        for row, answer in [*zip(rows, answers, strict=True), *zip(rows, opponents, strict=True)]:
            conversations.append([*row["prompt"], *as_messages(answer)])
        # Scored together, so that answers in several pairs are scored once.
        scores = score(model, tokenizer, conversations)
        return compare(scores[: len(rows)], scores[len(rows) :])

    return match


def compare(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Return 1 where a score is higher than its opponent's, 0 where it is lower, and 0.5 where they are equal."""
    outcomes = []
    for our_score, their_score in zip(ours, theirs, strict=True):
        outcomes.append(0.5 if our_score == their_score else float(our_score > their_score))
    return outcomes


def chance(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Return random rewards, equal for equal answers: a judge for control experiments."""
    return [float(crc32(f"{pair}".encode())) for pair in zip(prompts, completions, strict=True)]


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[dict[str, str]]],
    batch_tokens: int = BATCH_TOKENS,
) -> list[float]:
    """Return the reward model's score of each conversation, which ends with the assistant's answer.

    Equal conversations are scored once, or they would differ in their last bits. If one exceeds the context, only its
    end is scored.

    Args:
        model: A sequence classifier with one label.
        tokenizer: A tokenizer with a chat template.
        conversations: Lists of messages.
        batch_tokens: Number of tokens per batch, with padding.
    """
    model.eval()
    shares = share_beginnings(model)
    pattern = special_tokens(tokenizer)
    config = model.config.get_text_config()
    # Without a limit, `[-0:]` keeps all tokens.
    positions = getattr(config, "max_position_embeddings", None) or 0
    encoded = []
    for conversation in conversations:
        ids = tokenizer.apply_chat_template(escape_tokens(conversation, pattern), return_dict=False)
        encoded.append(tuple(ids[-positions:]))
    pad = config.pad_token_id
    # Conversations that begin alike are in one batch, or else those of similar length.
    remaining = sorted(set(encoded), key=lambda ids: (0 if shares else len(ids), ids))
    scores: dict[tuple[int, ...], float] = {}
    while remaining:
        batch = [remaining.pop()]
        width = len(batch[0])
        # Without a pad token, transformers cannot find the last token of a padded row.
        while pad is not None and remaining and (len(batch) + 1) * max(width, len(remaining[-1])) <= batch_tokens:
            batch.append(remaining.pop())
            width = max(width, len(batch[-1]))
        padded = []
        mask = []
        for ids in batch:
            padding = width - len(ids)
            padded.append([*ids, *[pad] * padding])
            mask.append([1] * len(ids) + [0] * padding)
        inputs = torch.tensor(padded, device=model.device)
        logits = model(input_ids=inputs, attention_mask=torch.tensor(mask, device=model.device)).logits
        scores |= dict(zip(batch, logits[:, 0].tolist(), strict=True))
    return [scores[ids] for ids in encoded]
