"""The measurements of a language model, one function for each kind of held-out data."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.evaluation import intervals
from pipeline.evaluation.held_out import Row, pick
from pipeline.evaluation.likelihood import document_losses
from pipeline.evaluation.metrics.bits_per_byte import BitsPerByte
from pipeline.evaluation.metrics.instruction_accuracy import InstructionAccuracy
from pipeline.evaluation.metrics.pass_at_k import PassAtK
from pipeline.evaluation.metrics.step_rate import StepRate
from pipeline.evaluation.metrics.stop_rate import StopRate
from pipeline.evaluation.metrics.win_rate import WinRate
from pipeline.evaluation.results import StageResult
from pipeline.models.generation import Completion, encode_prompts, generate

MOST_SAMPLED_PROBLEMS = 64
"""Problems to which several answers are sampled: eight each cost more than all greedy answers together."""

Estimate = dict[str, Any]


@dataclass(frozen=True)
class Speaker:
    """A language model with its tokenizer, and how long its answers may get, in tokens."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int

    def answer(self, prompts: Sequence[Any], **options: Any) -> list[list[Completion]]:
        """Completions of conversations; `options` as in `generate`."""
        encoded = encode_prompts(self.tokenizer, prompts)
        return generate(self.model, self.tokenizer, encoded, max_new_tokens=self.max_new_tokens, **options)

    def greedy(self, prompts: Sequence[Any]) -> list[Completion]:
        """The one greedy completion of each conversation."""
        return [completions[0] for completions in self.answer(prompts)]


