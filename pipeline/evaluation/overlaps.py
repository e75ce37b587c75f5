"""Held-out rows that have a copy among the rows that stages train on.

A held-out row is a copy of a training row if all of it occurs there, or 13 words in a row that belong to it alone. Data
sets often put the same instruction before every row. With 3 words instead of 13:

    held out      solve this step by step:   carl has six red stamps
    training      solve this step by step:   carl has six blue stamps and two red ones
                  ~~~~~ of a template ~~~~   ~~~~~~~~~~~~ shared: a copy

    held out      solve this step by step:   maria eats an apple
    training      solve this step by step:   carl has six red stamps                     nothing else is shared: no copy
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from pipeline.data.overlap import ngrams, texts, words
from pipeline.evaluation.evaluate_yaml import Source
from pipeline.evaluation.held_out import HeldOut

OVERLAP_WORDS = 13
"""Number of consecutive shared words that make a held-out row a copy of a training row (as for GPT-3)."""
TEMPLATE_WORDS, TEMPLATE_ROWS, TEMPLATE_PROMPTS = 8, 3, 20
"""Words belong to a template if so many of them in a row occur in more held-out rows than the second number, or if
`OVERLAP_WORDS` of them do in more different training prompts than the third."""
MOST_SEARCHED = 1_000_000
"""Training rows of a data set that are searched: all up to this number, of more that many, drawn at random. 200,000
rows of a hundred words take about half a minute on a core, in each evaluation, and no memory for each of them."""


class CopySearch:
    """Looks for copies of some held-out rows in training rows, which are read one by one and not kept.

    `rows` are the held-out rows: the key of their data, and their texts as `texts` returns them: first the whole row,
    then parts of it.
    """

    def __init__(self, rows: Sequence[tuple[str, Sequence[str]]]) -> None:
        self._rows: list[tuple[str, list[tuple[str, ...]]]] = []
        for key, texts_of_row in rows:
            self._rows.append((key, [tuple(words(text)) for text in texts_of_row]))
        # How many different rows of a key contain the short n-grams by which a template is recognised.
        self._in_rows: dict[str, Counter[int]] = defaultdict(Counter)
        for key, row in {(key, tuple(row)) for key, row in self._rows}:
            grams: set[int] = set()
            for text in row:
                grams.update(map(hash, ngrams(text, _size(text, TEMPLATE_WORDS))))
            self._in_rows[key].update(grams)
        # For each n-gram, by its hash: the training prompts with it, or the first of them.
        self._seen: dict[int, set[int]] = {}
        # The lengths of texts of fewer words, by their first word.
        self._short: dict[str, set[int]] = defaultdict(set)
        rows_of_texts = [row for _, row in self._rows]
        for text in set(chain.from_iterable(rows_of_texts)):
            if not text:
                continue
            for value in _hashes(text):
                self._seen[value] = set()
            if len(text) < OVERLAP_WORDS:
                self._short[text[0]].add(len(text))
        # For the rarest n-gram of each whole row, these rows, and where they have it.
        self._anchors: dict[int, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
        wholes = {row[0] for _, row in self._rows if row and row[0]}
        counts = Counter(chain.from_iterable(map(_hashes, wholes)))
        for text in wholes:
            hashes = list(_hashes(text))
            place = min(range(len(hashes)), key=lambda place: counts[hashes[place]])
            self._anchors[hashes[place]].append((text, place))
        self._contained: set[tuple[str, ...]] = set()

    def read(self, row: Sequence[str]) -> None:
        """Look for copies in the texts of a training row."""
        # Several rows may have the same prompt, which is the shortest text of a row.
        prompt = hash(min(row, key=len, default=""))
        for text in row:
            # It is the beginning of another text, in which it is found as well.
            if any(longer != text and longer.startswith(text) for longer in row):
                continue
            tokens = words(text)
            for place, value in self._shared(tokens):
                if len(self._seen[value]) <= TEMPLATE_PROMPTS:
                    self._seen[value].add(prompt)
                for whole, offset in self._anchors.get(value, ()):
                    begin = place - offset
                    if begin >= 0 and tuple(tokens[begin : begin + len(whole)]) == whole:
                        self._contained.add(whole)

    def _shared(self, tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Yield the places and hashes of the n-grams of a training text that held-out rows have as well."""
        hashes = list(map(hash, ngrams(tokens, OVERLAP_WORDS)))
        # Almost no text shares anything, and `isdisjoint` runs in C.
        if not self._seen.keys().isdisjoint(hashes):
            for place, value in enumerate(hashes):
                if value in self._seen:
                    yield place, value
        for place, word in enumerate(tokens):
            for size in self._short.get(word, ()):
                value = hash(tuple(tokens[place : place + size]))
                if value in self._seen:
                    yield place, value

    def copies(self) -> Iterator[int]:
        """Yield the numbers of the held-out rows of which a copy has been read."""
        for number, (key, row) in enumerate(self._rows):
            contains_whole = bool(row) and row[0] in self._contained
            if contains_whole or any(self._is_copied(text, key) for text in row if text):
                yield number

    def _is_copied(self, text: tuple[str, ...], key: str) -> bool:
        """Return whether training rows have an n-gram of a text of which no word belongs to a template."""
        size = _size(text)
        of_template = [False] * len(text)
        for place, gram in enumerate(ngrams(text, _size(text, TEMPLATE_WORDS))):
            if self._in_rows[key][hash(gram)] > TEMPLATE_ROWS:
                of_template[place : place + len(gram)] = [True] * len(gram)
        hashes = list(_hashes(text))
        for place, value in enumerate(hashes):
            if len(self._seen[value]) > TEMPLATE_PROMPTS:
                of_template[place : place + size] = [True] * size
        shared = [place for place, value in enumerate(hashes) if self._seen[value]]
        return any(not any(of_template[place : place + size]) for place in shared)


