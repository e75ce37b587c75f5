"""Verifiable rewards: functions of completions and a reference, with TRL's reward signature.

Each takes `completions` (texts, or lists of messages that end with the assistant's) and the data set's columns by name,
and returns one reward per completion: 0.0 or 1.0 (`reasoning_gym` also values between), or None if the reference cannot
be read: nothing is learned from the row. TRL's `log_metric` gets the shares of unreadable answers and references.
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
# Another letter after the answer's, or a word that retracts it.
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
    found, references, problems = _read_answers(completions, answer, columns)
    rewards: Rewards = []
    # Questions that a comparison as text or numbers leaves open, by row; without an answer, they test the reference.
    questions: dict[int, tuple[str, str | None, bool]] = {}
    for index, (reference, given) in enumerate(zip(references, found, strict=True)):
        if reference is None or _WORDS.fullmatch(answers.normalise_answer(reference)):
            rewards.append(None)
            continue
        copied = given is not None and _is_copied(given, problems[index])
        same = given is not None and answers.same_answer(reference, given) and not (copied and _POWER.search(given))
        rewards.append(float(same))
        # If the reference is a plain number, the answer must be one, too: algebra would accept an unsolved sum.
        if answers.number(reference) is None:
            questions[index] = reference, None if same else given, copied

    verdicts = math_judge.ask_all(list(questions.values())) if questions else []
    for (index, (_, given, _)), verdict in zip(questions.items(), verdicts, strict=True):
        if given is not None and verdict is not None:
            rewards[index] = float(verdict)
        # Nothing is learned from references that math-verify cannot parse, even if the answer is the same text.
        elif not verdict:
            rewards[index] = None
    return _logged("math_answer", found, rewards, columns)


def exact_answer(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> Rewards:
    """Return 1.0 if the final answer is the reference; case, spaces, article, quotes and final punctuation may differ.

    Plain numbers are compared by value ("1,000" is "1000"). The reward is None if the reference is empty.
    """
    found, references, _ = _read_answers(completions, answer, columns)
    rewards: Rewards = [
        None if reference is None else float(given is not None and answers.same_answer(reference, given))
        for reference, given in zip(references, found, strict=True)
    ]
    return _logged("exact_answer", found, rewards, columns)


def choice(completions: Sequence[Completion], answer: Sequence[str], **columns: Any) -> Rewards:
    """Return 1.0 if the final answer is the reference's letter: "B", "(b)", "B) because …", "option B"; not "A or B".

    The reward is None if the reference is not a single letter.
    """
    found = [_letter(answers.extract_answer(text)) for text in read_texts(completions, columns)[0]]
    references = [_letter(_reference(text)) or _letter(str(text)) for text in answer]
    pairs = zip(references, found, strict=True)
    rewards: Rewards = [None if reference is None else float(given == reference) for reference, given in pairs]
    return _logged("choice", found, rewards, columns)


def answer_format(completions: Sequence[Completion], **columns: Any) -> Rewards:
    """Return 1.0 if a completion states exactly one final answer, right or wrong; give this reward a low weight."""
    texts, _ = read_texts(completions, columns)
    found = [answers.extract_answer(text) for text in texts]
    pairs = zip(texts, found, strict=True)
    rewards: Rewards = [float(given is not None and answers.count_answers(text) == 1) for text, given in pairs]
    return _logged("answer_format", found, rewards, columns)


def call_cost(completions: Sequence[Completion], call_cost: Sequence[float] | None = None, **columns: Any) -> Rewards:
    """Return minus the cost of a completion's tool calls: `call_cost` per call, or 1 without that column."""
    rewards: Rewards = []
    for completion, cost in zip(completions, call_cost or [1.0] * len(completions), strict=True):
        messages = (message for message in completion if isinstance(message, dict))
        rewards.append(-cost * sum(len(message.get("tool_calls") or ()) for message in messages))
    return rewards


