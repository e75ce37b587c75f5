"""People's votes: a file with a line for each pair of answers, in which people say which of the two they prefer.

    {"prompt": [...], "first": "It is red.", "second": "Red. Bye.", "choice": null}

`choice` becomes "first", "second" or "tie". The order does not tell whose answers they are. A line may occur several
times, once for each person.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.errors import Problem, UserError
from pipeline.files import write_text
from pipeline.preferences.judges import Judge

OUTCOMES = {"first": 1.0, "second": 0.0, "tie": 0.5}


def load_votes(path: Path) -> Judge:
    """Return the judge that decides as most people did; of pairs without votes, which it adds to `path`, it has none.

    Raises:
        UserError: If a line of the file is not a vote.
    """
    lines = _read(path)

    def match(
        answers: Sequence[str], opponents: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        votes: dict[str, list[float]] = defaultdict(list)
        for line in lines:
            for outcome in [OUTCOMES[line["choice"]]] if line["choice"] else []:
                votes[_key(line["prompt"], line["first"], line["second"])].append(outcome)
                votes[_key(line["prompt"], line["second"], line["first"])].append(1 - outcome)
        known = {_key(line["prompt"], *sorted((line["first"], line["second"]))) for line in lines}
        outcomes: list[float | None] = []
        for answer, opponent, row in zip(answers, opponents, rows, strict=True):
            found = votes.get(_key(row["prompt"], answer, opponent))
            outcomes.append(0.5 if answer == opponent else _majority(found) if found else None)
            pair = _key(row["prompt"], *sorted((answer, opponent)))
            if outcomes[-1] is None and pair not in known:
                known.add(pair)
                first, second = random.Random(pair).sample((answer, opponent), 2)
                lines.append({"prompt": row["prompt"], "first": first, "second": second, "choice": None})
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        return outcomes

    return Judge("people's votes", match, constants=0)


def _majority(outcomes: Sequence[float]) -> float:
    mean = fmean(outcomes)
    return 0.5 if mean == 0.5 else float(mean > 0.5)


def _key(prompt: Any, answer: str, opponent: str) -> str:
    return json.dumps([prompt, answer, opponent])


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            if line["choice"] not in (None, *OUTCOMES) or not all(
                isinstance(line[s], str) for s in ("first", "second")
            ):
                raise ValueError(f"its choice is {line['choice']!r}")
            lines.append({name: line[name] for name in ("prompt", "first", "second", "choice")})
        except (ValueError, LookupError, TypeError) as error:
            remedy = f"is not a vote ({error}); a choice is first, second, tie or null"
            raise UserError(Problem("judge", f"{path}, line {number}", remedy)) from None
    return lines
