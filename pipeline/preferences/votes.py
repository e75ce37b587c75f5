"""People's votes: the file to which the page appends them, and the judge who decides as most people did.

`pipeline.data.votes` describes the file. The judge also reads a file with a line for each pair of answers that an
evaluation asks for, in which people may say by hand which of the two they prefer:

    {"prompt": [...], "first": "It is red.", "second": "Red. Bye.", "choice": null}

`choice` becomes "first", "second" or "tie". The order does not tell whose answers they are. A line may occur several
times, once for each person.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.data.arguments import VOTES_FILE
from pipeline.data.votes import OUTCOMES, Vote, read_votes, standing
from pipeline.errors import Problem, UserError
from pipeline.files import append_line, lock, write_text
from pipeline.preferences.judges import Judge


class Conflict(Exception):
    """A vote that cannot count: its annotator has voted on this pair already, or what it undoes does not stand."""


class VoteLog:
    """The votes of a run. One process appends to them, from any of its threads; a vote is on disk before `add` returns.

    A line that was half written when the process or the machine died is removed: its vote was never confirmed.

    Args:
        folder: Where `votes.jsonl` is, or will be.

    Raises:
        UserError: If another process appends to the same file, the folder cannot be written to, or a line is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VOTES_FILE
        self._mutex = threading.RLock()
        with ExitStack() as stack:
            stack.enter_context(lock(folder / ".votes.lock", orphans_only=True))
            self._file = stack.enter_context(self.path.open("a+b", buffering=0))
            self._recover()
            self._lines = {vote["id"]: vote for vote in read_votes(self.path)}
            self._held = stack.pop_all()
        self._standing = {(vote["annotator"], vote["pair"]): vote for vote in standing(list(self._lines.values()))}

    def close(self) -> None:
        """Release the file."""
        self._held.close()

    def _recover(self) -> None:
        """Remove half a line at the end."""
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            try:
                json.loads(content[end:])
                self._file.write(b"\n")
            except ValueError:
                self._file.truncate(end)
            os.fsync(self._file.fileno())

    def add(self, vote: Vote) -> bool:
        """Append a vote. One that is sent again, with the same `id`, is confirmed again and counts once.

        Returns:
            Whether it is new.

        Raises:
            Conflict: If it cannot count.
            OSError: If it cannot be written; the file is as before.
        """
        with self._mutex:
            key = vote["annotator"], vote["pair"]
            if (known := self._lines.get(vote["id"])) is not None:
                if (known["annotator"], known["pair"]) != key:
                    raise Conflict("another vote has this id")
                return False
            if vote.get("undoes"):
                if self._standing.get(key, {}).get("id") != vote["undoes"]:
                    raise Conflict("that vote has been taken back or corrected already")
            elif vote["choice"] is None:
                raise Conflict("it does not say which vote it takes back")
            elif key in self._standing:
                raise Conflict("this pair has your vote already")
            # Lone surrogates, which UTF-8 cannot encode, stay as they are in JSON's escapes.
            append_line(self._file, json.dumps(vote, ensure_ascii=True).encode())
            self._lines[vote["id"]] = vote
            if vote["choice"] is None:
                del self._standing[key]
            else:
                self._standing[key] = vote
            return True

    def standing(self, annotator: str | None = None) -> list[Vote]:
        """Return the votes that count, of everybody or of one annotator, the oldest first."""
        with self._mutex:
            return [vote for (name, _), vote in self._standing.items() if annotator in (None, name)]

    def has_vote(self, annotator: str, pair: str) -> bool:
        """Return whether an annotator has voted on a pair."""
        return (annotator, pair) in self._standing

    def of_pair(self, pair: str) -> list[Vote]:
        """Return the votes on a pair."""
        return [vote for vote in self.standing() if vote["pair"] == pair]


BY_HAND = {"first": 1.0, "second": 0.0, "tie": 0.5}
"""The outcome of a line of an evaluation's file for the answer that is named first."""


def load_votes(path: Path) -> Judge:
    """Return the judge that decides as most people did; of pairs without votes, which it adds to `path`, it has none.

    Votes on the same two answers that were given in the page count as well.

    Raises:
        UserError: If a line of a file is not a vote.
    """
    lines = _read(path)
    given = [vote for vote in standing(read_votes(path.with_name(VOTES_FILE))) if vote["choice"] != "skip"]

    def match(
        answers: Sequence[str], opponents: Sequence[str], rows: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        votes: dict[str, list[float]] = defaultdict(list)
        for line in lines:
            for outcome in [BY_HAND[line["choice"]]] if line["choice"] else []:
                votes[_key(line["prompt"], line["first"], line["second"])].append(outcome)
                votes[_key(line["prompt"], line["second"], line["first"])].append(1 - outcome)
        for vote in given:
            outcome = OUTCOMES[vote["choice"]]
            votes[_key(vote["prompt"], vote["a"], vote["b"])].append(outcome)
            votes[_key(vote["prompt"], vote["b"], vote["a"])].append(1 - outcome)
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
            if line["choice"] not in (None, *BY_HAND) or not all(isinstance(line[s], str) for s in ("first", "second")):
                raise ValueError(f"its choice is {line['choice']!r}")
            lines.append({name: line[name] for name in ("prompt", "first", "second", "choice")})
        except (ValueError, LookupError, TypeError) as error:
            remedy = f"is not a vote ({error}); a choice is first, second, tie or null"
            raise UserError(Problem("judge", f"{path}, line {number}", remedy)) from None
    return lines
