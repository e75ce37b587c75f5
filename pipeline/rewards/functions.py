"""Verifiable rewards: functions of completions and a reference, with TRL's reward signature.

Each function gets `completions` (texts, or lists of messages that end with the assistant's) and the data set's columns
by name. It returns one reward per completion: 0.0 or 1.0 (`reasoning_gym` also values between), or None if the
reference cannot be read, so that nothing is learned from the row. With TRL's `log_metric`, it logs the shares of
completions without a readable answer and of unreadable references: `NAME/unparseable`, `NAME/unparseable_references`.

`pipeline.rewards.answers` decides what the answer of a completion is.
"""

import ast
import contextlib
import re
from collections.abc import Sequence
from typing import Any

from pipeline.rewards import answers
from pipeline.rewards.checker import Checker
from pipeline.rewards.grading import extract_code
from pipeline.rewards.sandbox.run import run_many

Completion = str | Sequence[dict[str, Any]]
"""A text, or the messages of a conversation."""
Rewards = list[float | None]

# Only words, at least two letters each.
_WORDS = re.compile(r"[^\W\d_]{2,}(?:\s+[^\W\d_]{2,})*")
# What changes the look of a formula but not its meaning: \left, \, and $, and the first letter of \dfrac.
_DELIMITERS = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,;:! ()\[\]]|\$|(?<=\\)[dtc](?=frac)")
_POWER = re.compile(r"\^|\*\*|\d[eE][-+]?\d|[⁰¹²³⁴-⁹]")
_PERCENT = re.compile(r"\s*(?:\\?%|\bper\s?cent(?:age)?s?\b)", re.IGNORECASE)
# A choice, such as "B", "(b)" or "option B", and in the last group what follows it.
_LETTER = re.compile(
    r"(?:option|choice|letter)?\s*(?:\(([a-z])\)|\[([a-z])\]|([a-z])\)?)"
    r"(?:(?:[.):,]|\s[—–-]\s|\s(?=\()|(?<=\))\s|\\\s)(.*))?",
    re.IGNORECASE | re.DOTALL,
)
# Another choice in what follows the first one, or a word that retracts it.
_OTHER_LETTER = re.compile(
    r"(?<!\w)(?:[B-HJ-Z](?!\w|['’])|[AI](?!\w|['’]|\s+(?!is\b|and\b|or\b|too\b)[a-z]))|[(\[][a-z][)\]]|(?<!\w)[a-z]\)|^\W*[a-z](?:\W*$|\W*[,.:;/)])"
    r"|^\W*(?:[Oo]r|and|nor|not?|wrong|incorrect|maybe|is\s+(?:not|wrong))\b"
)

math_judge = Checker("pipeline.rewards.math_judge", "math-verify, which math_answer", slow=False)
task_judge = Checker("pipeline.rewards.task_check", "reasoning-gym, which the reward reasoning_gym", slow=0.0)


def math_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> Rewards:
    r"""Return 1.0 if the final answer equals the reference mathematically, as "0.5", "1/2" and `\frac{1}{2}` do.

    If the reference is a plain number, the answer must be a value, too: "14 + 6" and "40/2" are not 20. Otherwise it
    must be as simple as the reference, and factored or expanded in the same way (`pipeline.rewards.math_judge`). Times,
    dates and scores ("3:30") are compared as text. "36%" only equals 36 if the reference or the problem is about per
    cent. A reference is bare ("72") or in any form that a completion's final answer may have. The reward is None if it
    is empty or consists of words (see `exact_answer`).
    """
    finals, references, problems = _read_answers(completions, answer, columns)
    rewards: Rewards = []
    # What a comparison as text or numbers leaves open, by row: arguments of `pipeline.rewards.math_judge.judge`. The
    # answer is None if it is the same text, and only the question remains whether the reference can be read.
    questions: dict[int, tuple[str, str | None, bool]] = {}
    for index, (reference, final) in enumerate(zip(references, finals, strict=True)):
        if reference is None or _WORDS.fullmatch(answers.normalise_answer(reference)):
            rewards.append(None)
            continue
        is_copied = final is not None and _is_copied(final, problems[index])
        is_same = final is not None and answers.same_answer(reference, final)
        # "What is 2^5?" is not answered by "2^5".
        if is_same and is_copied and _POWER.search(final or ""):
            is_same = False
        rewards.append(float(is_same))
        # If the reference is a plain number, the comparison above is final: algebra would accept an unsolved sum.
        if answers.number(reference) is None:
            questions[index] = (reference, None if is_same else final, is_copied)

    verdicts = []
    if questions:
        verdicts = math_judge.ask_all(list(questions.values()))
    for (index, (_, final, _)), verdict in zip(questions.items(), verdicts, strict=True):
        if final is not None and verdict is not None:
            rewards[index] = float(verdict)
        # Nothing is learned from references that cannot be read, even if the answer is the same text.
        elif not verdict:
            rewards[index] = None
    return _log_unparseable("math_answer", finals, rewards, columns)


