"""The metrics of language models, and how each is measured on held-out data; see also `win_rate` and `reward_model`.

To add a metric, write its function and its class, and record it in the function of the data that it needs; then
describe it (label, meaning, better direction, digits) in `metric_info.METRICS`. A run calls the functions. The classes
offer them to users of the library `evaluate`, and work offline, unlike `evaluate.load`.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice
from typing import Any

from datasets import Features, List, Value

from pipeline.evaluation import intervals
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.likelihood import answer_losses, document_losses
from pipeline.evaluation.parts import Rows, subsample
from pipeline.evaluation.results import StageResult
from pipeline.files import as_list
from pipeline.models.generation import Completion, end_tokens
from pipeline.rewards.answers import extract_answer, normalise_answer, number
from pipeline.rewards.graders import Grader, grade_rows
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
    """Return the mean of outcomes from 0 to 1, one for each example, in the form that every metric has.

    Returns:
        `{"value", "ci95": [low, high], "n", "values"}`: the estimate of the mean, its interval (None if it is not
        known), the number of independent examples, and the outcomes.
    """
    values = list(map(float, outcomes))
    return intervals.outcome_mean(values, seed).to_json() | {"values": values}


def bits_per_byte(predictions: Sequence[float], references: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Total negative log-likelihood over total bytes: a long document weighs more than a short one.

    It does not depend on the tokenizer. Predictions are the loss of each document in nats, references the documents.
    The interval is bootstrapped over documents.
    """
    sizes = [len(text.encode()) for text in references]
    bits = [loss / math.log(2) for loss in predictions]
    values = []
    for total, size in zip(bits, sizes, strict=True):
        values.append(total / size if size else 0.0)
    return intervals.ratio(bits, sizes, seed).to_json() | {"values": values}


def instruction_accuracy(predictions: Sequence[str], references: Rows, seed: int = 0) -> dict[str, Any]:
    """The share of answers that are right by the rule of their row: words required and forbidden, length, code tests.

    `pipeline.rewards.grading` describes the rules. An answer that runs into the token limit counts if it meets the
    rule; the stop rate measures whether answers end.
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
    over problems, never over samples. Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code,
    arXiv:2107.03374.
    """
    # All answers are graded at once, so each of them needs the row of its problem.
    row_of_answer = []
    for row, answers in zip(rows, predictions, strict=True):
        row_of_answer += [row] * len(answers)
    verdicts = iter(grader(list(chain.from_iterable(predictions)), row_of_answer))
    shares = []
    for answers in predictions:
        correct = sum(islice(verdicts, len(answers)))
        shares.append(estimate_pass_at_k(len(answers), correct, k))
    return summarise(shares, seed)


def majority_vote(
    predictions: Sequence[Sequence[str]], rows: Rows, grader: Grader = grade_rows, seed: int = 0
) -> dict[str, Any]:
    """The share of problems whose most frequent final answer, among the samples, is right; inputs as for `pass_at_k`.

    Equal numbers are one answer. Samples without a final answer do not vote. Of answers with equally many votes, the
    first one drawn counts. Source: Wang et al. 2022, Self-Consistency Improves Chain of Thought Reasoning,
    arXiv:2203.11171.
    """
    return summarise(grader([elect(answers) for answers in predictions], rows), seed)


