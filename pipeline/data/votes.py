"""People's votes: the log to which the page appends them, and the preference data set that is made from it.

Both lie in one folder, such as `runs/pocket/votes`. The data set is written again whenever the log, `votes.jsonl`, has
grown: one row per vote that prefers one of the two answers and, in the configuration `judgements`, each single answer
and whether it is wanted. A line of the log, never changed after it is appended, is a person's vote on two answers to a
prompt, `a` by `model_a` and `b` by `model_b`:

    {"id": "…", "pair": "…", "time": "…", "annotator": "ann", "prompt": [...], "a": "It is red.", "b": "Red.",
     "model_a": "2_sft", "model_b": "3_ppo", "sampling": {...}, "shown_first": "b", "choice": "a",
     "undoes": null, "seconds": 3.2, "comment": ""}

`choice` is "a", "b", "tie", "bad" (both answers are), "skip", or null. `undoes` is the id of an earlier vote of the
same person: with a choice, the line corrects that vote; with null, it only takes it back.
"""

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.data.arguments import SPLITS
from pipeline.data.messages import labelled_pair
from pipeline.errors import Problem, UserError, refuse
from pipeline.files import (
    append_line,
    check_links,
    check_regular,
    hash_file,
    lock,
    open_log,
    read_run,
    whole_lines,
    write_text,
)

VOTES_FILE = "votes.jsonl"
CHOICES = ("a", "b", "tie", "bad", "skip")
OTHER = {"a": "b", "b": "a"}
OUTCOMES = {"a": 1.0, "b": 0.0, "tie": 0.5, "bad": 0.5}
"""The outcome of a vote for answer `a`; a skipped pair has none."""

SINGLE = "judgements"
"""Configuration of the data set whose rows are single answers."""
WANTED = {"a": (True, False), "b": (False, True), "tie": (True, True), "bad": (False, False)}
"""Whether answers `a` and `b` are wanted, by the choice of the vote. A skipped pair says nothing."""
CARD = """\
# People's preferences between two answers

Answers of {models}, compared in pairs by {annotators}, who did not know whose answers they are. `first` says which of
the two was shown first. Ties, pairs with two bad answers and skipped pairs are counted but not used. All
votes on a prompt are in one split. The configuration `judgements` has single answers, and whether they are wanted
(`label`): the better one, and both of a tie.

{table}
Made from `votes.jsonl` with the SHA-256 digest {digest}.
"""
Vote = dict[str, Any]


def read_votes(path: Path) -> list[Vote]:
    """Return the votes in a log, each once; none if the file does not exist.

    A last line that was not written whole is omitted, because its vote was never confirmed. Raise a `UserError` if
    another line is not a vote, or the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        check_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(Problem("dataset_name", path, f"cannot be read ({error.strerror or error})")) from None
    votes: dict[str, Vote] = {}
    for vote in parse_lines(whole_lines(content), check_vote, path, "dataset_name", "correct or remove it"):
        votes.setdefault(vote["id"], vote)
    return list(votes.values())


def parse_lines(
    content: bytes, check: Callable[[Any], Vote], path: Path, field: str, remedy: str
) -> Iterator[dict[str, Any]]:
    """Yield the votes in the lines of the file at `path`, which the argument `field` named; empty lines are skipped.

    `check` returns a vote, or raises a `ValueError`, `LookupError` or `TypeError`, which becomes a `UserError`.
    """
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            vote = check(json.loads(line))
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(Problem(field, f"{path}, line {number}", f"is not a vote ({error}); {remedy}")) from None
        yield vote


def check_vote(vote: Any) -> Vote:
    """Return a line of the log; raise a `ValueError`, `LookupError` or `TypeError` if it is not a vote."""
    texts = ("id", "pair", "annotator", "a", "b", "model_a", "model_b")
    wrong = [name for name in texts if not isinstance(vote[name], str)]
    turns = vote["prompt"]
    if not turns or not all(isinstance(turn[key], str) for turn in turns for key in ("role", "content")):
        wrong.append("prompt")
    undoes = vote.get("undoes")
    if not isinstance(undoes, str | None):
        wrong.append("undoes")
    only_takes_back = vote["choice"] is None and bool(undoes)
    if vote["choice"] not in CHOICES and not only_takes_back:
        wrong.append("choice")
    if wrong:
        raise ValueError(f"{wrong[0]} is {json.dumps(vote[wrong[0]])[:80]}")
    return dict(vote)


def votes_step(run: Path) -> dict[str, Any]:
    """Return the settings of the run's step for votes, {} if it has none."""
    for step in read_run(run).get("steps", {}).values():
        values = step.get("values", {})
        if "min_votes" in values:
            return dict(values)
    return {}