def exact_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> Rewards:
    """Return 1.0 if the final answer is the reference; case, spaces, article, quotes and final punctuation may differ.

    Plain numbers are compared by value ("1,000" is "1000"). The reward is None if the reference is empty.
    """
    finals, references, _ = _read_answers(completions, answer, columns)
    rewards: Rewards = []
    for reference, final in zip(references, finals, strict=True):
        if reference is None:
            rewards.append(None)
        else:
            rewards.append(float(final is not None and answers.same_answer(reference, final)))
    return _log_unparseable("exact_answer", finals, rewards, columns)


def any_answer(completions: Sequence[Completion], answers: Sequence[Sequence[str]], **columns: Any) -> Rewards:
    """Return 1.0 if the final answer is one of several right ones, in the column `answers`, as `exact_answer` compares.

    The reward is None if all references are empty.
    """
    best: Rewards = [None] * len(completions)
    columns.pop("answer", None)
    for place in range(max(map(len, answers), default=0)):
        # The rows' answers at this place; a row with fewer has none, and keeps its reward.
        references = [texts[place] if place < len(texts) else "" for texts in answers]
        for index, reward in enumerate(exact_answer(completions, references, **columns)):
            if reward is not None:
                best[index] = max(reward, best[index] or 0.0)
    return best


