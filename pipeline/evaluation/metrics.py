"""The metrics of language models, and how each is measured on held-out data; see also `win_rate` and `reward_model`.

To add a metric, write its class and record it in the function of the data that it needs; then describe it (label,
meaning, better direction, digits) in `metric_info.METRICS`.

The classes work offline, unlike `evaluate.load("accuracy")`. `compute` returns `{"value", "ci95": [low, high], "n",
"values"}`: the estimate, its interval or None, the number of independent examples, and the value of each example.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import evaluate
from datasets import Features, List, Value

from pipeline.evaluation import intervals
from pipeline.evaluation.chat_model import ChatModel
from pipeline.evaluation.graders import Grader, grade_rows
from pipeline.evaluation.held_out import Example, HeldOut, subsample
from pipeline.evaluation.likelihood import answer_losses, document_losses
from pipeline.evaluation.results import StageResult
from pipeline.models.generation import Completion, end_tokens, stopped
from pipeline.rewards.answers import extract_answer, normalise_answer, number
from pipeline.rewards.grading import RULE_COLUMNS, grade, has_steps, is_gradable
from pipeline.tools import dialogue

MAX_SAMPLED_PROBLEMS = 64
"""Problems to which several answers are sampled: eight samples each cost more than all greedy answers together."""

NUMBER, STRING = Value("float64"), Value("string")
RULE = {"require": List(List(STRING)), "reject": List(STRING), "max_words": Value("int64"), "test": STRING}


class Metric(evaluate.Metric):
    """A metric that is described by its docstring.

    Attributes:
        inputs: What it is computed from, in words.
        columns: Types of the predictions and, if it has any, of the references.
        paper: Its source.
    """

    inputs = "predictions: answers."
    columns = Features(predictions=STRING)
    paper = ""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.paper,
            inputs_description=self.inputs,
            features=self.columns,
        )


def output(estimate: intervals.Estimate, values: Sequence[float]) -> dict[str, Any]:
    """Return what `compute` of every metric returns."""
    return estimate.to_json() | {"values": values}


def share(outcomes: Iterable[bool]) -> dict[str, Any]:
    """Return what `compute` returns for the share of outcomes that are true, with Wilson's interval."""
    values = list(map(float, outcomes))
    return output(intervals.proportion(values), values)


class BitsPerByte(Metric):
    """Total negative log-likelihood over total bytes: a long document weighs more than a short one.

    It does not depend on the tokenizer. The interval is bootstrapped over documents.
    """

    inputs = "predictions: loss of each document in nats; references: the documents."
    columns = Features(predictions=NUMBER, references=STRING)

    def _compute(self, predictions: list[float], references: list[str], seed: int = 0) -> dict[str, Any]:
        sizes = [len(text.encode()) for text in references]
        bits = [loss / math.log(2) for loss in predictions]
        values = [total / size if size else 0.0 for total, size in zip(bits, sizes, strict=True)]
        return output(intervals.ratio(bits, sizes, seed), values)


class InstructionAccuracy(Metric):
    """The share of answers that are right by the rule of their row: words required and forbidden, length, code tests.

    An answer that runs into the token limit counts if it meets the rule; the stop rate measures whether answers end.
    """

    inputs = "predictions: answers; references: rules, see pipeline.rewards.grading."
    columns = Features(predictions=STRING, references=RULE)

    def _compute(self, predictions: list[str], references: list[dict[str, Any]]) -> dict[str, Any]:
        return share(grade(predictions, references))


class StopRate(Metric):
    """The share of answers that contain an end-of-turn token, that is, end before the token limit."""

    inputs = "predictions: token ids of each answer; eos_token_id: the id, or ids, that end one."
    columns = Features(predictions=List(Value("int64")))

    def _compute(self, predictions: list[list[int]], eos_token_id: int | list[int]) -> dict[str, Any]:
        return share(stopped(tokens, eos_token_id) for tokens in predictions)


class StepRate(Metric):
    """The share of answers with a sentence or an equation before "The answer is", right or wrong."""

    def _compute(self, predictions: list[str]) -> dict[str, Any]:
        return share(map(has_steps, predictions))


class PassAtK(Metric):
    """The probability that at least one of k sampled answers to a problem is right; only final answers are compared.

    The interval is over problems, never over samples.
    """

    inputs = "predictions: sampled answers to each problem; references: final answers; k; rows, for the grader."
    columns = Features(predictions=List(STRING), references=STRING)
    paper = "Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374"

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[str],
        k: int = 1,
        seed: int = 0,
        grader: Grader = grade_rows,
        rows: Sequence[Example] = (),
    ) -> dict[str, Any]:
        # All answers are graded at once, so each of them needs the row of its problem.
        rows = rows or [{"answer": reference} for reference in references]
        row_of = [row for row, answers in zip(rows, predictions, strict=True) for _ in answers]
        verdicts = iter(grader([answer for answers in predictions for answer in answers], row_of))
        right = [sum(islice(verdicts, len(answers))) for answers in predictions]
        values = [estimate_pass_at_k(len(answers), n, k) for answers, n in zip(predictions, right, strict=True)]
        return output(intervals.outcome_mean(values, seed), values)


