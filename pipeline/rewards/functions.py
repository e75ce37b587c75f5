"""Verifiable rewards: functions of completions and a reference, with TRL's reward signature.

Each takes `completions` (texts or lists of messages) and the columns of the data set by name, and returns one reward
per completion: 0.0 or 1.0 (`reasoning_gym` also what lies between), or None if the reference answer cannot be read, so
that nothing is learned from the row. TRL passes `log_metric` to every function; it gets the shares of completions
without a readable answer and of unreadable references as `<name>/unparseable` and `<name>/unparseable_references`.
`hidden_taste`, on the annotators' scale, is only for measuring.

`pipeline.rewards.answers` decides what the answer of a completion is. Only the last message of the assistant is read,
and a prompt repeated at the beginning of a completion is cut off.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.rewards import math_check, task_check
from pipeline.rewards.annotators import taste
from pipeline.rewards.answers import (
    MAX_ANSWER_LENGTH,
    MAX_TEXT_LENGTH,
    count_answers,
    extract_answer,
    normalise_answer,
    number,
    same_answer,
    unwrap,
)
from pipeline.rewards.grading import extract_code
from pipeline.rewards.sandbox.run import run_many

Completion = str | Sequence[dict[str, Any]]
LogMetric = Callable[[str, float], None]
Rewards = list[float | None]

_WORDS = re.compile(r"[^\W\d_]{2,}(?:\s+[^\W\d_]{2,})*")
_DELIMITERS = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ()\[\]]|\$|(?<=\\)[dtc](?=frac)")
_POWER = re.compile(r"\^|\*\*|\d[eE][-+]?\d|[⁰¹²³⁴-⁹]")
_PERCENT = re.compile(r"\s*(?:\\?%|\bper\s?cent(?:age)?s?\b)", re.IGNORECASE)
_LETTER = re.compile(
    r"(?:option|choice|letter)?\s*(?:\(([a-z])\)|\[([a-z])\]|([a-z])\)?)"
    r"(?:(?:[.):,]|\s[—–-]\s|\s(?=\()|(?<=\))\s|\\\s)(.*))?",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_LETTER = re.compile(
    r"(?<!\w)(?:[B-HJ-Z](?!\w|['’])|[AI](?!\w|['’]|\s+(?!is\b|and\b|or\b|too\b)[a-z]))|[(\[][a-z][)\]]|(?<!\w)[a-z]\)|^\W*[a-z](?:\W*$|\W*[,.:;/)])"
    r"|^\W*(?:[Oo]r|and|nor|not?|wrong|incorrect|maybe|is\s+(?:not|wrong))\b"
)
"""Another letter in what follows the answer's, or a word that takes it back."""


def math_answer(
    completions: Sequence[Completion],
    answer: Sequence[str],
    prompts: Sequence[Completion] | None = None,
    log_metric: LogMetric | None = None,
    **columns: Any,
) -> Rewards:
    r"""Return 1.0 if the final answer equals the reference mathematically, as "0.5", "1/2" and `\frac{1}{2}` do.

    If the reference is a plain number, the answer must be a value, too: "14 + 6" and "40/2" are not 20. Otherwise it
    must be as simple as the reference, and factored or expanded as that is (`pipeline.rewards.math_check`): the problem
    is not its solution. Times, dates and scores ("3:30") are compared as text. "36%" is 36 only if the reference has a
    per cent sign, too, or the problem speaks of per cent.

    Args:
        completions: Texts, or lists of messages that end with the assistant's.
        answer: Reference answers, bare ("72") or in any form that a completion's final answer may have.
        prompts: The prompts, as TRL passes them.
        log_metric: TRL's callback.

    Returns:
        One reward per completion; None if the reference is empty or consists of words (see `exact_answer`).
    """
    references = [_reference(text) for text in answer]
    found = _answers(completions, references, prompts)
    rewards: Rewards = []
    pending: list[tuple[int, math_check.Question]] = []
    for index, (reference, given) in enumerate(zip(references, found, strict=True)):
        if reference is None or _WORDS.fullmatch(normalise_answer(reference)):
            rewards.append(None)
            continue
        copied = given is not None and prompts is not None and _is_copied(given, _problem(prompts[index]))
        same = given is not None and same_answer(reference, given) and not (copied and _POWER.search(given))
        if number(reference) is None:  # otherwise the answer must be a value, and algebra would accept an unsolved sum
            pending.append((index, (reference, None if same else given, copied)))
        rewards.append(float(same))
    if pending:
        _settle(rewards, pending)
    _log("math_answer", found, rewards, log_metric)
    return rewards


