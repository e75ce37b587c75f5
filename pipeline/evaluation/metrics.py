"""The metrics of language models, and how each is measured on held-out data; see also `win_rate` and `reward_model`.

To add a metric, write its function and its class, and record it in the function of the data that it needs; then
describe it (label, meaning, better direction, digits) in `metric_info.METRICS`. A run calls the functions. The classes
offer them to users of the library `evaluate`, and work offline, unlike `evaluate.load`.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from datasets import Features, List, Value

from pipeline.evaluation import intervals
from pipeline.evaluation.graders import Grader, grade_rows
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.likelihood import answer_losses, document_losses
from pipeline.evaluation.parts import Rows, subsample
from pipeline.evaluation.results import StageResult
from pipeline.files import as_list
from pipeline.models.generation import Completion, end_tokens
from pipeline.rewards.answers import extract_answer, normalise_answer, number
from pipeline.rewards.grading import RULE_COLUMNS, grade, has_steps, is_gradable
from pipeline.tools import dialogue
from pipeline.tools.chat_model import ChatModel

try:
    from evaluate import Metric as Module
    from evaluate import MetricInfo
except ImportError:
    # Without the library, nobody computes a metric by its class.
    Module = object  # type: ignore[assignment,misc]

MAX_SAMPLED_PROBLEMS = 64
"""Problems to which eight answers are sampled, which cost more than all greedy answers together."""
NUMBER, STRING = Value("float64"), Value("string")
RULE = {"require": List(List(STRING)), "reject": List(STRING), "max_words": Value("int64"), "test": STRING}


class Metric(Module):
    """A metric as a module of the library `evaluate`, where that is installed.

    `measure` computes it, and needs no library. `columns` are the types of its first arguments: predictions and, in
    some, references.
    """

    columns = Features(predictions=STRING)
    measure: Callable[..., dict[str, Any]]

    def _info(self) -> Any:
        return MetricInfo(description=type(self).measure.__doc__ or "", citation="", features=self.columns)

    def _compute(self, *_: Any, **inputs: Any) -> dict[str, Any]:
        columns = [inputs.pop(name) for name in self.columns]
        return type(self).measure(*columns, **inputs)


def summarise(outcomes: Iterable[float], seed: int = 0) -> dict[str, Any]:
    """Return `{"value", "ci95": [low, high], "n", "values"}` of outcomes from 0 to 1, one for each example.

    That is the estimate of their mean, its interval or None, the number of independent examples, and the outcomes.
    """
    values = list(map(float, outcomes))
    return intervals.outcome_mean(values, seed).to_json() | {"values": values}


def bits_per_byte(predictions: Sequence[float], references: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Total negative log-likelihood over total bytes, independent of the tokenizer; long documents weigh more.

    Predictions are the loss of each document in nats, references the documents. The interval is over documents.
    """
    sizes = [len(text.encode()) for text in references]
    bits = [loss / math.log(2) for loss in predictions]
    values = [total / size if size else 0.0 for total, size in zip(bits, sizes, strict=True)]
    return intervals.ratio(bits, sizes, seed).to_json() | {"values": values}


def instruction_accuracy(predictions: Sequence[str], references: Rows, seed: int = 0) -> dict[str, Any]:
    """The share of answers that are right by the rule of their row, see `pipeline.rewards.grading`.

    An answer that runs into the token limit counts if it meets the rule; the stop rate measures whether answers end.
    """
    return summarise(grade(predictions, references), seed)


def stop_rate(predictions: Sequence[Sequence[int]], eos_token_id: int | list[int], seed: int = 0) -> dict[str, Any]:
    """The share of answers, as token ids, that contain an end-of-turn token, and so end before the token limit."""
    ends = set(as_list(eos_token_id))
    return summarise((not ends.isdisjoint(tokens) for tokens in predictions), seed)