def choice(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> Rewards:
    """Return 1.0 if the final answer is the reference's letter: "B", "(b)", "B) because …", "option B"; not "A or B".

    The reward is None if the reference is not a single letter.
    """
    texts, _ = read_texts(completions, columns)
    letters = [_letter(answers.extract_answer(text)) for text in texts]
    rewards: Rewards = []
    for text, letter in zip(answer, letters, strict=True):
        reference = _letter(_reference(text)) or _letter(str(text))
        if reference is None:
            rewards.append(None)
        else:
            rewards.append(float(letter == reference))
    return _log_unparseable("choice", letters, rewards, columns)


def answer_format(completions: Sequence[Completion], **columns: Any) -> Rewards:
    """Return 1.0 if a completion states exactly one final answer, right or wrong.

    Give this reward a low weight: it pays for wrong answers as well.
    """
    texts, _ = read_texts(completions, columns)
    finals = [answers.extract_answer(text) for text in texts]
    rewards: Rewards = []
    for text, final in zip(texts, finals, strict=True):
        rewards.append(float(final is not None and answers.count_answers(text) == 1))
    return _log_unparseable("answer_format", finals, rewards, columns)


def call_cost(completions: Sequence[Completion], call_cost: Sequence[float] | None = None, **columns: Any) -> Rewards:
    """Return a penalty for tool calls: minus their number, times the row's `call_cost` (1 without that column)."""
    costs = call_cost or [1.0] * len(completions)
    rewards: Rewards = []
    for completion, cost in zip(completions, costs, strict=True):
        calls = 0
        for message in completion:
            if isinstance(message, dict):
                calls += len(message.get("tool_calls") or ())
        rewards.append(-cost * calls)
    return rewards


def code_tests(completions: Sequence[Completion], test: Sequence[str], **columns: Any) -> Rewards:
    """Return 1.0 if the code in a completion (its first fenced block, or all of it) passes its test in a sandbox.

    `test` is Python code with assertions about what the answer's code defines (see `pipeline.rewards.sandbox.run`). The
    reward is None if the test is empty or not valid Python, or if the machine is too busy.
    """
    texts, _ = read_texts(completions, columns)
    codes = [_valid_python(extract_code(text)) for text in texts]
    tests = [_valid_python(text) for text in test]
    rewards: Rewards = [None if source is None else 0.0 for source in tests]
    _log_unparseable("code_tests", codes, rewards, columns)
    # All pairs run in one batch, so that every core has work.
    pairs: dict[int, tuple[str, str]] = {}
    for index, (code, source) in enumerate(zip(codes, tests, strict=True)):
        if code and source:
            pairs[index] = (code, source)
    for index, outcome in zip(pairs, run_many(list(pairs.values())), strict=True):
        rewards[index] = None if outcome.status == "busy" else float(outcome.passed)
    return rewards


def reasoning_gym(
    completions: Sequence[Completion],
    answer: Sequence[str],
    metadata: Sequence[str],
    kind: Sequence[str],
    **columns: Any,
) -> Rewards:
    """Return the score, 0 to 1, that the verifier of reasoning-gym's task gives the final answer.

    Only 1.0 means right: most verifiers pay a little for nearly right answers, or for any answer. If the verifier
    of a row also gives 1.0 to nonsense, 1.0 is lowered to 0 (`pipeline.rewards.task_check`). Text between `<answer>`
    and `</answer>` is judged verbatim, because the format of an answer may matter to its verifier. The reward is None
    if the task (`kind`) is unknown, its `metadata` is not a JSON object, or the machine is too busy.

    Args:
        completions: As for all rewards.
        answer: The reference answers of reasoning-gym.
        metadata: The `metadata` of each problem in reasoning-gym, as JSON, which its verifier needs.
        kind: The name of each problem's task, such as "chain_sum".
        **columns: Further columns, of which `prompts` and `log_metric` are used.
    """
    texts, problems = read_texts(completions, columns)
    finals = [_tagged(text, answers.extract_answer(text)) for text in texts]
    questions = list(zip(kind, problems, map(str, answer), metadata, (final or "" for final in finals), strict=True))
    rewards: Rewards = []
    for score, final in zip(task_judge.ask_all(questions), finals, strict=True):
        # Some verifiers pay for empty answers.
        rewards.append(0.0 if score is not None and final is None else score)
    return _log_unparseable("reasoning_gym", finals, rewards, columns)


def _tagged(text: str, final: str | None) -> str | None:
    """Return the final answer of a text with its quotes and other wrapping, if it is between the last answer tags.

    Args:
        text: A text such as "<answer>'a'\\n'b'</answer>".
        final: The final answer that `extract_answer` returned for it, which is returned without tags. None: no answer.
    """
    tag = text.rfind("<answer>")
    if tag < 0:
        return final
    start = tag + len("<answer>")
    end = text.find("</answer>", start, start + answers.MAX_ANSWER_LENGTH + len("</answer>"))
    if end < 0:
        return final
    verbatim = text[start:end].strip()
    # Another announcement may follow the tags.
    if final != answers.unwrap(verbatim):
        return final
    return verbatim


def read_texts(completions: Sequence[Completion], columns: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the text to judge in each completion, and the text of each problem.

    The text of a completion is its last message, or "" if that is not the assistant's. `columns` may have `prompts`; a
    problem is the last message of its prompt, or "" without prompts.
    """
    texts = []
    problems = []
    prompts = columns.get("prompts") or [""] * len(completions)
    for completion, prompt in zip(completions, prompts, strict=True):
        if isinstance(prompt, str):
            problems.append(prompt)
        else:
            problems.append(_last_content(prompt))

        if not isinstance(completion, str):
            is_assistant = not completion or completion[-1].get("role", "assistant") == "assistant"
            texts.append(_last_content(completion) if is_assistant else "")
        # A repeated prompt is cut off, because it is not part of the model's answer.
        elif isinstance(prompt, str):
            texts.append(completion.removeprefix(prompt))
        else:
            texts.append(completion)
    return texts, problems


def _last_content(messages: Sequence[dict[str, Any]] | None) -> str:
    """Return the text of the last message, "" without one."""
    if not messages:
        return ""
    return str(messages[-1].get("content") or "")


def _reference(text: object) -> str | None:
    """Return the answer in a reference: the announced one, or else the whole text.

    Return None if the reference is empty, too long, or neither a text nor a number.
    """
    # In YAML and JSON, references may be numbers.
    if not isinstance(text, str | int | float) or isinstance(text, bool):
        return None
    announced = answers.extract_answer(str(text))
    if announced or len(str(text)) > answers.MAX_ANSWER_LENGTH:
        return announced
    return answers.unwrap(str(text)) or None


def _read_answers(
    completions: Sequence[Completion], answer: Sequence[object], columns: dict[str, Any]
) -> tuple[list[str | None], list[str | None], list[str]]:
    """Return the final answer of each completion, its reference, and the text of its problem.

    A final answer or a reference is None if there is none to read.
    """
    texts, problems = read_texts(completions, columns)
    references = [_reference(text) for text in answer]
    finals = [answers.extract_answer(text) for text in texts]
    for index, (final, reference) in enumerate(zip(finals, references, strict=True)):
        # Cut off a per cent sign that the problem mentions and the reference omits.
        if final and _PERCENT.search(problems[index]) and not _PERCENT.search(reference or ""):
            finals[index] = _PERCENT.sub("", final)
    return finals, references, problems


def _is_copied(answer: str, problem: str) -> bool:
    """Return whether an answer is part of the problem, ignoring spaces and delimiters."""
    part = _without_delimiters(answer)
    whole = _without_delimiters(problem)
    return bool(problem) and re.search(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", whole) is not None


def _without_delimiters(text: str) -> str:
    """Return a text in lower case, without delimiters of LaTeX and without spaces around signs."""
    words = _DELIMITERS.sub("", text[-answers.MAX_TEXT_LENGTH :]).casefold().split()
    return re.sub(r" ?([^\w\s]) ?", r"\1", " ".join(words))


def _letter(answer: str | None) -> str | None:
    """Return the letter that an answer chooses, in upper case; None if it is not a single letter, or is retracted."""
    answer = re.sub(r"\\(?:text(?:bf|rm|it)?|math(?:bf|rm))\s*\{([^{}]*)\}", r"\1", answer or "").replace("**", "")
    match = _LETTER.fullmatch(answer)
    if match is None or _OTHER_LETTER.search(match[4] or ""):
        return None
    return (match[1] or match[2] or match[3]).upper()


def _valid_python(source: object) -> str | None:
    """Return `source` if it is valid Python and not empty, or else None."""
    # Hostile source may make the parser raise any of these.
    with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
        if isinstance(source, str) and ast.parse(source) and source.strip():
            return source
    return None


def _log_unparseable(name: str, finals: Sequence[object], rewards: Rewards, columns: dict[str, Any]) -> Rewards:
    """Log the shares of answers and of references that could not be read, and return `rewards`.

    Args:
        name: The name of the reward.
        finals: The final answers, None for one that could not be read.
        rewards: The rewards, None for a reference that could not be read.
        columns: The reward's further arguments, of which TRL's `log_metric` is used if there is one.
    """
    log_metric = columns.get("log_metric")
    if log_metric is not None and rewards:
        log_metric(f"{name}/unparseable", sum(final is None for final in finals) / len(finals))
        log_metric(f"{name}/unparseable_references", sum(reward is None for reward in rewards) / len(rewards))
    return rewards