class MajorityVote(Metric):
    """The share of problems whose most frequent final answer, among the samples, is right.

    Equal numbers are one answer. Samples without a final answer do not vote. Of answers with equally many votes, the
    one that was drawn first counts.
    """

    inputs = "predictions: sampled answers to each problem; references: final answers."
    columns = Features(predictions=List(STRING), references=STRING)
    paper = "Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning, arXiv:2203.11171"

    def _compute(
        self,
        predictions: list[list[str]],
        references: list[str],
        grader: Grader = grade_rows,
        rows: Sequence[Example] = (),
    ) -> dict[str, Any]:
        rows = rows or [{"answer": reference} for reference in references]
        return share(grader(list(map(elect, predictions)), rows))


def elect(answers: Sequence[str]) -> str:
    """Return the first of `answers` with the most frequent final answer, "" if none has one."""
    # "1/2" and "0.5" are one answer, so numbers vote as numbers.
    ballots: dict[Any, list[str]] = {}
    for answer in answers:
        if (final := extract_answer(answer)) is not None:
            value = number(final)
            ballots.setdefault(normalise_answer(final) if value is None else value, []).append(answer)
    return max(ballots.values(), key=len)[0] if ballots else ""


def estimate_pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `n` samples, of which `correct` are right (Chen et al. 2021, eq. 1).

    It is the share of all sets of k of the n samples that contain at least one right sample.

    Raises:
        ValueError: Unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@{k} of {correct} right out of {n} samples")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def measure_texts(result: StageResult, chat: ChatModel, rows: Sequence[Example]) -> None:
    """Record `bits_per_byte`; the `weight` of an example is the document's size in bytes."""
    documents = [row["text"] for row in rows]
    losses = document_losses(chat.model, chat.tokenizer, documents, context=_window(chat))
    _record_bits(result, "bits_per_byte", losses, documents, rows)


def measure_answers(result: StageResult, chat: ChatModel, rows: Sequence[Example]) -> None:
    """Record `answer_bits_per_byte` of the held-out answers to instructions that nothing grades."""
    conversations = [row["messages"] for row in rows]
    found = answer_losses(chat.model, chat.tokenizer, conversations, context=_window(chat), template=chat.template)
    scored = [(row, loss, text) for row, (loss, text) in zip(rows, found, strict=True) if text]
    if scored:
        kept, losses, texts = zip(*scored, strict=True)
        _record_bits(result, "answer_bits_per_byte", losses, texts, kept)


def _window(chat: ChatModel) -> int:
    """Return how many tokens are scored at once. More would take more memory for hardly any gain in bits."""
    return min(chat.positions or 1024, 1024)


def _record_bits(
    result: StageResult, name: str, losses: Sequence[float], texts: Sequence[str], rows: Sequence[Example]
) -> None:
    bits = BitsPerByte().compute(predictions=losses, references=texts, seed=result.seed)
    weights = [{"weight": len(text.encode())} for text in texts]
    result.record(name, bits, rows, by_kind=None, extras=weights)


def measure_instructions(result: StageResult, chat: ChatModel, held_out: HeldOut) -> None:
    """Record `instruction_accuracy`, where answers can be graded, `stop_rate` and `mean_length` of greedy answers."""
    rows, grader = held_out.instructions, held_out.graders.get("instructions")
    completions = chat.greedy([row["messages"][:-1] for row in rows])
    graded = [i for i, row in enumerate(rows) if grader or is_gradable(row)]
    if graded:
        some, texts = [rows[i] for i in graded], [completions[i].text for i in graded]
        if grader:
            # A conversation is a problem whose reference is the last message, unless the row has an answer.
            problems = [
                {"answer": row["messages"][-1]["content"], **row, "prompt": row["messages"][:-1]} for row in some
            ]
            accuracy = share(grader(texts, problems))
        else:
            rules = [{column: row[column] for column in RULE_COLUMNS} for row in some]
            accuracy = InstructionAccuracy().compute(predictions=texts, references=rules)
        result.record("instruction_accuracy", accuracy, some, extras=[{"answer": text} for text in texts])
    record_ends(result, chat, completions, rows, "mean_length")