def step_rate(predictions: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """The share of answers with a sentence or an equation before "The answer is", right or wrong."""
    return summarise(map(has_steps, predictions), seed)


def pass_at_k(
    predictions: Sequence[Sequence[str]], rows: Rows, k: int = 1, grader: Grader = grade_rows, seed: int = 0
) -> dict[str, Any]:
    """The probability that at least one of k sampled answers to a problem is right; only final answers are compared.

    Predictions are the sampled answers to each problem, and `rows` the problems with their `answer`. The interval is
    over problems. Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code, arXiv:2107.03374.
    """
    # All answers are graded at once, so each of them needs the row of its problem.
    row_of = [row for row, answers in zip(rows, predictions, strict=True) for _ in answers]
    verdicts = iter(grader([answer for answers in predictions for answer in answers], row_of))
    right = [sum(islice(verdicts, len(answers))) for answers in predictions]
    shares = (estimate_pass_at_k(len(answers), n, k) for answers, n in zip(predictions, right, strict=True))
    return summarise(shares, seed)


def majority_vote(
    predictions: Sequence[Sequence[str]], rows: Rows, grader: Grader = grade_rows, seed: int = 0
) -> dict[str, Any]:
    """The share of problems whose most frequent final answer, among the samples, is right; inputs as for `pass_at_k`.

    Samples without a final answer do not vote. Of answers with equally many votes, the first one drawn counts. Source:
    Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning, arXiv:2203.11171.
    """
    elected = []
    for answers in predictions:
        # "1/2" and "0.5" are one answer, so numbers vote as numbers.
        ballots: dict[Any, list[str]] = {}
        for answer in answers:
            if (final := extract_answer(answer)) is not None:
                value = number(final)
                ballots.setdefault(normalise_answer(final) if value is None else value, []).append(answer)
        elected.append(max(ballots.values(), key=len)[0] if ballots else "")
    return summarise(grader(elected, rows), seed)


class BitsPerByte(Metric):
    columns = Features(predictions=NUMBER, references=STRING)
    measure = staticmethod(bits_per_byte)


class InstructionAccuracy(Metric):
    columns = Features(predictions=STRING, references=RULE)
    measure = staticmethod(instruction_accuracy)


class StopRate(Metric):
    columns = Features(predictions=List(Value("int64")))
    measure = staticmethod(stop_rate)


class StepRate(Metric):
    measure = staticmethod(step_rate)


class PassAtK(Metric):
    columns = Features(predictions=List(STRING))
    measure = staticmethod(pass_at_k)


class MajorityVote(Metric):
    columns = Features(predictions=List(STRING))
    measure = staticmethod(majority_vote)


def estimate_pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of pass@k from `n` samples, of which `correct` are right (Chen et al. 2021, eq. 1).

    It is the share of sets of k samples with a right one. Raise a ValueError unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@{k} of {correct} right out of {n} samples")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def measure_bits(result: StageResult, chat: ChatModel, rows: Rows, of_answers: bool = False) -> None:
    """Record `bits_per_byte` of documents or, `of_answers`, `answer_bits_per_byte` of the last messages of rows."""
    # Scoring more tokens at once would take more memory and hardly change the bits.
    context = min(chat.positions or 1024, 1024)
    if of_answers:
        conversations = [row["messages"] for row in rows]
        found = answer_losses(chat.model, chat.tokenizer, conversations, context=context, template=chat.template)
    else:
        documents = [row["text"] for row in rows]
        found = list(zip(document_losses(chat.model, chat.tokenizer, documents, context), documents, strict=True))
    # An answer beyond the context is not scored at all.
    scored = [(row, loss, text) for row, (loss, text) in zip(rows, found, strict=True) if text]
    if scored:
        kept, losses, texts = zip(*scored, strict=True)
        bits = bits_per_byte(losses, texts, result.seed)
        # An example is weighted by the bytes of its text.
        weights = [{"weight": len(text.encode())} for text in texts]
        result.record(f"{'answer_' * of_answers}bits_per_byte", bits, kept, by_kind=False, extras=weights)


def measure_instructions(result: StageResult, chat: ChatModel, held_out: HeldOut) -> None:
    """Record `instruction_accuracy` (of gradable answers), `stop_rate` and `mean_length` of greedy answers."""
    rows = held_out.instructions
    completions = [completion for (completion,) in chat.sample([row["messages"][:-1] for row in rows])]
    graded = [(row, completion.text) for row, completion in zip(rows, completions, strict=True) if is_gradable(row)]
    if graded:
        some, texts = zip(*graded, strict=True)
        rules = [{column: row[column] for column in RULE_COLUMNS} for row in some]
        accuracy = instruction_accuracy(texts, rules)
        result.record("instruction_accuracy", accuracy, some, extras=[{"answer": text} for text in texts])
    record_ends(result, chat, completions, rows, "mean_length")


def measure_problems(result: StageResult, chat: ChatModel, held_out: HeldOut, samples: int) -> None:
    """Record `pass@1`, `step_rate`, `reasoning_length` (greedy), `pass@1_sampled`, `pass@k` and `maj@k`, k = `samples`.

    The problems of `sampled_problems` get `samples` answers each, at temperature 1. `maj@k` needs samples that can
    vote. With tools, also `tool_calls` and, given a `call_cost`, `tool_score`: 1 if an answer is right, minus what its
    calls cost; without instructions, also `stop_rate`. Problems that only an environment rewards have no right answers.
    """
    rows, grader = held_out.problems, held_out.grader
    completions = [completion for (completion,) in chat.answer(rows)]
    answers = [completion.text for completion in completions]
    right: Sequence[Any] = [None] * len(rows)
    if held_out.graded:
        right = list(map(bool, record_greedy(result, "pass@1", answers, rows, grader)))
    else:
        result.left_out.append("pass@1: not measured, because the problems lack answers; an environment rewards them")
    result.record("step_rate", step_rate(answers), rows)
    record_ends(result, chat, completions, rows, "reasoning_length")
    if chat.toolbox is not None:
        calls = [sum(len(one.get("tool_calls") or ()) for one in completion.messages) for completion in completions]
        result.record("tool_calls", calls, rows, how=intervals.mean)
        if held_out.graded and all("call_cost" in row for row in rows):
            scores = [value - called * row["call_cost"] for value, called, row in zip(right, calls, rows, strict=True)]
            result.record("tool_score", scores, rows, how=intervals.mean)
    record_rewards(result, chat, rows, completions)
    # The report shows the first problem of each kind.
    for row, completion, value in zip(rows, completions, right, strict=True):
        if all(trace["kind"] != row["kind"] for trace in result.traces):
            trace = {"kind": row["kind"], "problem": row["prompt"][-1]["content"], "reference": row.get("answer") or ""}
            result.traces.append({**trace, "answer": readable(completion), "correct": value})
    if not held_out.graded:
        return

    some = sampled_problems(rows, samples)
    sampled = chat.answer(some, samples=samples, temperature=1.0, seed=result.seed)
    texts = [[completion.text for completion in of_problem] for of_problem in sampled]
    result.record("pass@1_sampled", pass_at_k(texts, some, 1, grader, result.seed), some)
    if samples > 1:
        result.record(f"pass@{samples}", pass_at_k(texts, some, samples, grader, result.seed), some)
    if samples > 1 and held_out.can_vote:
        result.record(f"maj@{samples}", majority_vote(texts, some, grader), some)


def sampled_problems(rows: Rows, samples: int) -> Rows:
    """Return the problems that get `samples` answers each: 64, or more if samples are fewer than eight."""
    return subsample(rows, max(MAX_SAMPLED_PROBLEMS, 8 * MAX_SAMPLED_PROBLEMS // samples))


def record_greedy(result: StageResult, name: str, answers: Sequence[str], rows: Rows, grader: Grader) -> list[bool]:
    """Record under `name` the share of right answers, one to each problem. Return whether each is right."""
    right = grader(answers, rows)
    # The report breaks pass@1 down by the length of problems, if their rows have one.
    lengths = [{"length": row["length"]} if "length" in row else {} for row in rows]
    extras = [{"answer": text, **length} for text, length in zip(answers, lengths, strict=True)]
    result.record(name, right, rows, extras=extras)
    return right


def record_rewards(result: StageResult, chat: ChatModel, rows: Rows, completions: Sequence[Completion] = ()) -> None:
    """Record `environment_reward`, what environments with a `get_reward` give greedy answers, as in training.

    The opponent also gets the baseline `untouched`: the same environments, in which nothing is called.
    """
    toolbox = chat.toolbox
    if toolbox is None or not hasattr(toolbox.environment, "get_reward"):
        return
    completions = completions or [completion for (completion,) in chat.answer(rows)]
    played = {"environment_reward": [completion.environment for completion in completions]}
    if result.name == result.against:
        played["untouched/environment_reward"] = [toolbox.environment_of(toolbox.open(row)[1]) for row in rows]
    for name, environments in played.items():
        given = [environment.get_reward() for environment in environments]
        given = [asyncio.run(reward) if inspect.iscoroutine(reward) else reward for reward in given]
        # None means that the environment has no opinion.
        known = [(reward, row) for reward, row in zip(given, rows, strict=True) if reward is not None]
        if known:
            result.record(name, *zip(*known, strict=True), how=intervals.mean)


def record_ends(result: StageResult, chat: ChatModel, completions: Sequence[Completion], rows: Rows, name: str) -> None:
    """Record the length of the answers under `name`, and `stop_rate` unless other answers already measured it."""
    tokens = [completion.tokens for completion in completions]
    if "stop_rate" not in result.metrics:
        stops = stop_rate(tokens, end_tokens(chat.model, chat.tokenizer))
        result.record("stop_rate", stops, rows)
    result.record(name, list(map(len, tokens)), rows, how=intervals.mean)


def readable(completion: Completion) -> str:
    """Return an answer as reports show it, with calls and results, or say why there is nothing to read."""
    if completion.messages:
        return dialogue.readable(completion.messages)
    if completion.text.strip():
        return completion.text
    # The text is without special tokens; white space is text.
    tokens = f"{len(completion.tokens)} tokens that are not shown: white space, or special ones"
    return f"(nothing: {tokens})" if len(completion.tokens) > 1 else "(nothing: it ended at once)"