def elect(answers: Sequence[str]) -> str:
    """Return the first of `answers` with the most frequent final answer, "" if none has a final answer."""
    ballots: dict[Any, list[str]] = {}
    for answer in answers:
        final = extract_answer(answer)
        if final is None:
            continue
        # "1/2" and "0.5" are one answer, so numbers vote as numbers.
        choice: Any = number(final)
        if choice is None:
            choice = normalise_answer(final)
        ballots.setdefault(choice, []).append(answer)
    if not ballots:
        return ""
    return max(ballots.values(), key=len)[0]


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

    It is the share of all sets of k of the n samples that contain at least one right sample. The plug-in estimate,
    1 - (1 - correct / n)^k, is too low on average.

    Raises:
        ValueError: Unless 1 <= k <= n and 0 <= correct <= n.
    """
    if not (1 <= k <= n and 0 <= correct <= n):
        raise ValueError(f"pass@{k} of {correct} right out of {n} samples")
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def single_answers(answered: Sequence[Sequence[Completion]]) -> list[Completion]:
    """Return the only completion of each prompt, if each was answered once."""
    return [completion for (completion,) in answered]


def measure_bits(result: StageResult, chat: ChatModel, rows: Rows, answers_only: bool = False) -> None:
    """Record `bits_per_byte` of documents or, if `answers_only`, `answer_bits_per_byte` of the last messages of rows.

    The `weight` of an example is the size of its text in bytes.
    """
    # Scoring more tokens at once would take more memory and hardly change the bits.
    context = min(chat.positions or 1024, 1024)
    if answers_only:
        name = "answer_bits_per_byte"
        conversations = [row["messages"] for row in rows]
        scores = answer_losses(chat.model, chat.tokenizer, conversations, context=context, template=chat.template)
    else:
        name = "bits_per_byte"
        documents = [row["text"] for row in rows]
        losses_of_documents = document_losses(chat.model, chat.tokenizer, documents, context)
        scores = list(zip(losses_of_documents, documents, strict=True))
    # An answer beyond the context is not scored at all.
    scored = [(row, loss, text) for row, (loss, text) in zip(rows, scores, strict=True) if text]
    if scored:
        scored_rows, losses, texts = zip(*scored, strict=True)
        weights = [{"weight": len(text.encode())} for text in texts]
        bits = bits_per_byte(losses, texts, result.seed)
        result.record(name, bits, scored_rows, by_kind=False, extras=weights)


def measure_instructions(result: StageResult, chat: ChatModel, held_out: HeldOut) -> None:
    """Record `instruction_accuracy` (of gradable answers), `stop_rate` and `mean_length` of greedy answers."""
    rows = held_out.instructions
    completions = single_answers(chat.sample([row["messages"][:-1] for row in rows]))
    gradable = []
    texts = []
    for row, completion in zip(rows, completions, strict=True):
        if is_gradable(row):
            gradable.append(row)
            texts.append(completion.text)
    if gradable:
        rules = [{column: row[column] for column in RULE_COLUMNS} for row in gradable]
        accuracy = instruction_accuracy(texts, rules)
        result.record("instruction_accuracy", accuracy, gradable, extras=[{"answer": text} for text in texts])
    record_ends(result, chat, completions, rows, "mean_length")


def measure_problems(result: StageResult, chat: ChatModel, held_out: HeldOut, samples: int) -> None:
    """Record how problems are answered, greedily and `samples` times at temperature 1.

    Greedy answers give `pass@1`, `step_rate` and `reasoning_length`, and `stop_rate` unless `measure_instructions` has
    recorded it. With tools, they also give `tool_calls` and, if the rows have a `call_cost`, `tool_score`. Sampled
    answers give the metrics of `measure_samples`.

    If only an environment rewards the problems (`held_out.graded` is False), no answer is known to be right: `pass@1`,
    `tool_score` and the metrics of sampled answers are left out.
    """
    rows = held_out.problems
    completions = single_answers(chat.answer(rows))
    answers = [completion.text for completion in completions]
    right: list[bool] | None = None
    if held_out.graded:
        right = list(map(bool, record_greedy(result, "pass@1", answers, rows, held_out.grader)))
    else:
        result.left_out.append("pass@1: not measured, because the problems lack answers; an environment rewards them")
    result.record("step_rate", step_rate(answers), rows)
    record_ends(result, chat, completions, rows, "reasoning_length")
    if chat.toolbox is not None:
        record_calls(result, rows, completions, right)
    record_rewards(result, chat, rows, completions)
    # The report shows the first problem of each kind and its answer.
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        if any(trace["kind"] == row["kind"] for trace in result.traces):
            continue
        trace = {"kind": row["kind"], "problem": row["prompt"][-1]["content"], "reference": row.get("answer") or ""}
        trace |= {"answer": readable(completion), "correct": None if right is None else right[index]}
        result.traces.append(trace)
    if held_out.graded:
        measure_samples(result, chat, held_out, samples)


def measure_samples(result: StageResult, chat: ChatModel, held_out: HeldOut, samples: int) -> None:
    """Record `pass@1_sampled`, `pass@k` and `maj@k` with k = `samples`, of the problems of `sampled_problems`.

    Each gets `samples` answers at temperature 1. `maj@k` needs answers that can vote.
    """
    rows = sampled_problems(held_out.problems, samples)
    completions = chat.answer(rows, samples=samples, temperature=1.0, seed=result.seed)
    texts = [[completion.text for completion in of_problem] for of_problem in completions]
    grader = held_out.grader
    result.record("pass@1_sampled", pass_at_k(texts, rows, 1, grader, result.seed), rows)
    if samples > 1:
        result.record(f"pass@{samples}", pass_at_k(texts, rows, samples, grader, result.seed), rows)
    if samples > 1 and held_out.can_vote:
        result.record(f"maj@{samples}", majority_vote(texts, rows, grader), rows)


def sampled_problems(rows: Rows, samples: int) -> Rows:
    """Return the problems that get `samples` answers each: 64, or more if samples are fewer than eight."""
    return subsample(rows, max(MAX_SAMPLED_PROBLEMS, 8 * MAX_SAMPLED_PROBLEMS // samples))


def record_greedy(result: StageResult, name: str, answers: Sequence[str], rows: Rows, grader: Grader) -> list[bool]:
    """Record under `name` the share of right answers, one to each problem. Return whether each is right."""
    right = grader(answers, rows)
    extras: list[dict[str, Any]] = []
    for answer, row in zip(answers, rows, strict=True):
        extra: dict[str, Any] = {"answer": answer}
        # The report breaks pass@1 down by the length of problems, if their rows have one.
        if "length" in row:
            extra["length"] = row["length"]
        extras.append(extra)
    result.record(name, right, rows, extras=extras)
    return right


def record_calls(
    result: StageResult, rows: Rows, completions: Sequence[Completion], right: Sequence[bool] | None
) -> None:
    """Record `tool_calls` and, if the rows have a `call_cost`, `tool_score`.

    The score is 1 if an answer is right, else 0, minus what its calls cost. `right` is None if the answers cannot be
    graded; then there is no score.
    """
    calls = []
    for completion in completions:
        calls.append(sum(len(turn.get("tool_calls") or ()) for turn in completion.messages))
    result.record("tool_calls", calls, rows, how=intervals.mean)
    if right is not None and all("call_cost" in row for row in rows):
        scores = [value - number * row["call_cost"] for value, number, row in zip(right, calls, rows, strict=True)]
        result.record("tool_score", scores, rows, how=intervals.mean)


def record_rewards(result: StageResult, chat: ChatModel, rows: Rows, completions: Sequence[Completion] = ()) -> None:
    """Record `environment_reward`, what environments with a `get_reward` give greedy answers, as in training.

    Without `completions`, the rows are answered. The opponent also gets the baseline `untouched`: the same
    environments, in which nothing is called.
    """
    toolbox = chat.toolbox
    if toolbox is None or not hasattr(toolbox.environment, "get_reward"):
        return
    if not completions:
        completions = single_answers(chat.answer(rows))
    environments = {"environment_reward": [completion.environment for completion in completions]}
    if result.name == result.against:
        untouched = [toolbox.environment_of(toolbox.open(row)[1]) for row in rows]
        environments["untouched/environment_reward"] = untouched
    for name, played in environments.items():
        rewards = []
        rewarded_rows = []
        for environment, row in zip(played, rows, strict=True):
            reward = environment.get_reward()
            if inspect.iscoroutine(reward):
                reward = asyncio.run(reward)
            # None means that the environment has no opinion.
            if reward is not None:
                rewards.append(reward)
                rewarded_rows.append(row)
        if rewards:
            result.record(name, rewards, rewarded_rows, how=intervals.mean)


def record_ends(result: StageResult, chat: ChatModel, completions: Sequence[Completion], rows: Rows, name: str) -> None:
    """Record the mean length of answers in tokens under `name`, and `stop_rate` unless it has been recorded."""
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
    if len(completion.tokens) <= 1:
        return "(nothing: it ended at once)"
    # The text is without special tokens; white space is text.
    return f"(nothing: {len(completion.tokens)} tokens that are not shown: white space, or special ones)"
