"""The metrics of preference: answers of two models to the same prompts, and a judge who says which are better.

The answers of the stage that others are compared with are saved with its evaluation, and used by those of the others.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Features

from pipeline.evaluation import intervals
from pipeline.evaluation.chat_model import ChatModel
from pipeline.evaluation.held_out import Example
from pipeline.evaluation.metrics import STRING, Metric, output
from pipeline.evaluation.results import StageResult
from pipeline.files import hash_file
from pipeline.preferences.judges import ANNOTATORS, Judge
from pipeline.rewards.annotators import judge_match

Matches = dict[str, tuple[list[str], list[str]]]
"""`win_rate` (sampled) and `win_rate_greedy` -> answers to the same prompts by a model and by its opponent."""

FILES = ("*config.json", "*token*.json", "tokenizer.model", "vocab.*", "merges.txt", "*.jinja", "*.safetensors")
"""Files of a model that its answers depend on; records of its training lie beside them."""


class WinRate(Metric):
    """The mean outcome: 1 for a win, 0 for a loss, 0.5 for a tie."""

    inputs = "predictions: answers; references: the opponent's; rows: what they answer; outcomes: a judge's."
    columns = Features(predictions=STRING, references=STRING)

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        rows: Sequence[Mapping[str, Any]],
        seed: int = 0,
        outcomes: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        values = judge_match(predictions, references, rows) if outcomes is None else outcomes
        return output(intervals.outcome_mean(values, seed), values)


class LastSentenceShare(Metric):
    """The share of answers that end in their most frequent last sentence: 1 if all end in the same one."""

    inputs = "predictions: answers."
    columns = Features(predictions=STRING)

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        # "It is red. Have a nice day!" ends in "have a nice day".
        last = [re.split(r"[.!?]\s+", answer.strip())[-1].rstrip(".!?").casefold() for answer in predictions]
        ((most, _),) = Counter(last).most_common(1)
        values = [float(sentence == most) for sentence in last]
        return output(intervals.proportion(values), values)


def answer_both(
    chat: ChatModel, opponent: ChatModel | Mapping[str, list[str]], rows: Sequence[Example], seed: int = 0
) -> Matches:
    """Answer the prompts by both models, at temperature 1 and greedily; the opponent's answers may be given.

    The opponent samples with a different seed, so that a model against itself does not tie every time.
    """
    prompts = [row["prompt"] for row in rows]
    ours = [c[0].text for c in chat.sample(prompts, temperature=1.0, seed=2 * seed)]
    greedy = [completion.text for completion in chat.greedy(prompts)]
    if isinstance(opponent, Mapping):
        return {"win_rate": (ours, opponent["win_rate"]), "win_rate_greedy": (greedy, opponent["win_rate_greedy"])}
    theirs = [c[0].text for c in opponent.sample(prompts, temperature=1.0, seed=2 * seed + 1)]
    other = greedy if opponent is chat else [completion.text for completion in opponent.greedy(prompts)]
    return {"win_rate": (ours, theirs), "win_rate_greedy": (greedy, other)}


def measure_matches(
    result: StageResult, matches: Matches, rows: Sequence[Example], seed: int = 0, judge: Judge = ANNOTATORS
) -> None:
    """Record `win_rate` and `win_rate_greedy`, and how many answers end alike in both."""
    for name, (ours, theirs) in matches.items():
        record_wins(result, name, ours, theirs, rows, seed, judge)
        ends = LastSentenceShare().compute(predictions=ours)
        result.record(name.replace("win_rate", "last_sentence_share"), ends, rows, by_kind=None)


def record_wins(
    result: StageResult,
    name: str,
    ours: Sequence[str],
    theirs: Sequence[str],
    rows: Sequence[Example],
    seed: int,
    judge: Judge = ANNOTATORS,
) -> None:
    """Record under `name` how often `ours` win against `theirs`, of the matches of which the judge has an opinion."""
    # People may not have voted on a match yet.
    judged = [
        (answer, other, row, outcome)
        for answer, other, row, outcome in zip(ours, theirs, rows, judge.match(ours, theirs, rows), strict=True)
        if outcome is not None
    ]
    if len(judged) < len(rows):
        result.left_out.append(f"{name}: {len(rows) - len(judged)} of {len(rows)} matches have not been judged")
    if not judged:
        return
    ours, theirs, rows, outcomes = map(list, zip(*judged, strict=True))
    wins = WinRate().compute(predictions=ours, references=theirs, rows=rows, seed=seed, outcomes=outcomes)
    extras = [{"answer": a, "opponent": b} for a, b in zip(ours, theirs, strict=True)]
    result.record(name, wins, rows, extras=extras)


def fingerprint(model: Path, rows: Sequence[Example], **settings: object) -> str:
    """Return a hash of all that the answers of the model in `model` to `rows` depend on on one machine.

    It is empty for an adapter, whose base model may change elsewhere, and for a model that is not on this disk.
    """
    if (model / "adapter_config.json").exists() or not model.is_dir():
        return ""
    # Other releases, threads or kernels may sample other answers from the same weights.
    software = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    digest = hashlib.sha256(json.dumps([software, settings, rows], sort_keys=True, default=str).encode())
    for path in sorted({path for pattern in FILES for path in model.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(hash_file(path)))
    return digest.hexdigest()


def saved_answers(folder: Path, stage: str, wanted: str) -> dict[str, list[str]] | None:
    """Return what a stage answered when it was evaluated, by metric; None unless its fingerprint is `wanted`.

    `folder` is that of the evaluations.
    """
    notes: list[str] = []
    saved = StageResult.read(folder / f"{stage}.json", notes)
    if not wanted or saved.opponent != wanted or notes:
        return None
    answers: dict[str, list[str]] = {"win_rate": [], "win_rate_greedy": []}
    for example in saved.examples:
        if example["metric"] in answers and "opponent" in example:
            answers[example["metric"]].append(str(example["opponent"]))
    # The examples may be missing, or those of an earlier release.
    return answers if all(answers.values()) else None