def code_tests(completions: Sequence[Completion], test: Sequence[str], **columns: Any) -> Rewards:
    """Return 1.0 if the code in a completion (its first fenced block, or all of it) passes its test in a sandbox.

    `test` has Python assertions about what the code defines (see `pipeline.rewards.sandbox.run`). The reward is None if
    they are empty or not valid Python, or if the machine is too busy.
    """
    codes = [_python(extract_code(text)) for text in read_texts(completions, columns)[0]]
    tests = [_python(text) for text in test]
    rewards: Rewards = [None if source is None else 0.0 for source in tests]
    _logged("code_tests", codes, rewards, columns)
    # All pairs run in one batch, so that every core has work.
    numbered = enumerate(zip(codes, tests, strict=True))
    pairs = {index: (code, source) for index, (code, source) in numbered if code and source}
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

    Only 1.0 means right: most verifiers pay a little for nearly right answers, or for any answer. If a verifier pays
    nonsense in full, its rows score 0 (`pipeline.rewards.task_check`). Text between `<answer>` and `</answer>` is
    judged verbatim, because verifiers know the format of answers. The reward is None if the task (`kind`) is unknown,
    its `metadata` is not a JSON object, or the machine is too busy.
    """
    texts, problems = read_texts(completions, columns)
    found = [answers.extract_answer(text) for text in texts]
    for index, text in enumerate(texts):
        # The last tags, if the final answer is between them: "<answer>'a'\n'b'</answer>".
        start = text.rfind("<answer>") + len("<answer>")
        end = text.find("</answer>", start, start + answers.MAX_ANSWER_LENGTH + len("</answer>"))
        if start >= len("<answer>") and end >= 0 and found[index] == answers.unwrap(text[start:end].strip()):
            found[index] = text[start:end].strip()

    rows = zip(kind, problems, map(str, answer), metadata, (given or "" for given in found), strict=True)
    scores = task_judge.ask_all(list(rows))
    # Some verifiers pay for empty answers.
    rewards: Rewards = [score and score * (given is not None) for score, given in zip(scores, found, strict=True)]
    return _logged("reasoning_gym", found, rewards, columns)


REWARDS = {
    "math_answer": "pipeline.rewards.functions:math_answer",
    "exact_answer": "pipeline.rewards.functions:exact_answer",
    "choice": "pipeline.rewards.functions:choice",
    "answer_format": "pipeline.rewards.functions:answer_format",
    "call_cost": "pipeline.rewards.functions:call_cost",
    "code_tests": "pipeline.rewards.functions:code_tests",
    "reasoning_gym": "pipeline.rewards.functions:reasoning_gym",
    "hidden_taste": "recipes.worlds.pocket.annotators:hidden_taste",
}
"""Built-in rewards: the name in YAML files -> the function, which `pipeline.rewards.loading` imports."""

MEASURED_ONLY = ("hidden_taste",)
"""Rewards that may not be trained on: their weight must be 0."""


def read_texts(completions: Sequence[Completion], columns: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Return the text to judge in each completion (the last message, if the assistant's), and the problem's text."""
    texts, problems = [], []
    for completion, prompt in zip(completions, columns.get("prompts") or [""] * len(completions), strict=True):
        asked = {"content": prompt} if isinstance(prompt, str) else (prompt or [{}])[-1]
        problems.append(str(asked.get("content") or ""))
        # A repeated prompt is cut off, because it is not part of the model's answer.
        if isinstance(completion, str):
            texts.append(completion.removeprefix(prompt) if isinstance(prompt, str) else completion)
            continue
        last = completion[-1] if completion else {}
        texts.append(str(last.get("content") or "") if last.get("role", "assistant") == "assistant" else "")
    return texts, problems


def _reference(text: object) -> str | None:
    """Return the answer in a reference: the announced one, or else the whole text; None if it is empty."""
    text = str(text) if isinstance(text, str | int | float) and not isinstance(text, bool) else ""
    announced = answers.extract_answer(text)
    return announced if announced or len(text) > answers.MAX_ANSWER_LENGTH else answers.unwrap(text) or None


def _read_answers(
    completions: Sequence[Completion], answer: Sequence[object], columns: dict[str, Any]
) -> tuple[list[str | None], list[str | None], list[str]]:
    """Return the final answer of each completion, its reference, and the text of its problem."""
    texts, problems = read_texts(completions, columns)
    references = [_reference(text) for text in answer]
    found = [answers.extract_answer(text) for text in texts]
    for index, (given, reference) in enumerate(zip(found, references, strict=True)):
        # Cut off a per cent sign that the problem mentions and the reference omits.
        if given and _PERCENT.search(problems[index]) and not _PERCENT.search(reference or ""):
            found[index] = _PERCENT.sub("", given)
    return found, references, problems


def _is_copied(answer: str, problem: str) -> bool:
    """Return whether an answer is part of the problem, ignoring spaces and delimiters."""
    words = (_DELIMITERS.sub("", text[-answers.MAX_TEXT_LENGTH :]).casefold().split() for text in (answer, problem))
    part, whole = (re.sub(r" ?([^\w\s]) ?", r"\1", " ".join(some)) for some in words)
    return bool(problem) and re.search(rf"(?<![^\W_]){re.escape(part)}(?![^\W_])", whole) is not None


def _letter(answer: str | None) -> str | None:
    """Return the letter that an answer chooses, or None if it is not a single letter, or is retracted."""
    answer = re.sub(r"\\(?:text(?:bf|rm|it)?|math(?:bf|rm))\s*\{([^{}]*)\}", r"\1", answer or "").replace("**", "")
    match = _LETTER.fullmatch(answer)
    if match is None or _OTHER_LETTER.search(match[4] or ""):
        return None
    return (match[1] or match[2] or match[3]).upper()


def _python(source: object) -> str | None:
    # Hostile source may make the parser raise any of these.
    with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
        if isinstance(source, str) and ast.parse(source) and source.strip():
            return source
    return None


def _logged(name: str, found: Sequence[object], rewards: Rewards, columns: dict[str, Any]) -> Rewards:
    """Log the shares of answers and of references that could not be read, and return the rewards."""
    log_metric = columns.get("log_metric")
    if log_metric is not None and rewards:
        log_metric(f"{name}/unparseable", sum(answer is None for answer in found) / len(found))
        log_metric(f"{name}/unparseable_references", sum(reward is None for reward in rewards) / len(rewards))
    return rewards
