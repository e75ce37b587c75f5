"""Pairs of answers for people to compare: sampled in the background, kept in `votes/pairs.jsonl`, and allotted.

Each annotator has a sequence of pairs, in which pairs that everybody sees come at regular intervals. A line of the file
is a pair, or allots one: `{"pair": ID, "for": ANNOTATOR, "shared": true}`. So a restarted server goes on where it was.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.app.models import Loaded, Models
from pipeline.errors import Problem, UserError
from pipeline.files import append_line
from pipeline.models.generation import Messages, generate
from pipeline.models.tokenizer import special_tokens
from pipeline.rewards.grading import RULE_COLUMNS

logger = logging.getLogger(__name__)

Source = tuple[str, str]
"""The models of the answers `a` and `b`; they may be the same."""

BATCH = 4
"""Prompts that are answered at once, which takes little longer than one."""
AHEAD = 4
"""Pairs that are kept ready, beyond one for each page that is open."""
ATTEMPTS = 16
"""Batches without a pair to compare after which there is something wrong."""
PATIENCE = 120.0
"""Seconds that a page waits for its first pair; a large model loads first."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt.

    Attributes:
        pair: Its id.
        prompt: The conversation that is answered.
        a: The answer of `model_a`.
        b: The answer of `model_b`.
        model_a: The name of a model.
        model_b: The name of a model.
        sampling: How both were sampled.
        rule: By what the simulated annotators judge an answer, empty if they cannot.
    """

    pair: str
    prompt: list[dict[str, str]]
    a: str
    b: str
    model_a: str
    model_b: str
    sampling: dict[str, Any]
    rule: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Source:
        """The models."""
        return self.model_a, self.model_b

    def shown_first(self, annotator: str) -> str:
        """Return which answer this annotator sees first, "a" or "b"; only the server knows the seed."""
        return random.Random(f"{self.pair}/{annotator}/{self.sampling.get('seed')}").choice("ab")


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    temperature: float = 1.0
    min_p: float = 0.05
    max_new_tokens: int = 128


class Pairs:
    """The pairs of a run.

    Args:
        path: The file.
        models: The models that answer.
        prompts: Rows with `prompt`, and perhaps with what the simulated annotators judge by.
        sampling: How answers are sampled.
        overlap: The share of pairs that everybody sees.
    """

    def __init__(
        self, path: Path, models: Models, prompts: Sequence[Mapping[str, Any]], sampling: Sampling, overlap: float
    ) -> None:
        self.models, self.prompts, self.sampling, self.overlap = models, prompts, sampling, overlap
        self.by_id: dict[str, Pair] = {}
        self._stock: dict[Source, list[Pair]] = defaultdict(list)
        self._shared: dict[Source, dict[str, Pair]] = defaultdict(dict)
        self._sequences: dict[tuple[str, Source], list[Pair]] = defaultdict(list)
        self._errors: dict[Source, Exception] = {}
        self._changed = threading.Condition(threading.RLock())
        self._due: dict[Source, int] = {}
        self._order = random.Random(0).sample(range(len(prompts)), len(prompts))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for line in lines:
            try:
                self._take_in(json.loads(line))
            except (ValueError, LookupError, TypeError):  # half a line; a vote has all that is known of its pair
                continue
        self._file = path.open("ab", buffering=0)
        if lines[-1]:
            append_line(self._file, b"")
        threading.Thread(target=self._work, daemon=True).start()

    def _take_in(self, line: dict[str, Any]) -> None:
        if "for" not in line:
            pair = self.by_id[line["pair"]] = Pair(**line)
            self._stock[pair.source].append(pair)
            return
        pair = self.by_id[line["pair"]]
        self._sequences[line["for"], pair.source].append(pair)
        if pair in self._stock[pair.source]:
            self._stock[pair.source].remove(pair)
            if line["shared"]:
                self._shared[pair.source][pair.pair] = pair

    def _write(self, line: dict[str, Any]) -> None:
        """Record a pair, or whom one is allotted to.

        Raises:
            OSError: If the file cannot be written; then it is not recorded.
        """
        append_line(self._file, json.dumps(line).encode())
        self._take_in(line)

    def sequence(self, annotator: str, source: Source) -> list[Pair]:
        """Return the pairs that have been allotted to an annotator, in order."""
        with self._changed:
            return list(self._sequences[annotator, source])

    def allot(self, annotator: str, source: Source, pages: int = 1) -> Pair:
        """Append a pair to an annotator's sequence. Waits until there is one.

        Args:
            annotator: The annotator.
            source: The models that answer.
            pages: Pages that are open, for each of which a pair is kept ready.

        Raises:
            UserError: If no pair can be sampled.
            OSError: If it cannot be written, for instance because the disk is full.
        """
        with self._changed:
            sequence = self._sequences[annotator, source]
            is_shared = int(round((len(sequence) + 1) * self.overlap, 6)) > int(round(len(sequence) * self.overlap, 6))

            def ready() -> Pair | None:
                """Return the first shared pair that this annotator has not seen, or a new one."""
                shared = self._shared[source].values() if is_shared else ()
                return next((pair for pair in (*shared, *self._stock[source]) if pair not in sequence), None)

            # What failed for an earlier visitor may go well now, for instance once the disk has room again.
            self._errors.pop(source, None)
            self._need(source, AHEAD + pages)
            self._changed.wait_for(lambda: ready() or source in self._errors, PATIENCE)
            pair = ready()
            if pair is None:
                late = UserError(Problem("answers", " and ".join(source), "take too long; try again"))
                raise self._errors.pop(source, late)
            self._write({"pair": pair.pair, "for": annotator, "shared": is_shared})
            return pair

    def typed(self, annotator: str, source: Source, text: str) -> Pair:
        """Sample a pair of answers to a prompt that an annotator has typed, and allot it.

        Raises:
            UserError: If the prompt is too long or contains special tokens, or the answers do not differ.
            OSError: If it cannot be written, for instance because the disk is full.
        """
        prompt: list[dict[str, str]] = [{"role": "user", "content": text}]
        for name in source:
            loaded = self.models.get(name)
            loaded.encode(prompt)
            if found := special_tokens(loaded.tokenizer).search(text):
                remedy = "is a special token of the model, which no data may contain; remove it"
                raise UserError(Problem("prompt", found.group(), remedy))
        for _ in range(ATTEMPTS):
            if pairs := self._sample(source, [{"prompt": prompt}]):
                with self._changed:
                    self._write(asdict(pairs[0]))
                    self._write({"pair": pairs[0].pair, "for": annotator, "shared": False})
                return pairs[0]
        raise _alike(source)

    def _need(self, source: Source, number: int) -> None:
        """Have `number` pairs sampled in the background, unless they are there already."""
        self._due[source] = max(number, self._due.get(source, 0))
        self._changed.notify_all()

    def _missing(self) -> Source | None:
        """Return the models of which pairs are wanted; first those of which there are none."""
        short = [source for source, number in self._due.items() if len(self._stock[source]) < number]
        return min(short, key=lambda source: len(self._stock[source]), default=None)

    def _work(self) -> None:
        position = len(self.by_id)
        failures: dict[Source, int] = defaultdict(int)
        while True:
            with self._changed:
                self._changed.wait_for(self._missing)
                source = self._missing()
            if source is None:
                continue
            try:
                if not self.prompts:
                    raise UserError(Problem("prompts", "nothing", "there is no data set of prompts; type one"))
                rows = [self.prompts[self._order[(position + i) % len(self._order)]] for i in range(BATCH)]
                position += BATCH
                found = self._sample(source, rows)
                failures[source] = 0 if found else failures[source] + 1
                if failures[source] == ATTEMPTS:
                    raise _alike(source)
                with self._changed:
                    for pair in found:
                        self._write(asdict(pair))
                    if len(self._stock[source]) >= self._due[source]:
                        self._due[source] = 0
                    self._changed.notify_all()
            # The thread must survive whatever happens, because nobody would get a pair any more.
            except Exception as error:
                if not isinstance(error, UserError | OSError):
                    logger.exception("no answers of %s", " and ".join(source))
                    error = UserError(Problem("answers", " and ".join(source), f"cannot be sampled ({error!r})"))
                with self._changed:
                    failures[source] = self._due[source] = 0
                    self._errors[source] = error
                    self._changed.notify_all()

    def _sample(self, source: Source, rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
        """Sample a pair of answers to each prompt; pairs that there is nothing to choose between are left out."""
        first, second = self.models.get(source[0]), self.models.get(source[1])
        fitting = [row for row in rows if _fits(first, row["prompt"]) and _fits(second, row["prompt"])]
        if not fitting:
            return []
        seed = secrets.randbelow(1 << 31)
        if first is second:
            answers = self._answer(first, fitting, 2, seed)
        else:
            both = self._answer(first, fitting, 1, seed), self._answer(second, fitting, 1, seed + 1)
            answers = [[one[0], two[0]] for one, two in zip(*both, strict=True)]
        return [
            Pair(
                pair=secrets.token_hex(8),
                prompt=list(row["prompt"]),
                a=a,
                b=b,
                model_a=source[0],
                model_b=source[1],
                sampling=asdict(self.sampling) | {"seed": seed},
                rule={name: row[name] for name in RULE_COLUMNS if row.get(name)},
            )
            for row, (a, b) in zip(fitting, answers, strict=True)
            if a and b and a != b
        ]

    def _answer(self, loaded: Loaded, rows: Sequence[Mapping[str, Any]], samples: int, seed: int) -> list[list[str]]:
        """Return `samples` answers to each prompt; one that spells a special token, which no data may, is ""."""
        encoded = [loaded.encode(row["prompt"]) for row in rows]
        room = loaded.context - max(map(len, encoded)) if loaded.context else self.sampling.max_new_tokens
        completions = generate(
            loaded.model,
            loaded.tokenizer,
            encoded,
            max_new_tokens=min(room, self.sampling.max_new_tokens),
            samples=samples,
            temperature=self.sampling.temperature,
            min_p=self.sampling.min_p,
            seed=seed,
        )
        tokens = special_tokens(loaded.tokenizer)
        return [["" if tokens.search(one.text) else one.text for one in answers] for answers in completions]


def _fits(loaded: Loaded, prompt: Messages) -> bool:
    try:
        return bool(loaded.encode(prompt))
    except UserError:
        return False


def _alike(source: Source) -> UserError:
    remedy = "have only empty or equal answers; raise --temperature, or choose other models"
    return UserError(Problem("answers", " and ".join(dict.fromkeys(source)), remedy))