def exact_answer(
    completions: Sequence[Completion],
    answer: Sequence[str],
    prompts: Sequence[Completion] | None = None,
    log_metric: LogMetric | None = None,
    **columns: Any,
) -> Rewards:
    """Return 1.0 if the final answer is the reference; case, spaces, article, quotes and final punctuation may differ.

    Plain numbers are compared by value ("1,000" is "1000"). The reward is None if the reference is empty. Arguments are
    those of `math_answer`.
    """
    references = [_reference(text) for text in answer]
    found = _answers(completions, references, prompts)
    rewards: Rewards = [
        None if reference is None else float(given is not None and same_answer(reference, given))
        for reference, given in zip(references, found, strict=True)
    ]
    _log("exact_answer", found, rewards, log_metric)
    return rewards


def choice(
    completions: Sequence[Completion],
    answer: Sequence[str],
    prompts: Sequence[Completion] | None = None,
    log_metric: LogMetric | None = None,
    **columns: Any,
) -> Rewards:
    """Return 1.0 if the final answer is the reference's letter: "B", "(b)", "B) because …", "option B"; not "A or B".

    The reward is None if the reference is not a single letter. Arguments are those of `math_answer`.
    """
    found = [_letter(extract_answer(text)) for text in _texts(completions, prompts)]
    references = [_letter(_reference(text)) or _letter(str(text)) for text in answer]
    rewards: Rewards = [
        None if reference is None else float(given == reference)
        for reference, given in zip(references, found, strict=True)
    ]
    _log("choice", found, rewards, log_metric)
    return rewards


def answer_format(
    completions: Sequence[Completion],
    prompts: Sequence[Completion] | None = None,
    log_metric: LogMetric | None = None,
    **columns: Any,
) -> Rewards:
    """Return 1.0 if a completion states exactly one final answer, right or wrong; give this reward a low weight."""
    texts = _texts(completions, prompts)
    found = [extract_answer(text) for text in texts]
    rewards: Rewards = [
        float(given is not None and count_answers(text) == 1) for text, given in zip(texts, found, strict=True)
    ]
    _log("answer_format", found, rewards, log_metric)
    return rewards


def code_tests(
    completions: Sequence[Completion],
    test: Sequence[str],
    prompts: Sequence[Completion] | None = None,
    log_metric: LogMetric | None = None,
    **columns: Any,
) -> Rewards:
    """Return 1.0 if the code in a completion (its first fenced block, or all of it) passes its test in a sandbox.

    `test` has Python assertions about what the code defines (see `pipeline.rewards.sandbox.run`). The reward is None if
    they are empty or not valid Python, or if the machine is too busy. Other arguments are those of `math_answer`.
    """
    found = [_python(extract_code(text)) for text in _texts(completions, prompts)]
    tests = [_python(text) for text in test]
    rewards: Rewards = [None if one is None else 0.0 for one in tests]
    _log("code_tests", found, rewards, log_metric)
    work = [(i, code, one) for i, (code, one) in enumerate(zip(found, tests, strict=True)) if code and one]
    for (index, _, _), outcome in zip(work, run_many([(code, one) for _, code, one in work]), strict=True):
        rewards[index] = None if outcome.status == "busy" else float(outcome.passed)
    return rewards


def reasoning_gym(
    completions: Sequence[Completion],
    answer: Sequence[str],
    metadata: Sequence[str],
    kind: Sequence[str],
    prompts: Sequence[Completion] | None = None,
    log_metric: LogMetric | None = None,
    **columns: Any,
) -> Rewards:
    """Return the score, 0 to 1, that the verifier of reasoning-gym's task gives the final answer.

    Only 1.0 means that it is right: most verifiers pay a little for answers that are nearly right, or for any answer.
    A verifier that pays nonsense in full is not believed: its rows score 0 (`pipeline.rewards.task_check`).
    What is between `<answer>` and `</answer>` is judged as it is written, because verifiers know the form of an answer.

    Args:
        completions: As for `math_answer`, like `prompts` and `log_metric`.
        answer: The task's own answers.
        metadata: What the task knows about each problem, as JSON text.
        kind: Names of the tasks.

    Returns:
        One reward per completion; None if the task or its metadata are unknown, or if the machine is too busy.
    """
    found = [_final_answer(text) for text in _texts(completions, prompts)]
    problems = [_problem(prompts[index]) if prompts is not None else "" for index in range(len(found))]
    rows = zip(kind, problems, map(str, answer), metadata, (given or "" for given in found), strict=True)
    scores = task_check.score(list(rows))
    # A verifier may pay for an empty answer, too.
    rewards: Rewards = [score and score * (given is not None) for score, given in zip(scores, found, strict=True)]
    _log("reasoning_gym", found, rewards, log_metric)
    return rewards


def hidden_taste(
    completions: Sequence[Completion],
    require: Sequence[Sequence[Sequence[str]]] | None = None,
    reject: Sequence[Sequence[str]] | None = None,
    test: Sequence[str] | None = None,
    prompts: Sequence[Completion] | None = None,
    **columns: Any,
) -> Rewards:
    """Return the simulated annotators' noise-free taste, which a reward model tries to learn.

    Logged with weight 0, it shows whether the taste rises with the reward model's score. The recipes refuse any other
    weight: the taste is hidden from everything that is trained (see `pipeline.rewards.annotators`).

    `require`, `reject` and `test` are the columns that `pipeline.rewards.grading` describes. The score is None if there
    is a test, because running code at every step would take longer than the training.
    """
    rewards: Rewards = []
    for index, text in enumerate(_texts(completions, prompts)):
        rule = {"require": require, "reject": reject, "prompt": prompts}
        row = {name: values and values[index] for name, values in rule.items()}
        rewards.append(None if test is not None and test[index] else taste(text, row))
    return rewards