def _size(text: Sequence[str], most: int = OVERLAP_WORDS) -> int:
    """Return the length of the n-grams of a text: all of it, if it has fewer words."""
    return min(most, len(text))


def _hashes(text: Sequence[str]) -> Iterator[int]:
    return map(hash, ngrams(text, _size(text)))


def _with_usual_names(row: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """Return a row with the names by which `texts` knows the columns that a stage reads."""
    usual = {
        source.text_column: "text",
        source.messages_column: "messages",
        source.prompt_column: "prompt",
        source.completion_column: "completion",
        source.chosen_column: "chosen",
        source.rejected_column: "rejected",
        source.answer_column: "answer",
    }
    return {usual.get(name, name): value for name, value in row.items()}


def find_overlaps(held_out: HeldOut) -> dict[str, dict[str, Any]]:
    """Look for held-out rows among the training rows of all stages.

    For each kind of data, return the number of `rows`, how many of them are `found`, the number of training rows
    searched (`trained_on`), the `n` consecutive words that must agree and, if any are found, how many `in` which rows.
    """
    keys_of_suspects = [keys for _, keys in held_out.suspects.values()]
    tests = {key: _texts_of(held_out, key) for key in sorted(set(chain.from_iterable(keys_of_suspects)))}
    copies: dict[str, set[int]] = {}
    overlaps: dict[str, dict[str, Any]] = {}
    for key, rows_of_key in tests.items():
        copies[key] = set()
        overlaps[key] = {"rows": len(rows_of_key), "trained_on": 0, "n": OVERLAP_WORDS, "in": {}}
    for name, (part, keys) in held_out.suspects.items():
        rows = []
        for key in keys:
            rows += [(key, number) for number in range(len(tests[key]))]
        search = CopySearch([(key, tests[key][number]) for key, number in rows])
        searched = 0
        for _, row in part.sample(MOST_SEARCHED):
            search.read(texts(_with_usual_names(row, part.source)))
            searched += 1
        copied = [rows[place] for place in search.copies()]
        for key in keys:
            overlaps[key]["trained_on"] += searched
            numbers = {number for key_of_row, number in copied if key_of_row == key}
            if numbers:
                copies[key] |= numbers
                overlaps[key]["in"][name] = len(numbers)
    for key, numbers in copies.items():
        overlaps[key]["found"] = len(numbers)
    return overlaps


def _texts_of(held_out: HeldOut, key: str) -> list[list[str]]:
    """Return the texts of each held-out row of a kind of data."""
    if key == "text":
        return [texts({"text": row["text"]}) for row in held_out.text]
    column = "messages" if key == "instructions" else "prompt"
    rows = []
    for row in getattr(held_out, key):
        # Many rows share their system message, which does not make them copies.
        messages = [turn for turn in row[column] if turn["role"] != "system"]
        rows.append(texts({"messages": messages}))
    return rows