def record(
    result: StageResult,
    name: str,
    estimate: Estimate,
    rows: Sequence[Row],
    *,
    values: Sequence[float] | None = None,
    summary: Callable[..., Estimate] | None = intervals.outcome_mean,
    units: Sequence[Hashable] | None = None,
    extras: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Add a metric to `result`: as a whole, by kind of example, and the value of every example.

    Args:
        result: what the metric is added to.
        name: of the metric.
        estimate: what a metric of the project returned.
        rows: the examples; `id` and `kind` are used.
        values: one a row; those in `estimate` by default.
        summary: makes the estimates by kind; None leaves them out, as does having one kind only.
        units: what each row is of, if several may be of the same.
        extras: further fields of each example, its answer for instance.
    """
    values = estimate["values"] if values is None else values
    entry = {key: estimate[key] for key in ("value", "ci95", "n")}
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    if summary is not None and len(kinds) > 1:
        entry["by_kind"] = {}
        for kind in sorted(kinds):
            of_kind = [i for i, row in enumerate(rows) if row["kind"] == kind]
            grouped = {} if units is None else {"units": [units[i] for i in of_kind]}
            entry["by_kind"][kind] = summary([values[i] for i in of_kind], **grouped)
    result.metrics[name] = entry
    for row, value, extra in zip(rows, values, extras or [{}] * len(rows), strict=True):
        example = {"metric": name, "id": row["id"], "kind": row["kind"], "value": float(value), **extra}
        result.examples.append(example)


def texts(result: StageResult, speaker: Speaker, rows: Sequence[Row], seed: int = 0) -> None:
    """Add `bits_per_byte`; an example's `weight` is the document's bytes."""
    documents = [row["text"] for row in rows]
    context = getattr(speaker.model.config, "max_position_embeddings", None) or 512
    losses = document_losses(speaker.model, speaker.tokenizer, documents, context=min(context, 1024))
    estimate = BitsPerByte().compute(predictions=losses, references=documents, seed=seed)
    weights = [{"weight": len(document.encode())} for document in documents]
    record(result, "bits_per_byte", estimate, rows, summary=None, extras=weights)


def instructions(result: StageResult, speaker: Speaker, rows: Sequence[Row], seed: int = 0) -> None:
    """Add `instruction_accuracy`, `stop_rate` and `mean_length` (tokens) of greedy answers."""
    completions = speaker.greedy([row["messages"][:-1] for row in rows])
    rules = [{field: row[field] for field in ("require", "reject", "max_words", "test")} for row in rows]
    answers = [completion.text for completion in completions]
    accuracy = InstructionAccuracy().compute(predictions=answers, references=rules)
    record(result, "instruction_accuracy", accuracy, rows, extras=[{"answer": text} for text in answers])
    tokens = [completion.tokens for completion in completions]
    stops = StopRate().compute(predictions=tokens, eos_token_id=speaker.tokenizer.eos_token_id)
    record(result, "stop_rate", stops, rows)
    _lengths(result, "mean_length", completions, rows, seed)


def problems(result: StageResult, speaker: Speaker, rows: Sequence[Row], samples: int, seed: int = 0) -> None:
    """Add `pass@1`, `step_rate`, `reasoning_length` (greedy), `pass@1_sampled` and `pass@k` (samples).

    At most `MOST_SAMPLED_PROBLEMS` problems get `samples` answers each, at temperature 1.
    """
    completions = speaker.greedy([row["prompt"] for row in rows])
    references = [row["answer"] for row in rows]
    answers = [completion.text for completion in completions]
    greedy = PassAtK().compute(predictions=[[text] for text in answers], references=references, k=1)
    record(result, "pass@1", greedy, rows, extras=[{"answer": text} for text in answers])
    record(result, "step_rate", StepRate().compute(predictions=answers), rows)
    _lengths(result, "reasoning_length", completions, rows, seed)
    for row, text, value in zip(rows, answers, greedy["values"], strict=True):
        if all(trace["kind"] != row["kind"] for trace in result.traces):
            trace = {"kind": row["kind"], "problem": row["prompt"][-1]["content"], "reference": row["answer"]}
            result.traces.append({**trace, "answer": text, "correct": bool(value)})

    if samples < 1:
        return
    some = pick(rows, MOST_SAMPLED_PROBLEMS)
    drawn = speaker.answer([row["prompt"] for row in some], samples=samples, temperature=1.0, seed=seed)
    predictions = [[completion.text for completion in completions] for completions in drawn]
    references = [row["answer"] for row in some]
    for k, name in ((1, "pass@1_sampled"), (samples, f"pass@{samples}")):
        if k > 1 or name == "pass@1_sampled":
            estimate = PassAtK().compute(predictions=predictions, references=references, k=k, seed=seed)
            record(result, name, estimate, some)


def match(result: StageResult, speaker: Speaker, opponent: Speaker, rows: Sequence[Row], seed: int = 0) -> None:
    """Add `win_rate`: sampled answers of both, at temperature 1, judged by the annotators.

    The opponent draws with another seed, so that a model against itself is a match and not a row of ties.
    """
    prompts = [row["prompt"] for row in rows]
    ours = [c[0].text for c in speaker.answer(prompts, temperature=1.0, seed=2 * seed)]
    theirs = [c[0].text for c in opponent.answer(prompts, temperature=1.0, seed=2 * seed + 1)]
    estimate = WinRate().compute(predictions=ours, references=theirs, rows=rows, seed=seed)
    extras = [{"answer": a, "opponent": b} for a, b in zip(ours, theirs, strict=True)]
    record(result, "win_rate", estimate, rows, extras=extras)


def fixed_prompts(result: StageResult, speaker: Speaker) -> None:
    """Add the greedy answers to `FIXED_PROMPTS`."""
    completions = speaker.greedy([[{"role": "user", "content": prompt}] for prompt in FIXED_PROMPTS])
    result.answers = [
        {"prompt": prompt, "answer": completion.text}
        for prompt, completion in zip(FIXED_PROMPTS, completions, strict=True)
    ]


def _lengths(result: StageResult, name: str, completions: Sequence[Completion], rows: Sequence[Row], seed: int) -> None:
    lengths = [float(len(completion.tokens)) for completion in completions]
    record(result, name, intervals.mean(lengths, seed), rows, values=lengths, summary=intervals.mean)


FIXED_PROMPTS: tuple[str, ...] = (
    "What is an LLM?",
    "Can you explain what a fox is?",
    "I would like to know where to find a piano.",
    "Can you say what a hedgehog does?",
    "I would like to know how big a lion is.",
    "Can you tell me something about a tokenizer?",
    "Can you summarise this in one sentence? It was warm. One day Julia painted a hedgehog in the park. "
    "Carl had never painted a hedgehog. You know a hedgehog by sharp spines. Carl found Julia in the park.",
    "I would like a function add_7 that adds 7 to a number.",
    "Sam has 14 coins. Sam finds 5 coins. Sam sells 3 coins. Sam gets 4 coins. How many are left?",
    "Greta has children of ages 3, 2, 9, 1, 6. Which age comes third?",
)
"""Greedy answers to these are in `evaluations/<stage>.json`, the first one first."""