def valid_votes(votes: Sequence[Vote]) -> list[Vote]:
    """Return the votes that count, which their annotators have neither taken back nor corrected."""
    undone = {(vote["annotator"], vote["undoes"]) for vote in votes if vote.get("undoes")}
    return [vote for vote in votes if vote["choice"] is not None and (vote["annotator"], vote["id"]) not in undone]


class Conflict(Exception):
    """A vote that cannot count: a second one on this pair, or one that undoes a vote which no longer counts."""


class VoteLog:
    """The votes of a run. One process appends to them, from any of its threads; a vote is on disk before `add` returns.

    The constructor raises a `UserError` if another process appends to the file, if the file cannot be written, or if a
    line is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / VOTES_FILE
        self._mutex = threading.RLock()
        # If anything fails here, the stack closes the file and releases the lock.
        with ExitStack() as stack:
            stack.enter_context(lock(folder / ".votes.lock", orphans_only=True))
            # Half a line was written when the process or the machine died: its vote was never confirmed.
            self._file = stack.enter_context(open_log(self.path))
            self._by_id = {vote["id"]: vote for vote in read_votes(self.path)}
            self._open_files = stack.pop_all()
        self._update_valid_votes()

    def close(self) -> None:
        """Release the file."""
        self._open_files.close()

    def add(self, vote: Vote) -> bool:
        """Append a vote, and return whether it is new. A vote that is sent again, with the same `id`, counts once.

        Raise `Conflict` if it cannot count, and an `OSError` if it cannot be written; either leaves the file as it was.
        """
        with self._mutex:
            key = (vote["annotator"], vote["pair"])
            earlier = self._by_id.get(vote["id"])
            if earlier is not None:
                if (earlier["annotator"], earlier["pair"]) != key:
                    raise Conflict("another vote has this id")
                return False
            if vote.get("undoes"):
                if self._vote_on_pair.get(key, {}).get("id") != vote["undoes"]:
                    raise Conflict("that vote has been taken back or corrected already")
            elif vote["choice"] is None:
                raise Conflict("it does not say which vote it takes back")
            elif key in self._vote_on_pair:
                raise Conflict("this pair has your vote already")

            # Lone surrogates, which UTF-8 cannot encode, stay as they are in JSON's escapes.
            append_line(self._file, json.dumps(vote, ensure_ascii=True).encode())
            self._by_id[vote["id"]] = vote
            self._update_valid_votes()
            return True

    def _update_valid_votes(self) -> None:
        """Update the votes that count: at most one of an annotator on a pair."""
        votes = valid_votes(list(self._by_id.values()))
        self._vote_on_pair = {(vote["annotator"], vote["pair"]): vote for vote in votes}

    def valid_votes(self, annotator: str | None = None) -> list[Vote]:
        """Return the votes that count, the oldest first: of one annotator, or of all if it is None."""
        with self._mutex:
            return [vote for (name, _), vote in self._vote_on_pair.items() if annotator in (None, name)]

    def has_vote(self, annotator: str, pair: str) -> bool:
        """Return whether an annotator has voted on a pair."""
        return (annotator, pair) in self._vote_on_pair


def split_of(prompt: Sequence[dict[str, str]]) -> str:
    """Return the split of all votes on a prompt: one in ten prompts is for test, and one for validation."""
    text = json.dumps([[turn["role"], turn["content"]] for turn in prompt])
    tenth = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "validation"}.get(tenth, "train")


def as_pairs(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Return the votes that prefer one of two different answers, as rows of a preference data set."""
    pairs = []
    for vote in votes:
        choice = vote["choice"]
        if choice in OTHER and vote["a"].strip() != vote["b"].strip():
            chosen = vote[choice]
            rejected = vote[OTHER[choice]]
            chosen_first = vote.get("shown_first") == choice
            pairs.append(labelled_pair(vote["prompt"], chosen, rejected, vote["annotator"], chosen_first))
    return pairs


