"""Pairs of answers for people to compare: sampled in the background, kept in `votes/pairs.jsonl`, and assigned.

A line of the file is a pair, or assigns one to an annotator:

    {"pair": "5f…", "prompt": [...], "a": "It is red.", "b": "Red.", "model_a": "2_sft", "model_b": "3_ppo", ...}
    {"pair": "5f…", "for": "ann", "shared": false}

The server reads its state from these lines, in their order, so that a restarted server goes on where it was. For any
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
from pipeline.files import append_line
from pipeline.models.generation import generate
from pipeline.models.tokenizer import special_tokens
from pipeline.rewards.grading import RULE_COLUMNS

Source = tuple[str, str]
"""The models of the answers `a` and `b`; they may be the same."""
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
    """Two answers to a prompt; `rule` has the columns by which the simulated annotators would judge them."""

    pair: str
    prompt: list[dict[str, str]]
    a: str
    b: str
    model_a: str
    model_b: str
    sampling: dict[str, Any]
    rule: dict[str, Any] = field(default_factory=dict)

    def shown_first(self, annotator: str) -> str:
        """Return which answer this annotator sees first, "a" or "b"; only the server knows the seed."""
        return random.Random(f"{self.pair}/{annotator}/{self.sampling.get('seed')}").choice("ab")


class Pairs:
    """The pairs of a run in the file `path`; everyone sees the share `overlap` of them.

    `prompts` are rows with `prompt`, and optionally the columns by which the simulated annotators judge.
    """

    def __init__(
        self, path: Path, models: Models, prompts: Sequence[Mapping[str, Any]], sampling: dict[str, Any], overlap: float
    ) -> None:
        self.models, self.prompts, self.sampling, self.overlap = models, prompts, sampling, overlap
        self.by_id: dict[str, Pair] = {}
        self._stock: dict[Source, list[Pair]] = defaultdict(list)
        self._shared: dict[Source, dict[str, Pair]] = defaultdict(dict)
        self._sequences: dict[tuple[str, Source], list[Pair]] = defaultdict(list)
        self._mutex = threading.RLock()
        # One thread samples for all, a batch at a time, so that a slow model does not keep the others waiting.
        self._sampler = ThreadPoolExecutor(1)
        self._batches: dict[Source, Future[int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        for line in lines:
            # A partially written line is skipped. A vote contains everything that is known about its pair.
            with suppress(ValueError, LookupError, TypeError):
                self._take_in(json.loads(line))
        self._file = path.open("ab", buffering=0)
        if lines[-1]:
            append_line(self._file, b"")
        # Every start of the server uses the same order, and goes on from about where the last one ended.
        self._order = random.Random(0).sample(range(len(prompts)), len(prompts))
        self._position = len(self.by_id)

    def _take_in(self, line: dict[str, Any]) -> None:
        pair = self.by_id[line["pair"]] if "for" in line else Pair(**line)
        source = pair.model_a, pair.model_b
        if "for" not in line:
            self.by_id[pair.pair] = pair
            self._stock[source].append(pair)
            return
        self._sequences[line["for"], source].append(pair)
        # The first annotator who gets a pair takes it out of the stock. A shared one then waits for the others.
        if pair in self._stock[source]:
            self._stock[source].remove(pair)
            if line["shared"]:
                self._shared[source][pair.pair] = pair

    def _write(self, line: dict[str, Any]) -> None:
        # A line that cannot be written raises an error, and has no effect.
        append_line(self._file, json.dumps(line).encode())
        self._take_in(line)

    def sequence(self, annotator: str, source: Source) -> list[Pair]:
        with self._mutex:
            return list(self._sequences[annotator, source])

    def allot(self, annotator: str, source: Source) -> Pair:
        """Assign the next pair to an annotator, waiting until one has been sampled.

        Raises:
            UserError: If no pair can be sampled.
            OSError: If it cannot be written, for instance because the disk is full.
        """
        without = 0
        while without < ATTEMPTS:
            with self._mutex:
                sequence = self._sequences[annotator, source]
                # Rounded, because a product such as 3 * 0.1 is a little more, or less, than it should be.
                due = [int(round(length * self.overlap, 6)) for length in (len(sequence), len(sequence) + 1)]
                is_shared = due[1] > due[0]
                offered = [*(self._shared[source].values() if is_shared else ()), *self._stock[source]]
                pair = next((pair for pair in offered if pair not in sequence), None)
                if pair is not None:
                    self._write({"pair": pair.pair, "for": annotator, "shared": is_shared})
                if len(self._stock[source]) < AHEAD and source not in self._batches:
                    self._batches[source] = self._sampler.submit(self._add_batch, source)
                batch = self._batches.get(source)
            if pair is not None:
                return pair
            if batch is not None:
                without = 0 if batch.result() else without + 1
        raise _alike(source)

    def typed(self, annotator: str, source: Source, text: str) -> Pair:
        """Sample a pair of answers to a prompt that an annotator has typed, and assign it; errors as for `allot`."""
        prompt: list[dict[str, str]] = [{"role": "user", "content": text}]
        for name in source:
            loaded = self.models.get(name)
            loaded.encode(prompt)
            if found := special_tokens(loaded.tokenizer).search(text):
                remedy = "is a special token of the model, which data must not contain; remove it"
                raise UserError(Problem("prompt", found.group(), remedy))
        # Two samples of a model that is sure of its answer are often the same.
        for _ in range(ATTEMPTS):
            if pairs := self._sample(source, [{"prompt": prompt}]):
                with self._mutex:
                    self._write(asdict(pairs[0]))
                    self._write({"pair": pairs[0].pair, "for": annotator, "shared": False})
                return pairs[0]
        raise _alike(source)

    def _add_batch(self, source: Source) -> int:
        """Add pairs of answers to the next prompts to the stock. Return their number."""
        try:
            if not self.prompts:
                raise UserError(Problem("prompts", "nothing", "there is no data set of prompts; type one"))
            places = range(self._position, self._position + BATCH)
            self._position += BATCH
            found = self._sample(source, [self.prompts[self._order[place % len(self._order)]] for place in places])
            with self._mutex:
                for pair in found:
                    self._write(asdict(pair))
            return len(found)
        finally:
            with self._mutex:
                del self._batches[source]

    def _sample(self, source: Source, rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
        """Sample a pair of answers to each prompt that fits. Drop empty and equal answers, which leave no choice."""
        first, second = self.models.get(source[0]), self.models.get(source[1])
        fitting = []
        for row in rows:
            with suppress(UserError):
                fitting.append((row, first.encode(row["prompt"]), second.encode(row["prompt"])))
        if not fitting:
            return []
        kept, for_first, for_second = zip(*fitting, strict=True)
        seed = secrets.randbelow(1 << 31)
        if first is second:
            answers = self._answer(first, for_first, 2, seed)
        # With one seed for both, two models that are nearly the same would often give the same answer.
        else:
            of_first, of_second = self._answer(first, for_first, 1, seed), self._answer(second, for_second, 1, seed + 1)
            answers = [one + other for one, other in zip(of_first, of_second, strict=True)]
        pairs = []
        for row, (a, b) in zip(kept, answers, strict=True):
            if a and b and a != b:
                rule = {column: row[column] for column in RULE_COLUMNS if row.get(column)}
                prompt, sampling = list(row["prompt"]), self.sampling | {"seed": seed}
                pairs.append(Pair(secrets.token_hex(8), prompt, a, b, *source, sampling, rule))
        return pairs

    def _answer(self, loaded: Loaded, prompts: Sequence[list[int]], samples: int, seed: int) -> list[list[str]]:
        """Return `samples` answers to each prompt, "" for one with special tokens, which data must not contain."""
        room = min(self.sampling["max_new_tokens"], loaded.context - max(map(len, prompts)))
        settings = self.sampling | {"max_new_tokens": room, "samples": samples, "seed": seed}
        completions = generate(loaded.model, loaded.tokenizer, prompts, **settings)
        tokens = special_tokens(loaded.tokenizer)
        return [["" if tokens.search(one.text) else one.text for one in answers] for answers in completions]


def _alike(source: Source) -> UserError:
    remedy = "have only empty or equal answers; raise --temperature, or choose other models"
    return UserError(Problem("answers", " and ".join(dict.fromkeys(source)), remedy))
