"""Held-out rows that have a copy among the rows that stages train on."""

from collections import Counter
from typing import Any

from pipeline.data.overlap import overlap
from pipeline.evaluation.held_out import MAX_TRAINING_ROWS, HeldOut

OVERLAP_WORDS = 13
"""Number of consecutive shared words that make a held-out row a copy of a training row (as for GPT-3)."""


def find_overlaps(held_out: HeldOut) -> dict[str, dict[str, Any]]:
    """Look for held-out rows among the training rows of all stages.

    For each kind of data, return the number of `rows`, how many of them are `found`, the number of training rows
    searched (`trained_on`), the `n` consecutive words that must agree and, if any are found, how many `in` which rows.
    """
    tests: dict[str, list[dict[str, Any]]] = {}
    for key in sorted({key for _, keys in held_out.suspects.values() for key in keys}):
        column = {"text": "text", "instructions": "messages"}.get(key, "prompt")
        # Many rows share their system message, which does not make them copies.
        tests[key] = [
            {"text": one} if key == "text" else {"messages": [turn for turn in one if turn["role"] != "system"]}
            for one in (row[column] for row in getattr(held_out, key))
        ]
    copies: dict[str, set[int]] = {key: set() for key in tests}
    found: dict[str, dict[str, Any]] = {
        key: {"rows": len(rows), "trained_on": 0, "n": OVERLAP_WORDS, "in": {}} for key, rows in tests.items()
    }
    for name, (part, keys) in held_out.suspects.items():
        looked_for = [(key, number) for key in keys for number in range(len(tests[key]))]
        rows = (row for _, row in part.sample(MAX_TRAINING_ROWS))
        shared = overlap(rows, (tests[key][number] for key, number in looked_for), OVERLAP_WORDS)
        times = Counter(match.shared for match in shared.matches)
        # Words that more than three held-out rows share with training rows are part of a template.
        copied = [looked_for[match.test_row] for match in shared.matches if times[match.shared] <= 3]
        for key in keys:
            found[key]["trained_on"] += shared.train_rows
            if numbers := {number for of, number in copied if of == key}:
                copies[key] |= numbers
                found[key]["in"][name] = len(numbers)
    return {key: {**entry, "found": len(copies[key])} for key, entry in found.items()}