REWARDS: dict[str, Callable[..., Rewards]] = {
    function.__name__: function
    for function in (math_answer, exact_answer, choice, answer_format, code_tests, reasoning_gym, hidden_taste)
}

MEASURED_ONLY: tuple[Callable[..., Rewards], ...] = (hidden_taste,)
"""Rewards that may not be trained on: their weight must be 0."""


def _settle(rewards: Rewards, pending: list[tuple[int, math_check.Question]]) -> None:
    """Ask math-verify what a comparison as text or as numbers left open; references that do not parse give None."""
    references = sorted({question[0] for _, question in pending})
    readable = math_check.compare([(reference, None, False) for reference in references])
    parsed = dict(zip(references, readable, strict=True))
    asked = [(index, question) for index, question in pending if question[1] is not None and parsed[question[0]]]
    for (index, _), same in zip(asked, math_check.compare([question for _, question in asked]), strict=True):
        rewards[index] = None if same is None else float(same)
    for index, (reference, _, _) in pending:
        if not parsed[reference]:
            rewards[index] = None


def _reference(text: object) -> str | None:
    """Return the answer in a reference column: the announced answer, or all of the text; None if it is empty."""
    text = str(text) if isinstance(text, str | int | float) and not isinstance(text, bool) else ""
    if len(text) > MAX_ANSWER_LENGTH:
        return extract_answer(text)
    return extract_answer(text) or unwrap(text) or None


def _answers(
    completions: Sequence[Completion], references: Sequence[str | None], prompts: Sequence[Completion] | None
) -> list[str | None]:
    """Return the final answers, without a per cent sign that the problem asks for and the reference leaves out."""
    found = [extract_answer(text) for text in _texts(completions, prompts)]
    for index, (given, reference) in enumerate(zip(found, references, strict=True)):
        if given is None or prompts is None or _PERCENT.search(reference or ""):
            continue
        if _PERCENT.search(_problem(prompts[index])):
            found[index] = _PERCENT.sub("", given)
    return found


def _is_copied(answer: str, problem: str) -> bool:
    """Return whether an answer is a part of the problem, whatever the spaces and delimiters."""
    answer, problem = (
        re.sub(r" ?([^\w\s]) ?", r"\1", " ".join(_DELIMITERS.sub("", text[-MAX_TEXT_LENGTH:]).casefold().split()))
        for text in (answer, problem)
    )
    return re.search(rf"(?<![^\W_]){re.escape(answer)}(?![^\W_])", problem) is not None


def _final_answer(text: str) -> str | None:
    """Return the final answer in a text; one between `<answer>` and `</answer>` as it is written, quotes and all."""
    final = extract_answer(text)
    start = text.rfind("<answer>") + len("<answer>")
    end = text.find("</answer>", start, start + MAX_ANSWER_LENGTH + len("</answer>"))
    tagged = text[start:end].strip() if start >= len("<answer>") and end >= 0 else None
    return tagged if tagged is not None and final == unwrap(tagged) else final


def _problem(prompt: Completion) -> str:
    """Return the text of a prompt, or of its last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _texts(completions: Sequence[Completion], prompts: Sequence[Completion] | None) -> list[str]:
    texts = []
    for index, completion in enumerate(completions):
        if not isinstance(completion, str):
            last = completion[-1] if completion else {}
            texts.append(str(last.get("content") or "") if last.get("role", "assistant") == "assistant" else "")
            continue
        prompt = prompts[index] if prompts is not None else None
        texts.append(completion.removeprefix(prompt) if isinstance(prompt, str) else completion)
    return texts


def _letter(answer: str | None) -> str | None:
    answer = re.sub(r"\\(?:text(?:bf|rm|it)?|math(?:bf|rm))\s*\{([^{}]*)\}", r"\1", answer or "").replace("**", "")
    match = _LETTER.fullmatch(answer)
    if match is None or _OTHER_LETTER.search(match[4] or ""):
        return None
    return (match[1] or match[2] or match[3]).upper()


def _python(source: object) -> str | None:
    if not isinstance(source, str) or not source.strip():
        return None
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the parser raises any of these on hostile source
        return None
    return source


def _log(name: str, found: Sequence[object], rewards: Rewards, log_metric: LogMetric | None) -> None:
    if log_metric is not None and rewards:
        log_metric(f"{name}/unparseable", sum(answer is None for answer in found) / len(found))
        log_metric(f"{name}/unparseable_references", sum(reward is None for reward in rewards) / len(rewards))
