"""Minimal pairs from held-out sentences: the sentence as it is, and the same one with a mistake.

    agreement   The houses on the hill are old.     The houses on the hill is old.
    article     He waited for an hour.              He waited for a hour.
    order       She looked at the old house.        She looked the at old house.

A model is right if it finds the first one more probable; ties are half right. Most articles, and some of the others,
are decided by the next word, so that n-grams are the baseline.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.evaluation.intervals import Estimate, outcome_mean

SENTENCE = re.compile(r"(?:^|(?<=[.?!] ))[A-Z][a-z' ]+(?:, [a-z' ]+)*[.?!]", re.MULTILINE)
"""Sentences without names, numbers and quotations."""
FEWEST_WORDS, MOST_WORDS = 5, 20
OTHER_FORM = {"is": "are", "was": "were", "has": "have", "does": "do"}
OTHER_FORM |= {plural: singular for singular, plural in OTHER_FORM.items()}
AMBIGUOUS = re.compile(r"\b(you|if|as|though|wish|who|that|which|there|lot|none|number)\b", re.IGNORECASE)
"""Words in sentences that may be right with either form, or colloquially are."""
OTHER_ARTICLE = {"a": "an", "an": "a"}


@dataclass(frozen=True)
class Pair:
    """A sentence, and the same one with a mistake; `kind` is "agreement", "article" or "order"."""

    kind: str
    right: str
    wrong: str


def make_pairs(texts: Sequence[str], each: int, seed: int = 0) -> list[Pair]:
    """Return up to `each` pairs of each kind from the sentences of texts; no sentence is in two pairs."""
    rng = random.Random(seed)
    sentences = {match.group() for text in texts for match in SENTENCE.finditer(text)}
    shuffled = sorted(text for text in sentences if FEWEST_WORDS <= len(text.split()) <= MOST_WORDS)
    rng.shuffle(shuffled)
    pairs: dict[str, list[Pair]] = {"agreement": [], "article": [], "order": []}
    for sentence in shuffled:
        # A sentence goes where there are the fewest so far among the kinds that it can be made into.
        made = [
            Pair(kind, sentence, wrong)
            for kind, wrong in (
                ("agreement", _disagree(sentence)),
                ("article", _replace_article(sentence)),
                ("order", _swap(rng, sentence)),
            )
            if wrong and len(pairs[kind]) < each
        ]
        if made:
            pair = min(made, key=lambda candidate: len(pairs[candidate.kind]))
            pairs[pair.kind].append(pair)
    return [pair for of_kind in pairs.values() for pair in of_kind]


def score(right: Sequence[float], wrong: Sequence[float], kinds: Sequence[str]) -> dict[str, Estimate]:
    """Return the share of pairs whose right sentence has the smaller loss, of each kind."""
    outcomes: dict[str, list[float]] = {}
    for loss, other, kind in zip(right, wrong, kinds, strict=True):
        outcomes.setdefault(kind, []).append((loss < other) + 0.5 * (loss == other))
    return {kind: outcome_mean(values) for kind, values in outcomes.items()}


def _disagree(sentence: str) -> str | None:
    """Return the sentence with its verb in the other number, None if it has no such verb or more than one."""
    verbs = [match for match in re.finditer(r"[a-z]+", sentence) if match.group() in OTHER_FORM]
    if len(verbs) != 1 or AMBIGUOUS.search(sentence):
        return None
    (verb,) = verbs
    return sentence[: verb.start()] + OTHER_FORM[verb.group()] + sentence[verb.end() :]


def _replace_article(sentence: str) -> str | None:
    """Return the sentence with "a" for "an" or the other way round, None if it has no article, or several."""
    articles = re.findall(r"\b(an?)\b(?=\s[a-z])", sentence)
    if len(articles) != 1:
        return None
    return re.sub(r"\b(an?)\b(?=\s[a-z])", OTHER_ARTICLE[articles[0]], sentence)


def _swap(rng: random.Random, sentence: str) -> str | None:
    """Return the sentence with two neighbouring words swapped, neither of which has a comma, or is first or last."""
    words = sentence.split()
    places = [
        place
        for place in range(1, len(words) - 2)
        if words[place].isalpha() and words[place + 1].isalpha() and words[place] != words[place + 1]
    ]
    if not places:
        return None
    place = rng.choice(places)
    words[place], words[place + 1] = words[place + 1], words[place]
    return " ".join(words)