def measure_problems(result: StageResult, chat: ChatModel, held_out: HeldOut, samples: int) -> None:
    """Record `pass@1`, `step_rate`, `reasoning_length` (greedy), `pass@1_sampled`, and `pass@k` and `maj@k` for
    k = `samples`; the stop rate as well if it is not measured on instructions.

    At most `MAX_SAMPLED_PROBLEMS` problems get `samples` answers each, at temperature 1. `maj@k` needs samples that can
    vote.
    """
    rows, grader = held_out.problems, held_out.graders["problems"]
    # One greedy answer to every problem.
    completions = [completion for (completion,) in chat.answer(rows)]
    answers = [completion.text for completion in completions]
    values = record_greedy(result, "pass@1", answers, rows, grader)
    result.record("step_rate", StepRate().compute(predictions=answers), rows)
    record_ends(result, chat, completions, rows, "reasoning_length")
    if chat.toolbox is not None:
        record_calls(result, completions, values, rows)
    for row, completion, value in zip(rows, completions, values, strict=True):
        # The report shows the first problem of each kind.
        if all(trace["kind"] != row["kind"] for trace in result.traces):
            trace = {"kind": row["kind"], "problem": row["prompt"][-1]["content"], "reference": row.get("answer") or ""}
            result.traces.append({**trace, "answer": readable(completion), "correct": bool(value)})

    # Several sampled answers to some of them.
    some = subsample(rows, MAX_SAMPLED_PROBLEMS)
    sampled = chat.answer(some, samples=samples, temperature=1.0, seed=result.seed)
    answered: dict[str, Any] = {
        "predictions": [[completion.text for completion in completions] for completions in sampled],
        "references": [str(row.get("answer") or "") for row in some],
        "grader": grader,
        "rows": some,
    }
    result.record("pass@1_sampled", PassAtK().compute(k=1, seed=result.seed, **answered), some)
    if samples > 1:
        result.record(f"pass@{samples}", PassAtK().compute(k=samples, seed=result.seed, **answered), some)
    if samples > 1 and held_out.can_vote:
        result.record(f"maj@{samples}", MajorityVote().compute(**answered), some)


def record_calls(
    result: StageResult, completions: Sequence[Completion], values: Sequence[float], rows: Sequence[Example]
) -> None:
    """Record `tool_calls` of greedy answers, and `tool_score`: 1 if one is right, minus what its calls cost.

    A call costs the `call_cost` of its row. Without this column, there is no score.
    """
    calls = [float(sum(len(one.get("tool_calls") or ()) for one in completion.messages)) for completion in completions]
    result.record("tool_calls", output(intervals.mean(calls, result.seed), calls), rows, by_kind=intervals.mean)
    if all("call_cost" in row for row in rows):
        costs = [number * row["call_cost"] for number, row in zip(calls, rows, strict=True)]
        scores = [value - cost for value, cost in zip(values, costs, strict=True)]
        result.record("tool_score", output(intervals.mean(scores, result.seed), scores), rows, by_kind=intervals.mean)


def record_greedy(
    result: StageResult, name: str, answers: Sequence[str], rows: Sequence[Example], grader: Grader
) -> list[float]:
    """Record under `name` how many of the answers, one to each problem, are right. Returns 1 or 0 for each."""
    references = [str(row.get("answer") or "") for row in rows]
    predictions = [[text] for text in answers]
    greedy = PassAtK().compute(predictions=predictions, references=references, k=1, grader=grader, rows=rows)
    # The report breaks pass@1 down by the length of problems, if their rows have one.
    extras = [
        {"answer": text, **({"length": row["length"]} if "length" in row else {})}
        for text, row in zip(answers, rows, strict=True)
    ]
    result.record(name, greedy, rows, extras=extras)
    values: list[float] = greedy["values"]
    return values


def readable(completion: Completion) -> str:
    """Return an answer as reports show it, with calls and results; why there is nothing to read, if there is not."""
    if completion.messages:
        return dialogue.readable(completion.messages)
    if completion.text.strip():
        return completion.text
    # The text is without special tokens; white space is text.
    tokens = f"{len(completion.tokens)} tokens that are not shown: white space, or special ones"
    return f"(nothing: {tokens})" if len(completion.tokens) > 1 else "(nothing: it ended at once)"


def record_ends(
    result: StageResult, chat: ChatModel, completions: Sequence[Completion], rows: Sequence[Example], name: str
) -> None:
    """Record the length of the answers under `name`, and `stop_rate` unless it has been measured on other answers."""
    if "stop_rate" not in result.metrics:
        tokens = [completion.tokens for completion in completions]
        stops = StopRate().compute(predictions=tokens, eos_token_id=end_tokens(chat.model, chat.tokenizer))
        result.record("stop_rate", stops, rows)
    lengths = [float(len(completion.tokens)) for completion in completions]
    result.record(name, output(intervals.mean(lengths, result.seed), lengths), rows, by_kind=intervals.mean)
