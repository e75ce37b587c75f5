"""Pairs of answers for people to compare: sampled in the background, kept in `votes/pairs.jsonl`, and assigned.

A line of the file is a pair, or assigns one to an annotator:

    {"pair": "5f…", "prompt": [...], "a": "It is red.", "b": "Red.", "model_a": "2_sft", "model_b": "3_ppo", ...}
    {"pair": "5f…", "for": "ann", "shared": false}

The server reads its state from these lines, in their order, so that a restarted server resumes where it was. For any
two models it has a stock of pairs that nobody has seen, which another thread refills while people read, and for each
annotator a sequence: the pairs that were assigned to them, shown until they have a vote. Shared pairs, which everyone
sees, come at regular intervals in each sequence: every fourth pair with an overlap of 0.25.
"""

import json
import random
import secrets
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.app.models import Loaded, Models
from pipeline.errors import Problem, UserError
from pipeline.files import append_line, open_log
from pipeline.models.generation import generate
from pipeline.models.tokenizer import special_tokens
from pipeline.rewards.grading import RULE_COLUMNS

Source = tuple[str, str]
"""The models of the answers `a` and `b`; they may be the same."""
Line = dict[str, Any]
"""A line of the file: a pair, or the assignment of one."""
SAMPLING: dict[str, Any] = {"temperature": 1.0, "min_p": 0.05, "max_new_tokens": 128}
"""How answers are sampled, unless the run or the command line says otherwise."""
BATCH = 4
"""Prompts that are answered in one batch, which takes little longer than a single one."""
AHEAD = 8
"""Pairs that are kept ready if possible."""
ATTEMPTS = 16
"""After this many batches without a pair to compare, the models are assumed to always give the same answers."""


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt."""

    # Its id.
    pair: str
    prompt: list[dict[str, str]]
    a: str
    b: str
    model_a: str
    model_b: str
    # Temperature, seed and other settings with which both answers were sampled.
    sampling: dict[str, Any]
    # The columns of the prompt's row by which the simulated annotators would judge; {} if it has none.
    rule: dict[str, Any] = field(default_factory=dict)

    def shown_first(self, annotator: str) -> str:
        """Return which answer this annotator sees first, "a" or "b"; only the server knows the seed."""
        return random.Random(f"{self.pair}/{annotator}/{self.sampling.get('seed')}").choice("ab")


class Pairs:
    """The pairs of a run, and who they are assigned to. Every change is a line of a file."""

    def __init__(
        self, path: Path, models: Models, prompts: Sequence[Mapping[str, Any]], sampling: dict[str, Any], overlap: float
    ) -> None:
        """Read the pairs that were sampled and assigned so far.

        Args:
            path: The file. The caller has to keep other processes from writing to it.
            models: The models of the page, which write the answers.
            prompts: Rows with `prompt`, and optionally the columns by which the simulated annotators judge.
            sampling: Settings of `SAMPLING`.
            overlap: Share of the pairs of an annotator that everyone sees.

        Raises:
            OSError: If the file cannot be read and written.
        """
        self.models = models
        self.prompts = prompts
        self.sampling = sampling
        self.overlap = overlap
        self.by_id: dict[str, Pair] = {}
        # By the models that wrote the answers: pairs that nobody has seen, and shared ones that somebody has seen.
        self._stock: dict[Source, list[Pair]] = defaultdict(list)
        self._shared: dict[Source, dict[str, Pair]] = defaultdict(dict)
        # The pairs that were assigned to an annotator, in this order.
        self._sequences: dict[tuple[str, Source], list[Pair]] = defaultdict(list)
        self._mutex = threading.RLock()
        # One thread samples for all, a batch at a time, so that a slow model does not keep the others waiting.
        self._sampler = ThreadPoolExecutor(1)
        self._batches: dict[Source, Future[int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open_log(path)
        for line in path.read_bytes().split(b"\n"):
            # A damaged line is skipped. A vote contains everything that is known about its pair.
            with suppress(ValueError, LookupError, TypeError):
                self._apply(json.loads(line))
        # Every start of the server uses the same order, and resumes about where the last one ended.
        self._order = random.Random(0).sample(range(len(prompts)), len(prompts))
        self._position = len(self.by_id)

    def _apply(self, line: Line) -> None:
        """Change the state as a line of the file says."""
        if "for" not in line:
            pair = Pair(**line)
            self.by_id[pair.pair] = pair
            self._stock[pair.model_a, pair.model_b].append(pair)
            return
        pair = self.by_id[line["pair"]]
        source = pair.model_a, pair.model_b
        self._sequences[line["for"], source].append(pair)
        # The first annotator who gets a pair takes it out of the stock. A shared one then waits for the others.
        if pair in self._stock[source]:
            self._stock[source].remove(pair)
            if line["shared"]:
                self._shared[source][pair.pair] = pair

    def _write(self, line: Line) -> None:
        """Append a line to the file, and apply it. A line that cannot be written raises an error, without effect."""
        append_line(self._file, json.dumps(line).encode())
        self._apply(line)

    def sequence(self, annotator: str, source: Source) -> list[Pair]:
        """Return the pairs of two models that were assigned to an annotator, the first one first."""
        with self._mutex:
            return list(self._sequences[annotator, source])

    def assign_next(self, annotator: str, source: Source) -> Pair:
        """Assign the next pair to an annotator, waiting until one has been sampled.

        Raises:
            UserError: If no pair can be sampled.
            OSError: If it cannot be written, for instance because the disk is full.
        """
        # Batches in a row without a pair to compare.
        empty_batches = 0
        while empty_batches < ATTEMPTS:
            with self._mutex:
                pair = self._assign_from_stock(annotator, source)
                if len(self._stock[source]) < AHEAD and source not in self._batches:
                    self._batches[source] = self._sampler.submit(self._add_batch, source)
                batch = self._batches.get(source)
            if pair is not None:
                return pair
            if batch is not None:
                empty_batches = 0 if batch.result() else empty_batches + 1
        raise _no_difference(source)

    def _assign_from_stock(self, annotator: str, source: Source) -> Pair | None:
        """Assign a pair that has been sampled, and return it, or None if there is none that the annotator lacks."""
        sequence = self._sequences[annotator, source]
        # Rounded, because a product such as 3 * 0.1 is a little more, or less, than it should be.
        shared_so_far = int(round(len(sequence) * self.overlap, 6))
        shared_after = int(round((len(sequence) + 1) * self.overlap, 6))
        is_shared = shared_after > shared_so_far
        candidates = list(self._stock[source])
        if is_shared:
            candidates = [*self._shared[source].values(), *candidates]
        for pair in candidates:
            if pair not in sequence:
                self._write({"pair": pair.pair, "for": annotator, "shared": is_shared})
                return pair
        return None

    def assign_typed(self, annotator: str, source: Source, text: str) -> Pair:
        """Sample a pair of answers to a prompt that an annotator has typed, and assign it.

        Raises:
            UserError: If the prompt is too long or contains special tokens, or all answers are equal.
            OSError: If it cannot be written, for instance because the disk is full.
        """
        prompt: list[dict[str, str]] = [{"role": "user", "content": text}]
        for name in source:
            loaded = self.models.get(name)
            loaded.encode(prompt)
            if match := special_tokens(loaded.tokenizer).search(text):
                remedy = "is a special token of the model, which data must not contain; remove it"
                raise UserError(Problem("prompt", match.group(), remedy))
        # Two samples of a model that is sure of its answer are often the same.
        for _ in range(ATTEMPTS):
            if pairs := self._sample(source, [{"prompt": prompt}]):
                pair = pairs[0]
                with self._mutex:
                    self._write(asdict(pair))
                    self._write({"pair": pair.pair, "for": annotator, "shared": False})
                return pair
        raise _no_difference(source)

    def _add_batch(self, source: Source) -> int:
        """Add pairs of answers to the next prompts to the stock. Return their number."""
        try:
            if not self.prompts:
                raise UserError(Problem("prompts", "nothing", "there is no data set of prompts; type one"))
            # After the last prompt comes the first one again.
            places = [place % len(self._order) for place in range(self._position, self._position + BATCH)]
            self._position += BATCH
            pairs = self._sample(source, [self.prompts[self._order[place]] for place in places])
            with self._mutex:
                for pair in pairs:
                    self._write(asdict(pair))
            return len(pairs)
        finally:
            with self._mutex:
                del self._batches[source]

    def _sample(self, source: Source, rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
        """Sample a pair of answers to each prompt that fits. Drop empty and equal answers, which leave no choice."""
        first = self.models.get(source[0])
        second = self.models.get(source[1])
        fitting_rows = []
        first_prompts = []
        second_prompts = []
        for row in rows:
            with suppress(UserError):
                first_prompt = first.encode(row["prompt"])
                second_prompt = second.encode(row["prompt"])
                fitting_rows.append(row)
                first_prompts.append(first_prompt)
                second_prompts.append(second_prompt)
        if not fitting_rows:
            return []
        seed = secrets.randbelow(1 << 31)
        if first is second:
            answers = self._answer(first, first_prompts, 2, seed)
        else:
            # With one seed for both, two models that are nearly the same would often give the same answer.
            first_answers = self._answer(first, first_prompts, 1, seed)
            second_answers = self._answer(second, second_prompts, 1, seed + 1)
            answers = [[a, b] for (a,), (b,) in zip(first_answers, second_answers, strict=True)]
        pairs = []
        for row, (a, b) in zip(fitting_rows, answers, strict=True):
            if a and b and a != b:
                rule = {column: row[column] for column in RULE_COLUMNS if row.get(column)}
                sampling = self.sampling | {"seed": seed}
                pairs.append(Pair(secrets.token_hex(8), list(row["prompt"]), a, b, *source, sampling, rule))
        return pairs

    def _answer(self, loaded: Loaded, prompts: Sequence[list[int]], samples: int, seed: int) -> list[list[str]]:
        """Return `samples` answers to each prompt, "" for one with special tokens, which data must not contain."""
        room = min(self.sampling["max_new_tokens"], loaded.context - max(map(len, prompts)))
        settings = self.sampling | {"max_new_tokens": room, "samples": samples, "seed": seed}
        tokens = special_tokens(loaded.tokenizer)
        answers = []
        for completions in generate(loaded.model, loaded.tokenizer, prompts, **settings):
            texts = [completion.text for completion in completions]
            answers.append(["" if tokens.search(text) else text for text in texts])
        return answers


def _no_difference(source: Source) -> UserError:
    """Return the error that two models, or one, have no two different answers."""
    remedy = "have only empty or equal answers; raise --temperature, or choose other models"
    return UserError(Problem("answers", " and ".join(dict.fromkeys(source)), remedy))