def as_judgements(votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Return both answers of each vote that was not skipped, as rows of an unpaired preference data set."""
    judgements = []
    for vote in votes:
        labels = WANTED.get(vote["choice"])
        says_nothing = vote["choice"] in OTHER and vote["a"].strip() == vote["b"].strip()
        if labels is None or says_nothing:
            continue
        for text, label in zip((vote["a"], vote["b"]), labels, strict=True):
            if text.strip():
                completion = [{"role": "assistant", "content": text}]
                row = {"prompt": vote["prompt"], "completion": completion, "label": label}
                judgements.append({**row, "annotator": vote["annotator"]})
    return judgements


def update_data_set(folder: Path) -> int:
    """Write the data set of the votes in `folder`, unless it is up to date, and return the number of its pairs.

    Raise a `UserError` if a line of the log is not a vote, or a link leads out of the run.
    """
    refuse(*check_links(folder))
    # Imported here, because `datasets` takes a second, and the report only reads votes.
    from datasets import Features, Value

    from pipeline.data.writing import MESSAGES, PREFERENCES, card, table, write_rows

    judgement_types = {"prompt": MESSAGES, "completion": MESSAGES, "label": Value("bool"), "annotator": Value("string")}
    schemas = {"": PREFERENCES, SINGLE: Features(judgement_types).arrow_schema}
    # Several processes may read the same data, and update them at the same time.
    with lock(folder / ".data.lock"):
        # Read before the votes: if more are added meanwhile, the card's digest shows that it is outdated.
        digest = hash_file(folder / VOTES_FILE)
        votes = valid_votes(read_votes(folder / VOTES_FILE))
        by_split: dict[str, list[Vote]] = {name: [] for name in SPLITS}
        for vote in votes:
            by_split[split_of(vote["prompt"])].append(vote)
        pairs = {name: as_pairs(by_split[name]) for name in SPLITS}
        judgements = {name: as_judgements(by_split[name]) for name in SPLITS}
        configs: dict[str, list[str]] = {}
        for config, rows_of in (("default", pairs), (SINGLE, judgements)):
            if any(rows_of.values()):
                configs[config] = [name for name in SPLITS if rows_of[name]]
        counts = [_counts(name, by_split[name], len(pairs[name])) for name in SPLITS]
        columns = ["split", "prompts", "votes", "pairs", "ties", "both bad", "skipped"]
        text = _describe(votes, table(columns, counts), digest)
        content = card(configs, text, tags=["preference", "human-feedback"])
        path = folder / "README.md"
        if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != content:
            for config, rows_of in (("", pairs), (SINGLE, judgements)):
                for name in SPLITS:
                    file = folder / config / f"{name}.parquet"
                    if rows_of[name]:
                        tmp_file = file.with_name(f".{file.stem}.tmp")
                        write_rows(tmp_file, schemas[config], rows_of[name])
                        os.replace(tmp_file, file)
                    else:
                        # `load_dataset` rejects a split without rows.
                        file.unlink(missing_ok=True)
            # The card comes last: until it is written, the next reader writes everything again.
            write_text(path, content)
    return sum(len(pairs[name]) for name in SPLITS)


def _counts(split: str, votes: Sequence[Vote], pairs: int) -> list[object]:
    """Return a line of the card's table: how many votes of a split there are, and how they were cast."""
    prompts = {json.dumps(vote["prompt"]) for vote in votes}
    choices = Counter(vote["choice"] for vote in votes)
    return [split, len(prompts), len(votes), pairs, choices["tie"], choices["bad"], choices["skip"]]


def _describe(votes: Sequence[Vote], table: str, digest: str) -> str:
    """Return the text of the card."""
    models = sorted({vote[side] for vote in votes for side in ("model_a", "model_b")})
    people = len({vote["annotator"] for vote in votes})
    return CARD.format(
        models=", ".join(f"`{Path(name).name}`" for name in models) or "no model yet",
        annotators="one person" if people == 1 else f"{people} people",
        table=table,
        digest=digest,
    )
