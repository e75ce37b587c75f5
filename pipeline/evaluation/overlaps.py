"""Held-out rows that have a copy among the rows that stages train on.

A held-out row is a copy if all of it occurs in a training row, or if 13 consecutive words of it do. The words of a
template do not count, such as an instruction that a data set puts before every row. With 3 words instead of 13:

    held out      solve this step by step:   carl has six red stamps
    training      solve this step by step:   carl has six blue stamps and two red ones
                  ~~~~~ template ~~~~~~~~~   ~~~~~~~~~~~~ 3 words are shared: a copy

    held out      solve this step by step:   maria eats an apple
    training      solve this step by step:   carl has six red stamps             only the template is shared: no copy

There may be millions of training rows, so they are read once, and none is kept. What is looked up is built from the
held-out rows: the hashes of all their n-grams, which are 13 consecutive words, or the whole text if it has fewer.
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
TEMPLATE_WORDS = 8
"""Number of consecutive words that make up a template if they occur in more than `TEMPLATE_ROWS` held-out rows."""
TEMPLATE_ROWS = 3
"""Maximum number of held-out rows with the same `TEMPLATE_WORDS` words that are not a template."""
TEMPLATE_PROMPTS = 20
"""Maximum number of different training prompts with the same `OVERLAP_WORDS` words that are not a template."""
MOST_SEARCHED = 1_000_000
"""Maximum number of training rows of a data set that are searched; of a larger one, they are drawn at random. 200,000
rows of a hundred words take about half a minute on a core, in each evaluation, and no memory for each of them."""

Text = tuple[str, ...]
"""The words of a text."""


class CopySearch:
    """A search for copies of held-out rows in training rows: `read` each training row, then ask for the `copies`.

    Args:
        rows: The held-out rows, each with the key of its data and its texts as `texts` returns them: first the whole
            row, then parts of it.
    """

    def __init__(self, rows: Sequence[tuple[str, Sequence[str]]]) -> None:
        self._rows: list[tuple[str, list[Text]]] = []
        for key, texts_of_row in rows:
            self._rows.append((key, [tuple(words(text)) for text in texts_of_row]))
        self._template_counts = self._count_template_grams()

        # The training prompts with each n-gram of the held-out rows, by its hash. More than `TEMPLATE_PROMPTS` make it
        # a template, so no more are kept.
        self._prompts: dict[int, set[int]] = {}
        # Some texts are shorter than an n-gram. These are their lengths, by their first word.
        self._short_lengths: dict[str, set[int]] = defaultdict(set)
        for _, row in self._rows:
            for text in filter(None, row):
                for gram in _hashes(text):
                    self._prompts[gram] = set()
                if len(text) < OVERLAP_WORDS:
                    self._short_lengths[text[0]].add(len(text))

        self._anchors = self._find_anchors()
        # The whole held-out rows that occur in a training row.
        self._copied_rows: set[Text] = set()

    def _count_template_grams(self) -> dict[str, Counter[int]]:
        """Return in how many different held-out rows of a key each sequence of `TEMPLATE_WORDS` words occurs.

        Sequences are hashed. A shorter text is a sequence itself.
        """
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for key, row in {(key, tuple(row)) for key, row in self._rows}:
            grams: set[int] = set()
            for text in row:
                grams.update(_hashes(text, TEMPLATE_WORDS))
            counts[key].update(grams)
        return counts

    def _find_anchors(self) -> dict[int, list[tuple[Text, int]]]:
        """Return the rarest n-gram of each whole held-out row, by its hash: the row, and its place in the row.

        Only where a training text has this n-gram is it compared with the whole row, word by word.
        """
        wholes = {row[0] for _, row in self._rows if row and row[0]}
        counts = Counter(chain.from_iterable(map(_hashes, wholes)))
        anchors: dict[int, list[tuple[Text, int]]] = defaultdict(list)
        for text in wholes:
            hashes = list(_hashes(text))
            place = min(range(len(hashes)), key=lambda place: counts[hashes[place]])
            anchors[hashes[place]].append((text, place))
        return anchors

    def read(self, row: Sequence[str]) -> None:
        """Look for copies in a training row, given as its texts."""
        # Several rows may have the same prompt, which is the shortest text of a row.
        prompt = hash(min(row, key=len, default=""))
        for text in row:
            # The beginning of another text is searched with that text.
            if any(longer != text and longer.startswith(text) for longer in row):
                continue
            tokens = words(text)
            for place, gram in self._shared_grams(tokens):
                if len(self._prompts[gram]) <= TEMPLATE_PROMPTS:
                    self._prompts[gram].add(prompt)
                for whole, offset in self._anchors.get(gram, ()):
                    begin = place - offset
                    if begin >= 0 and tuple(tokens[begin : begin + len(whole)]) == whole:
                        self._copied_rows.add(whole)

    def _shared_grams(self, tokens: Sequence[str]) -> Iterator[tuple[int, int]]:
        """Yield the places and hashes of the n-grams of a training text that held-out rows have as well."""
        hashes = list(map(hash, ngrams(tokens, OVERLAP_WORDS)))
        # Almost no text shares anything, and `isdisjoint` runs in C.
        if not self._prompts.keys().isdisjoint(hashes):
            for place, gram in enumerate(hashes):
                if gram in self._prompts:
                    yield place, gram
        for place, word in enumerate(tokens):
            for length in self._short_lengths.get(word, ()):
                gram = hash(tuple(tokens[place : place + length]))
                if gram in self._prompts:
                    yield place, gram

    def copies(self) -> Iterator[int]:
        """Yield the places of the held-out rows, in the list of all, of which a copy has been read."""
        for number, (key, row) in enumerate(self._rows):
            is_whole_copied = bool(row) and row[0] in self._copied_rows
            if is_whole_copied or any(self._is_copied(text, key) for text in row if text):
                yield number

    def _is_copied(self, text: Text, key: str) -> bool:
        """Return whether a training row has an n-gram of a text without any word of a template."""
        size = min(OVERLAP_WORDS, len(text))
        # For each word, whether it belongs to a template.
        in_template = [False] * len(text)
        template_size = min(TEMPLATE_WORDS, len(text))
        for place, gram in enumerate(_hashes(text, TEMPLATE_WORDS)):
            if self._template_counts[key][gram] > TEMPLATE_ROWS:
                in_template[place : place + template_size] = [True] * template_size
        hashes = list(_hashes(text))
        for place, gram in enumerate(hashes):
            if len(self._prompts[gram]) > TEMPLATE_PROMPTS:
                in_template[place : place + size] = [True] * size
        for place, gram in enumerate(hashes):
            if self._prompts[gram] and not any(in_template[place : place + size]):
                return True
        return False


def _hashes(text: Sequence[str], size: int = OVERLAP_WORDS) -> Iterator[int]:
    """Return the hashes of the n-grams of `size` words of a text, in order; of a shorter text, its own hash."""
    return map(hash, ngrams(text, min(size, len(text))))


def _with_usual_names(row: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """Return a row in which the columns that a stage reads have the names that `texts` expects."""
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
    """Look for copies of held-out rows among the training rows of all stages.

    Returns:
        For each key of held-out data, as the file of an evaluation keeps it: the number of `rows`; how many of them
        have a copy (`found`); the number of training rows that were searched (`trained_on`); the number of consecutive
        words that make a copy (`n`); and how many rows have a copy `in` which training data.
    """
    keys_of_suspects = [keys for _, keys in held_out.suspects.values()]
    tests = {key: _texts_of(held_out, key) for key in sorted(set(chain.from_iterable(keys_of_suspects)))}
    copies: dict[str, set[int]] = {}
    overlaps: dict[str, dict[str, Any]] = {}
    for key, rows_of_key in tests.items():
        copies[key] = set()
        overlaps[key] = {"rows": len(rows_of_key), "trained_on": 0, "n": OVERLAP_WORDS, "in": {}}
    for name, (part, keys) in held_out.suspects.items():
        # All rows of these keys in one list, each with its number among the rows of its key.
        rows: list[tuple[str, int]] = []
        for key in keys:
            rows += [(key, number) for number in range(len(tests[key]))]
        search = CopySearch([(key, tests[key][number]) for key, number in rows])
        searched = 0
        for _, row in part.sample(MOST_SEARCHED):
            search.read(texts(_with_usual_names(row, part.source)))
            searched += 1
        copied_rows = [rows[place] for place in search.copies()]
        for key in keys:
            overlaps[key]["trained_on"] += searched
            numbers = {number for key_of_row, number in copied_rows if key_of_row == key}
            if numbers:
                copies[key] |= numbers
                overlaps[key]["in"][name] = len(numbers)
    for key, numbers in copies.items():
        overlaps[key]["found"] = len(numbers)
    return overlaps


def _texts_of(held_out: HeldOut, key: str) -> list[list[str]]:
    """Return the texts of each held-out row of a key, as `texts` returns them; system messages are left out."""
    if key == "text":
        return [texts({"text": row["text"]}) for row in held_out.text]
    column = "messages" if key == "instructions" else "prompt"
    rows = []
    for row in getattr(held_out, key):
        # Many rows share their system message, which does not make them copies.
        messages = [turn for turn in row[column] if turn["role"] != "system"]
        rows.append(texts({"messages": messages}))
    return rows
